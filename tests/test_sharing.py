"""Commands in several real processes over one folder: the same as from one, and nothing is computed twice."""

import json
import os
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from plprune.cli import main
from tests.builders import jsonl, numbers, save_tiny
from tests.comparison.test_comparison import timeless
from tests.evaluation.test_lm_eval import QUESTIONS, TASK
from tests.ranks import free_port
from tests.runs import context

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]
SECONDS = 180
NOTED = """
import os, time
from plprune import CFSP

class Noted(CFSP):
    def prune(self, model, batches):
        with open(os.environ["NOTES"], "a") as notes:
            print(os.getpid(), self.sparsity, file=notes)
        time.sleep(0.3)
        return super().prune(model, batches)
"""
SPARSITIES = [0.1, 0.2, 0.3, 0.4]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a text, a task, and a method that notes where it is at work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    save_tiny(tmp_path / "model")
    text = numbers(tmp_path / "text.txt")
    (tmp_path / "mine.py").write_text(NOTED)
    config = {"models": ["model"], "methods": ["mine.Noted"], "sparsities": SPARSITIES, "text": text, "seq_len": 16}
    config |= {"calibration": text, "num_samples": 4, "calibration_seq_len": 16, "max_windows": 3}
    config |= {"recover": {"text": text, "steps": 1, "seq_len": 16, "batch_size": 2}}
    config |= {"tasks": "toy", "task_data": "data"}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "data/own/toy").mkdir(parents=True)
    jsonl(tmp_path / "data/own/toy/validation.jsonl", QUESTIONS[:11])
    (tmp_path / "data/toy.yaml").write_text(TASK.format(name="toy", data="toy"))
    return tmp_path


def commands(output: str) -> list[list[str]]:
    read = ["model", "--text=text.txt", "--seq_len=16"]
    tasks = ["--tasks=toy", "--task_data=data"]
    return [
        ["compare", "--config=compare.yaml", f"--output={output}"],
        ["sensitivity", *read, f"--output={output}", "--max_windows=2", "--num_samples=4"],
        ["evaluate", *read, f"--output={output}/evaluation.json", "--max_windows=5", *tasks],
    ]


def start(folder: Path, listed: list[list[str]], environment: dict[str, Any], log: str) -> ForkServerProcess:
    process = context.Process(target=_run, args=(folder, listed, environment, log), daemon=True)
    process.start()
    return process


def _run(folder: Path, listed: list[list[str]], environment: dict[str, Any], log: str) -> None:
    os.chdir(folder)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["NOTES"] = str(folder / "notes")
    rank_zero_only.rank = environment.get("RANK", 0)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    for command in listed:
        main(command)


def notes(folder: Path) -> list[list[str]]:
    """Who has begun to prune, and how much."""
    return [line.split() for line in (folder / "notes").read_text().splitlines()]


def test_ranks_share_what_one_process_computes(here: Path) -> None:
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "none"}
    own = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in (0, 1)]
    ranks = [start(here, commands("both"), each, f"log-{each['RANK']}") for each in own]
    for rank, process in enumerate(ranks):
        process.join(SECONDS)
        assert process.exitcode == 0, (here / f"log-{rank}").read_text()
    assert (here / "log-1").read_text() == ""
    assert (here / "log-0").read_text().count("report: both/report.html") == 1
    begun = notes(here)
    assert sorted(sparsity for _, sparsity in begun) == [str(each) for each in SPARSITIES]
    assert len({process for process, _ in begun}) == 2
    for command in commands("alone"):
        main(command)
    names = ("report", "sensitivity", "evaluation")
    both, alone = (
        {name: json.loads((here / folder / f"{name}.json").read_text()) for name in names}
        for folder in ("both", "alone")
    )
    assert timeless(both["report"]) == timeless(alone["report"])
    assert both["sensitivity"]["cells"] == alone["sensitivity"]["cells"]
    ours, theirs = both["evaluation"], alone["evaluation"]
    for name in ("perplexity", "bits_per_byte"):
        assert ours["stages"]["model"][name] == pytest.approx(theirs["stages"]["model"][name], rel=1e-12)
    for name in ("scores", "examples", "value"):
        assert ours["tasks"]["model"]["toy"][name] == theirs["tasks"]["model"]["toy"][name]


def test_what_a_killed_process_was_at_another_does(here: Path) -> None:
    comparison = commands("out")[:1]
    one, other = (start(here, comparison, {}, name) for name in ("one", "other"))
    end = time.monotonic() + SECONDS
    while not (here / "notes").exists() or not any(process == str(one.pid) for process, _ in notes(here)):
        assert one.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    one.kill()
    other.join(SECONDS)
    assert other.exitcode == 0, (here / "other").read_text()
    counts = Counter(sparsity for _, sparsity in notes(here))
    (lost,) = [sparsity for process, sparsity in notes(here) if process == str(one.pid)]
    assert counts == {str(each): 1 + (str(each) == lost) for each in SPARSITIES}
    (here / "notes").unlink()
    main(comparison[0])
    assert not (here / "notes").exists()
