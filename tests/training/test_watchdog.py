"""A process of several that fails, is killed or hangs: the others end, and say which."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import save_tiny
from tests.ranks import free_port

pytestmark = pytest.mark.multi_process

RANK = """
import os, sys, time, types
import torch, torch.distributed as dist
from plprune.training import watchdog as watch
watch.BEAT, watch.SILENCE, watch.GRACE = 0.2, 2.0, 1.0
dist.init_process_group("gloo")
callback, module = watch.Watch(), types.SimpleNamespace()
callback.setup(None, module, "fit")
dist.barrier()
print("ready", flush=True)
behaviour = sys.argv[1]
try:
    if behaviour == "fail":
        raise ValueError("there is no text in\\nnowhere.txt")
    if behaviour == "exhaust":
        torch.empty(10**17)
    if behaviour == "collect":
        dist.all_reduce(torch.ones(1))
    if behaviour == "leave":
        sys.exit(75)
    time.sleep(60)
except BaseException as error:
    callback.on_exception(None, module, error)
    raise
"""


def start(behaviours: list[str]) -> list["subprocess.Popen[str]"]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(behaviours))}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, behaviour],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, behaviour in enumerate(behaviours)
    ]


def outcome(behaviours: list[str], victim: int = 1, number: signal.Signals | None = None) -> tuple[int, str]:
    """How rank 0, or the one that is not the victim, ends."""
    ranks = start(behaviours)
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "ready\n"
        if number is not None:
            ranks[victim].send_signal(number)
        _, said = ranks[1 - victim].communicate(timeout=30)
        return ranks[1 - victim].returncode, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        pytest.param("fail", "there is no text in nowhere.txt; this was rank 0, which stops", marks=pytest.mark.slow),
        pytest.param("exhaust", "allocate memory", marks=pytest.mark.slow),
    ],
)
def test_a_failure_is_told_to_the_others(behaviour: str, reason: str) -> None:
    code, said = outcome(["collect", behaviour])
    assert code == 1
    assert "plprune: error: rank 1 failed: " in said
    assert reason in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_hangs_is_named(number: signal.Signals) -> None:
    code, said = outcome(["collect", "sleep"], number=number)
    assert code == 1
    assert "plprune: error: rank 1 (" in said
    assert "has not answered for" in said


@pytest.mark.slow
def test_the_first_process_keeps_the_store() -> None:
    code, said = outcome(["sleep", "collect"], victim=0, number=signal.SIGKILL)
    assert code == 1
    assert "plprune: error: rank 0, which keeps the store, is dead" in said


@pytest.mark.slow
def test_whoever_leaves_as_asked_is_not_missed() -> None:
    ranks = start(["sleep", "leave"])
    try:
        assert ranks[1].wait(30) == 75
        time.sleep(4)  # twice the silence that is allowed here
        assert ranks[0].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


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
