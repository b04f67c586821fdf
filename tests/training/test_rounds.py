"""Rounds of pruning and recovery end where one would, write what was asked for, and go on where they were stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from plprune import load_pruned
from plprune.cli import main
from plprune.pruning.plan import PruningPlan
from plprune.training import round_schedule, rounds
from plprune.training.preemption import AGAIN
from tests.builders import save_tiny
from tests.test_cli import RESUMABLE

TWO = ["fit", "--config=fit.yaml", "--rounds=2", "--trainer.max_steps=5"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and a configuration, which is the current one."""
    save_tiny(tmp_path / "model", intermediate_size=96)
    (tmp_path / "text.txt").write_text("So it goes. " * 200)
    (tmp_path / "fit.yaml").write_text(RESUMABLE.replace("sparsity: 0.2", "sparsity: 0.5"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The configs of the rounds, which this process fits itself."""
    configs: list[dict[str, Any]] = []

    def fit(config: dict[str, Any]) -> int:
        configs.append(config)
        main(["fit", "--config", yaml.safe_dump(config)])
        return 0

    monkeypatch.setattr(rounds, "fit", fit)
    return configs


def test_two_rounds_reach_the_whole_sparsity(
    here: Path, given: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    main(TWO)
    out = capsys.readouterr().out
    measured = [line.split()[0] for line in out.splitlines() if line.startswith(("dense ", "pruned ", "recovered "))]
    assert measured == ["dense", "pruned", "recovered", "pruned", "recovered"]  # none calls the first round's dense
    assert [config["trainer"]["max_steps"] for config in given] == [3, 2]
    first, second = PruningPlan.load("out").chain()
    assert first.digest == PruningPlan.load("round-1/model").digest
    assert first.sparsity == pytest.approx(1 - 0.5**0.5)
    assert second.sparsity == pytest.approx(1 - 0.5 * sum(first.before) / sum(first.after))
    assert sum(second.after) / sum(first.before) == pytest.approx(0.5, abs=0.02)
    model = load_pruned("out")
    assert sum(p.numel() for p in model.model.layers.parameters()) == sum(second.after)

    (here / "checkpoints" / "finished.json").unlink()
    before = (here / "out" / "model.safetensors").read_bytes()
    main([*TWO, "--resume"])
    out = capsys.readouterr().out
    assert out.startswith("this run is finished; its model is in round-1/model\n")
    assert (here / "out" / "model.safetensors").read_bytes() == before


def test_a_model_is_pruned_again_even_by_the_same_settings(
    here: Path, given: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_schedule, "next_sparsity", lambda *_: 0.3)
    main(TWO)
    first, second = PruningPlan.load("out").chain()
    assert first.settings == second.settings
    assert second.reached == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_steps=1"], "2 rounds share trainer.max_steps, which is 1: give more"),
        (["--trainer.callbacks=null"], "rounds need one Prune among trainer.callbacks, and there are 0"),
        (["--ckpt_path=some.ckpt"], "continue with --resume instead of --ckpt_path"),
        (["--trainer.fast_dev_run=true"], "a dry run saves no model for the next round to begin with"),
        (["--rounds=0"], "rounds is 0, but must be at least 1"),
        (["--model.name_or_path=nowhere"], "out exists"),
    ],
)
def test_what_cannot_be_done_in_rounds_is_refused_at_once(
    here: Path, given: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (here / "out").mkdir()
    (here / "out" / "mine").touch()
    with pytest.raises(SystemExit) as stop:
        main([*TWO, *options])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err
    assert given == []


def test_torchrun_must_not_share_its_store(
    here: Path, given: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(SystemExit):
        main(TWO)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_round_that_is_stopped_goes_on(here: Path) -> None:
    command = [sys.executable, "-m", "plprune", *TWO, "--trainer.max_steps=60", "--resume"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment)
    end = time.monotonic() + 300
    while not (here / "round-1/model").exists() and time.monotonic() < end:
        time.sleep(0.02)
    while not list((here / "plans").glob("*")) and time.monotonic() < end:  # of the second round
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == AGAIN
    first = (here / "round-1/model/model.safetensors").stat().st_mtime_ns
    assert subprocess.run(command, env=environment).returncode == 0
    assert (here / "round-1/model/model.safetensors").stat().st_mtime_ns == first
    assert len(PruningPlan.load("out").chain()) == 2
