"""Whatever ends a run, it goes on as if nothing had happened: real processes, real signals."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plprune.training.checkpoint_files import checkpoints
from plprune.training.preemption import AGAIN
from tests.runs import KILLS, SECONDS, Run, make_source, new_folder, result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, float]]:
    """What one process makes if nothing happens, and how long its phases take."""
    return uninterrupted(source, tmp_path_factory.mktemp("whole"), 1)


@pytest.fixture(scope="module")
def whole_of_two(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, float]]:
    """Likewise, of two processes."""
    return uninterrupted(source, tmp_path_factory.mktemp("whole of two"), 2)


@pytest.fixture
def moments() -> random.Random:
    seed = int(os.environ.get("PLPRUNE_SEED", time.time_ns() % 10**6))
    print(f"PLPRUNE_SEED={seed}")
    return random.Random(seed)


def uninterrupted(source: Path, folder: Path, ranks: int) -> tuple[dict[str, Any], dict[str, float]]:
    run = Run(new_folder(source, folder / "run"), ranks=ranks)
    durations = run.durations()
    return result(run.folder), durations


def finished(folder: Path, ranks: int = 1) -> dict[str, Any]:
    """The result of a run that is started again with `--resume`, and ends."""
    run = Run(folder, "--resume", ranks=ranks)
    assert run.finish() == [0] * ranks, run.output()
    return result(folder)


def killed(folder: Path, phase: str, durations: dict[str, float], moments: random.Random, ranks: int = 1) -> bool:
    """Whether a kill at a drawn moment hit a phase of the run that was started, or started again."""
    run = Run(folder, "--resume", ranks=ranks)
    for _ in range(moments.randrange(3) if phase == "checkpoint" else 0):
        run.until(phase)
    return run.killed_after(phase, moments.random() * durations[phase], moments.randrange(ranks))


def test_a_run_that_is_killed_in_every_phase_ends_as_if_it_had_not_been(
    source: Path, whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path, moments: random.Random
) -> None:
    expected, durations = whole
    folder = new_folder(source, tmp_path / "run")
    for phase in ("pruning", "checkpoint", "export"):
        killed(folder, phase, durations, moments)
    assert finished(folder) == expected


PHASES = ["loading", "pruning", "training", "checkpoint", "export"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_kills_at_any_moment_change_nothing(
    source: Path, whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path, moments: random.Random, phase: str
) -> None:
    kill_often(source, whole, tmp_path, moments, [phase], 1)


@pytest.mark.slow
@pytest.mark.multi_process
def test_kills_of_one_of_two_ranks_change_nothing(
    source: Path, whole_of_two: tuple[dict[str, Any], dict[str, float]], tmp_path: Path, moments: random.Random
) -> None:
    kill_often(source, whole_of_two, tmp_path, moments, PHASES, 2)


def kill_often(
    source: Path,
    whole: tuple[dict[str, Any], dict[str, float]],
    root: Path,
    moments: random.Random,
    phases: list[str],
    ranks: int,
) -> None:
    """Kills runs in drawn phases at drawn moments, five times each before it may end, until enough kills have hit."""
    (expected, durations), hits, folders = whole, 0, 0
    while hits < KILLS:
        folders += 1
        assert folders <= 2 * KILLS, "too few kills hit"  # as other processes make phases shorter and longer
        folder = new_folder(source, root / str(folders))
        hits += sum(killed(folder, moments.choice(phases), durations, moments, ranks) for _ in range(5))
        assert finished(folder, ranks) == expected
        shutil.rmtree(folder)


# ---- asked to stop


@pytest.mark.parametrize("phase", ["after training", pytest.param("pruning", marks=pytest.mark.slow)])
def test_sigterm_stops_a_run_that_then_goes_on(
    source: Path, whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path, phase: str
) -> None:
    run = Run(new_folder(source, tmp_path / "run", every_n_train_steps=1000))
    run.until(phase)
    run.kill(0, number=signal.SIGTERM)
    assert run.finish() == [AGAIN]
    assert len(checkpoints(run.folder / "checkpoints")) == (phase == "after training")
    assert not (run.folder / "out").exists()
    (line,) = [line for line in run.output().splitlines() if "SIGTERM" in line]
    assert line.endswith("start the same command again with --resume to continue (exit code 75)")
    assert finished(run.folder) == whole[0]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("told", [0, 1])
@pytest.mark.parametrize("phase", ["pruning", "after training"])
def test_sigterm_to_one_of_two_ranks_stops_both(
    source: Path, whole_of_two: tuple[dict[str, Any], dict[str, float]], tmp_path: Path, phase: str, told: int
) -> None:
    expected, _ = whole_of_two
    run = Run(new_folder(source, tmp_path / "run"), ranks=2)
    run.until(phase)
    run.kill(told, number=signal.SIGTERM)
    begin = time.monotonic()
    codes = run.finish()
    if phase == "after training":  # 0 for those that Lightning may have started, as it would kill the others
        assert codes == [AGAIN, 0], run.output()
        assert time.monotonic() - begin < 10
    assert 0 not in codes[:1]
    assert finished(run.folder, ranks=2) == expected


@pytest.mark.slow
def test_a_run_stops_at_its_time_limit_after_a_step_at_least(
    source: Path, whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path
) -> None:
    folder = new_folder(source, tmp_path / "run", max_hours=1e-9)
    for step in (1, 2):
        assert Run(folder, "--resume").finish() == [AGAIN]
        assert checkpoints(folder / "checkpoints")[-1].name == f"step={step:06d}.ckpt"
    new_folder(source, tmp_path / "unlimited")
    shutil.copy(tmp_path / "unlimited" / "fit.yaml", folder)
    assert finished(folder) == whole[0]


@pytest.mark.slow
def test_slurm_requeues_a_run_that_then_goes_on(
    source: Path, whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path
) -> None:
    folder = new_folder(source, tmp_path / "run")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/called\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NODELIST": "localhost"}
    run = Run(folder, "--resume", environment=environment)
    run.until("checkpoint")
    run.kill(0, number=signal.SIGUSR1)
    assert run.finish() == [AGAIN], run.output()
    assert (tmp_path / "called").read_text() == "requeue 7\n"
    again = Run(folder, "--resume", environment=environment)
    assert again.finish() == [0]
    assert result(folder) == whole[0]


# ---- started by others


CPU = "plprune.training.strategies.CPUDeepSpeed"
STRATEGIES = {
    "DDP": ("--trainer.strategy=ddp",),
    "ZeRO-1": (f"--trainer.strategy={CPU}", "--trainer.strategy.stage=1"),
    "ZeRO-2": (f"--trainer.strategy={CPU}", "--trainer.strategy.stage=2"),
    "ZeRO-3": (f"--trainer.strategy={CPU}", "--trainer.strategy.stage=3"),
    "FSDP2": ("--trainer.strategy=plprune.training.strategies.FSDP2", "--trainer.strategy.process_group_backend=gloo"),
}


def command(*arguments: str, by: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *by, "-m", "plprune", "fit", "--config=fit.yaml", "--trainer.strategy=ddp", *arguments]


def wait_for(what: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """The first value that is something."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return [int(each) for each in listed.stdout.split()]


@pytest.mark.slow
@pytest.mark.multi_process
def test_torchrun_starts_a_run_again_when_a_rank_is_killed(
    source: Path, whole_of_two: tuple[dict[str, Any], dict[str, float]], tmp_path: Path
) -> None:
    expected, _ = whole_of_two
    folder = new_folder(source, tmp_path / "run")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    words = command("--trainer.devices=2", "--trainer.max_steps=24", "--resume", by=torchrun)
    # Else a restarted rank may find the addresses of killed ones: https://github.com/pytorch/pytorch/issues/135712
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: checkpoints(folder / "checkpoints"))
        os.kill(children(process.pid)[1], signal.SIGKILL)
        _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert "Restored all states" in said
    assert result(folder) == {**expected, "last loss": ""}


@pytest.mark.slow
@pytest.mark.multi_process
def test_ranks_that_lightning_started_stop_with_the_first(source: Path, tmp_path: Path) -> None:
    folder = new_folder(source, tmp_path / "run")
    words = command("--trainer.devices=2", "--trainer.max_steps=100000")
    with subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: checkpoints(folder / "checkpoints"))
            ranks = children(process.pid)
        finally:  # else a failure would wait for the last step
            process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == AGAIN, said
    assert said.count("exit code 75") == 1
    assert ranks
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 10)


# ---- faults of the disk


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.multi_process])])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    source: Path, whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path, ranks: int
) -> None:
    folder = new_folder(source, tmp_path / "run")
    run = Run(folder, ranks=ranks)
    assert run.until("after checkpoint")
    run.kill()
    before = checkpoints(folder / "checkpoints")
    full = Run(folder, "--resume", ranks=ranks, size=1000)
    assert full.finish() == [0] * ranks
    warnings = [line for line in full.output().splitlines() if line.startswith("cannot write ")]
    assert len(warnings) > 5
    assert all("File too large" in line and "training goes on" in line for line in warnings)
    assert checkpoints(folder / "checkpoints") == before
    if ranks == 1:
        assert result(folder) == whole[0]


@pytest.mark.parametrize("fault", ["truncated", pytest.param("corrupted", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_skipped_and_named(
    source: Path, whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path, fault: str
) -> None:
    folder = new_folder(source, tmp_path / "run")
    run = Run(folder)
    for _ in range(3):
        run.until("after checkpoint")
    run.kill()
    older, newest = checkpoints(folder / "checkpoints")[-2:]
    content = newest.read_bytes()
    middle, many = len(content) // 2, 256  # between two tensors there are up to 63 bytes that mean nothing
    newest.write_bytes(content[:middle] + (b"" if fault == "truncated" else b"?" * many + content[middle + many :]))
    again = Run(folder, "--resume")
    assert again.finish() == [0]
    said = again.output()
    assert f"skipping the checkpoint {newest}: " in said
    assert f"Restored all states from the checkpoint at {older}" in said
    assert result(folder) == whole[0]


# ---- another number of processes


@pytest.mark.multi_process
@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(source: Path, tmp_path: Path, before: int, after: int) -> None:
    end_alike(source, tmp_path, before, after)


def end_alike(source: Path, tmp_path: Path, before: int, after: int, strategy: tuple[str, ...] = ()) -> None:
    """At the same global batch a run ends as one process would have; dropout is off, as each process draws its own."""
    whole = Run(new_folder(source, tmp_path / "whole", dropout=0.0))
    assert whole.finish() == [0]
    batch = f"--data.batch_size={4 // before}"
    run = Run(new_folder(source, tmp_path / "run", dropout=0.0), batch, ranks=before, strategy=strategy)
    for _ in range(5):
        run.until("after checkpoint")
    run.kill()
    again = Run(run.folder, "--resume", f"--data.batch_size={4 // after}", ranks=after, strategy=strategy)
    assert again.finish() == [0] * after, again.output()
    assert "Restored all states" in again.output()
    ends = [load_file(folder / "out" / "model.safetensors") for folder in (whole.folder, run.folder)]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


# ---- the strategies that share the states

REFUSED = {"ZeRO-2": ["DDP", "ZeRO-1"], "ZeRO-3": ["FSDP2"], "FSDP2": ["ZeRO-2"]}  # what goes on with none of theirs


@pytest.fixture(params=["ZeRO-2", "ZeRO-3", "FSDP2"])
def shared_states(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> tuple[str, Path, dict[str, Any]]:
    """A strategy, the folder of a run under it that was stopped, and what the run gives when it is not."""
    strategy = STRATEGIES[request.param]
    whole = Run(new_folder(source, tmp_path / "whole"), ranks=2, strategy=strategy)
    assert whole.finish() == [0, 0], whole.output()
    run = Run(new_folder(source, tmp_path / "run"), ranks=2, strategy=strategy)
    for _ in range(3):
        run.until("after checkpoint")
    run.kill(0, number=signal.SIGTERM)
    assert run.finish() == [AGAIN, 0], run.output()
    return request.param, run.folder, result(whole.folder)


@pytest.mark.slow
@pytest.mark.multi_process
def test_what_each_strategy_goes_on_with(
    shared_states: tuple[str, Path, dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    name, folder, expected = shared_states
    saved = checkpoints(folder / "checkpoints")
    for other in REFUSED[name]:
        refused = Run(folder, "--resume", ranks=2, strategy=STRATEGIES[other])
        assert refused.finish() == [1, 1]
        assert "stores its states differently" in refused.output().splitlines()[-1]
    if name == "ZeRO-3":  # another number of processes
        refused = Run(folder, "--resume", ranks=1, strategy=STRATEGIES[name])
        assert refused.finish() == [1]
        assert refused.output().splitlines()[-1].endswith("use as many, or start without --resume")
    full = Run(folder, "--resume", ranks=2, strategy=STRATEGIES[name], size=3000)
    assert full.finish() == [0, 0], full.output()
    assert full.output().count("training goes on") > 3
    assert checkpoints(folder / "checkpoints") == saved
    assert result(folder) == expected


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_fsdp2_goes_on_with_another_number_of_processes(source: Path, tmp_path: Path, before: int, after: int) -> None:
    end_alike(source, tmp_path, before, after, STRATEGIES["FSDP2"])
