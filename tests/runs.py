"""`plprune fit` on a tiny model in real processes, which begin in a moment and can be killed in a given phase."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import pty
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from plprune.cli import main
from plprune.pruning.plan import FILE
from plprune.training import checkpointing
from plprune.training.callbacks import export, prune
from tests.builders import numbers, save_tiny

SECONDS = 120
KILLS = int(os.environ.get("PLPRUNE_KILLS", 20))  # of each phase, in the slow tests
STEPS = 24
PHASES: dict[str, tuple[type, str]] = {  # a phase is one call of a method
    "pruning": (prune.Prune, "setup"),
    "training": (checkpointing.Checkpoint, "on_train_start"),
    "checkpoint": (checkpointing.Checkpoint, "_save"),
    "export": (export.Export, "on_train_end"),
}
END = {"loading": "pruning", "training": "export"}  # phases that go on until others begin
# A server that has imported everything forks a process in milliseconds, where an interpreter takes seconds to begin.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.warm", "deepspeed"])


def make_source(folder: Path) -> Path:
    """A model and a text for runs."""
    save_tiny(folder / "model")
    numbers(folder / "text.txt")
    return folder


def new_folder(source: Path, folder: Path, dropout: float = 0.1, **checkpoint: Any) -> Path:
    """A folder with the configuration of a run on the model and text of another."""
    folder.mkdir()
    items: dict[str, dict[str, Any]] = {
        "Export": {"output": "out"},
        "Checkpoint": {"every_n_train_steps": 3} | checkpoint,
        "Prune": {"method": {"class_path": "FLAP", "init_args": {"sparsity": 0.3}}},
    }
    listed = [{"class_path": f"plprune.{name}", "init_args": args} for name, args in items.items()]
    settings = {"accelerator": "cpu", "max_steps": STEPS, "logger": False, "limit_val_batches": 0}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": listed}
    lora = {"rank": 2, "dropout": dropout}  # what is drawn must be drawn again
    config = {
        "trainer": settings,
        "model": {"name_or_path": str(source / "model"), "learning_rate": 5e-3, "lora": lora},
        "data": {"train": str(source / "text.txt"), "seq_len": 16, "batch_size": 4, "num_samples": 4},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    return folder


class Run:
    """`plprune fit` in some processes, started like torchrun does.

    Args:
        folder: Where it runs.
        *args: Further arguments.
        ranks: Number of processes.
        strategy: Options that choose it; DDP if there are none and several processes.
        environment: Further environment variables.
        size: Bytes that a file of a checkpoint can have at most; as if the disk were full.
    """

    def __init__(
        self,
        folder: Path,
        *args: str,
        ranks: int = 1,
        strategy: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        size: int = 0,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.ranks = folder, []
        self.pipes: list[Connection] = []
        for rank in range(ranks):
            own, other = context.Pipe(duplex=False)
            group = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = (group | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}) | (environment or {})
            strategy = strategy or (("--trainer.strategy=ddp",) if ranks > 1 else ())
            command = ["fit", "--config=fit.yaml", f"--trainer.devices={ranks}", *strategy, *args]
            process = context.Process(target=_run, args=(folder, command, variables, size, other), daemon=True)
            process.start()
            other.close()
            self.ranks.append(process)
            self.pipes.append(own)

    def until(self, phase: str) -> bool:
        """Waits until the first process begins a phase; false if it ends, or has ended, before."""
        return any(name == phase for name, _ in iter(self._heard, None))

    def killed_after(self, phase: str, seconds: float, *ranks: int) -> bool:
        """Kills some ranks, or all, a while after a phase has begun; whether that hit the phase."""
        if not self.until(phase):
            return False
        time.sleep(seconds)
        self.kill(*ranks)
        self.kill()  # the others are as good as dead, but it takes them seconds to notice
        after = END.get(phase, f"after {phase}")
        return not self.until(after) and -signal.SIGKILL in [process.exitcode for process in self.ranks]

    def finish(self) -> list[int | None]:
        """Waits for the end; the exit codes."""
        end = time.monotonic() + SECONDS
        for process in self.ranks:
            process.join(max(0.1, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        return codes

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to some ranks, or all."""
        for i, process in enumerate(self.ranks):
            if process.exitcode is None and (i in ranks or not ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
            if not ranks:
                process.join(SECONDS)

    def output(self) -> str:
        """What the processes have printed."""
        return (self.folder / "log").read_text()

    def durations(self) -> dict[str, float]:
        """How long each phase takes in a run to the end."""
        marks = list(iter(self._heard, None))
        assert self.finish() == [0] * len(self.ranks), self.output()
        names, times = zip(*marks, strict=True)
        longest = {}
        for i, name in enumerate(names):
            if name in PHASES or name == "loading":
                end = names.index(END.get(name, f"after {name}"), i)
                longest[name] = times[end] - times[i]
        return longest

    def _heard(self) -> tuple[str, float] | None:
        try:
            return self.pipes[0].recv() if self.pipes[0].poll(SECONDS) else None
        except EOFError:
            return None


def result(folder: Path) -> dict[str, Any]:
    """All that must not depend on whether a run was stopped."""
    losses = (folder / "losses").read_text().splitlines() if (folder / "losses").exists() else [""]
    plans = {path.name: (path / FILE).read_bytes() for path in (folder / "plans").iterdir()}
    out = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    return {"plans": plans, "last loss": losses[-1], "out": out, "hidden": [str(p) for p in folder.rglob(".*")]}


def on_terminal(folder: Path, command: list[str]) -> str:
    """What a command writes to its terminal, in a process of its own."""
    here, there = pty.openpty()
    process = context.Process(target=_on_terminal, args=(folder, command, os.ttyname(there)), daemon=True)
    process.start()
    text, end = b"", time.monotonic() + SECONDS
    while ready := select.select([here, process.sentinel], [], [], max(0.0, end - time.monotonic()))[0]:
        if here not in ready:
            break
        text += os.read(here, 65536)
    process.kill()
    process.join()
    os.close(here)
    os.close(there)
    return text.decode()


def _on_terminal(folder: Path, command: list[str], name: str) -> None:
    os.chdir(folder)
    os.environ.update({"TERM": "xterm", "COLUMNS": "150"})
    terminal = os.open(name, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    main(command)


def _run(folder: Path, command: list[str], environment: dict[str, Any], size: int, pipe: Connection) -> None:
    os.chdir(folder)
    os.environ.update({name: str(value) for name, value in environment.items()})
    rank_zero_only.rank = environment.get("RANK", 0)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(2)
    for phase, (owner, name) in PHASES.items():
        setattr(owner, name, _marked(getattr(owner, name), phase, pipe))
    checkpointing.Checkpoint.on_train_end = _noted(checkpointing.Checkpoint.on_train_end)
    if size:
        checkpointing.Checkpoint._write = _limited(checkpointing.Checkpoint._write, size)
    pipe.send(("loading", time.monotonic()))
    main(command)


def _marked(method: Callable[..., Any], phase: str, pipe: Connection) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        pipe.send((phase, time.monotonic()))
        value = method(*args, **kwargs)
        pipe.send((f"after {phase}", time.monotonic()))
        return value

    return call


def _noted(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(own: Any, trainer: Any, *args: Any) -> Any:
        if trainer.is_global_zero:
            with open("losses", "a") as file:
                print(json.dumps(trainer.callback_metrics["train_loss"].item()), file=file)
        return method(own, trainer, *args)

    return call


def _limited(method: Callable[..., Any], size: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            return method(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return call
