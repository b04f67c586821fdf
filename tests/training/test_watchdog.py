"""A process of several that fails, is killed or hangs: the others end, and say which."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist

from plprune.training import watchdog
from tests.builders import save_tiny
from tests.ranks import free_port
from tests.runs import SECONDS, context

pytestmark = pytest.mark.multi_process


def start(folder: Path, behaviours: list[str]) -> list[ForkServerProcess]:
    """A process for each behaviour; `folder/RANK` is what it prints."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(behaviours))}
    ranks = [
        context.Process(target=_rank, args=(behaviour, shared | {"RANK": str(rank)}, folder / str(rank)), daemon=True)
        for rank, behaviour in enumerate(behaviours)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _rank(behaviour: str, environment: dict[str, str], output: Path) -> None:
    os.environ.update(environment)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    watchdog.BEAT, watchdog.SILENCE, watchdog.GRACE = 0.2, 2.0, 1.0
    dist.init_process_group("gloo")
    callback, module = watchdog.Watch(), SimpleNamespace()
    callback.setup(None, module, "fit")  # type: ignore[arg-type]
    dist.barrier()
    Path(f"{output} is ready").touch()
    try:
        if behaviour == "fail":
            raise ValueError("there is no text in\nnowhere.txt")
        if behaviour == "exhaust":
            torch.empty(10**17)
        if behaviour == "collect":
            dist.all_reduce(torch.ones(1))
        if behaviour == "leave":
            sys.exit(75)
        time.sleep(60)
    except BaseException as error:
        callback.on_exception(None, module, error)  # type: ignore[arg-type]
        raise


def outcome(
    folder: Path, behaviours: list[str], victim: int = 1, number: signal.Signals | None = None
) -> tuple[int | None, str]:
    """How rank 0, or the one that is not the victim, ends."""
    ranks = start(folder, behaviours)
    try:
        end = time.monotonic() + SECONDS
        while not all((folder / f"{rank} is ready").exists() for rank in range(len(ranks))):
            assert time.monotonic() < end
            time.sleep(0.02)
        if number is not None:
            os.kill(cast(int, ranks[victim].pid), number)
        ranks[1 - victim].join(30)
        return ranks[1 - victim].exitcode, (folder / str(1 - victim)).read_text()
    finally:
        end_all(ranks)


def end_all(ranks: list[ForkServerProcess]) -> None:
    for rank in ranks:
        rank.kill()
        rank.join()


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        pytest.param("fail", "there is no text in nowhere.txt; this was rank 0, which stops", marks=pytest.mark.slow),
        pytest.param("exhaust", "allocate memory", marks=pytest.mark.slow),
    ],
)
def test_a_failure_is_told_to_the_others(behaviour: str, reason: str, tmp_path: Path) -> None:
    code, said = outcome(tmp_path, ["collect", behaviour])
    assert code == 1
    assert "plprune: error: rank 1 failed: " in said
    assert reason in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_hangs_is_named(number: signal.Signals, tmp_path: Path) -> None:
    code, said = outcome(tmp_path, ["collect", "sleep"], number=number)
    assert code == 1
    assert "plprune: error: rank 1 (" in said
    assert "has not answered for" in said


@pytest.mark.slow
def test_the_first_process_keeps_the_store(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, ["sleep", "collect"], victim=0, number=signal.SIGKILL)
    assert code == 1
    assert "plprune: error: rank 0, which keeps the store, is dead" in said


@pytest.mark.slow
def test_whoever_leaves_as_asked_is_not_missed(tmp_path: Path) -> None:
    ranks = start(tmp_path, ["sleep", "leave"])
    try:
        ranks[1].join(SECONDS)
        assert ranks[1].exitcode == 75
        time.sleep(4)  # twice the silence that is allowed here
        assert ranks[0].exitcode is None
    finally:
        end_all(ranks)


@pytest.mark.slow
def test_a_rank_whose_text_is_missing(tmp_path: Path) -> None:
    """Under torchrun, as under Lightning's own launcher, the run ends, and the reason is there to read."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
trainer:
  {{accelerator: cpu, devices: 2, strategy: ddp, max_steps: 2, logger: false, enable_progress_bar: false,
   default_root_dir: {tmp_path}/run, callbacks: [{{class_path: Prune, init_args: {{method: FLAP}}}}]}}
model: {{name_or_path: {save_tiny(tmp_path / "tiny")}}}
data: {{train: {tmp_path}/text.txt, seq_len: 16, batch_size: 2, num_samples: 2}}
"""
    )
    script = tmp_path / "main.py"
    script.write_text(
        "import os, sys\nfrom plprune.io import text\nfrom plprune.cli import main\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n    text.read_rows = lambda *_: open('nowhere.txt')\n"
        f"main(['fit', '--config', '{config}'])\n"
    )
    launchers = {
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--master-port={free_port()}",
            "--nproc-per-node=2",
        ],
        "lightning": [sys.executable],
    }
    for launcher in launchers.values():
        begin = time.monotonic()
        run = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=120)
        assert run.returncode
        assert "nowhere.txt" in run.stderr
        assert time.monotonic() - begin < 60 + 15  # to start takes some seconds too
