"""Checkpoints that outlive whatever ends a run: only complete ones, found again, and written before a run has to go.

Lightning's `ModelCheckpoint` collects a file in /tmp, has DeepSpeed write under the final name, and stops at a full
disk; its answer to SIGTERM is a broadcast from within the signal handler, where other ranks may be in another
collective, and code 0. Here the handler only takes a note, and all ranks look at their notes together after each step.

The last checkpoint is the one before the last step: Lightning calls no `on_train_end` if there is nothing left to
train, and a run that was killed while it exported must come there again.
"""

import contextlib
import errno
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from plprune.io.atomic import remove, remove_leftovers, resolve_path, staged
from plprune.training import lightning_internals, resuming
from plprune.training.checkpoint_files import (
    FINISHED,
    MANIFEST,
    PATTERN,
    checkpoints,
    end_of,
    origin,
    save_file,
    set_aside,
)
from plprune.training.deepspeed_internals import COPY_SCRIPT
from plprune.training.preemption import go, leave_now, on_sigterm

log = logging.getLogger(__name__)
T = TypeVar("T")


class Checkpoint(LightningCheckpoint):
    """Writes checkpoints that are complete or not there, and ends a run that has to go so that it can go on exactly.

    A checkpoint that cannot be written, for want of space for example, is a warning: those before it stay, training
    goes on, and the next is tried when it is due. At SIGTERM, at SLURM's signal to requeue and after `max_hours` the
    step is finished, a checkpoint is written, and the process ends with exit code 75, without export or evaluation.
    A run whose training ends otherwise, by its steps, `EarlyStopping` or `max_time`, is finished, and is not gone on
    with unless it is given more of these. A dry run (`fast_dev_run`) writes, moves and removes nothing.

    Args:
        every_n_train_steps: Steps of the optimizer from one checkpoint to the next.
        keep: How many are kept.
        dirpath: Folder to write them to; `checkpoints` in the trainer's `default_root_dir` if not given.
        max_hours: How long the run may take, loading and pruning included, before it ends with exit code 75 so that
            it can be started again; no limit if not given.
    """

    def __init__(
        self,
        every_n_train_steps: int = 100,
        keep: int = 2,
        dirpath: str | None = None,
        max_hours: float | None = None,
    ) -> None:
        self.best_model_path = ""  # Lightning asks for it: nothing is judged here
        for name, value in {"every_n_train_steps": every_n_train_steps, "keep": keep, "max_hours": max_hours}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, but must be above 0")
        self.every_n_train_steps, self.keep, self.dirpath = every_n_train_steps, keep, dirpath
        self.max_hours, self._since = max_hours, time.monotonic()
        self._origin: dict[str, Any] = {}
        self._run: resuming.Run = {}
        self._step, self._steps = 0, 0.0
        self._owed: dict[str, Any] = {}  # what comes after a step, and after the checkpoint of it
        self._noted: int | None = None  # the signal that came in training
        self._requeue: tuple[int, Any] | None = None  # SLURM's signal, and what Lightning does at it

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where a trainer's checkpoints are."""
        return resolve_path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._run = resuming.asked(trainer, pl_module, getattr(trainer, "datamodule", None))
        self._origin, self._noted, self._owed = origin(trainer), None, {}
        if trainer.is_global_zero and not is_dry(trainer):
            remove_leftovers(self.folder(trainer), PATTERN)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning sets its own handler next, and there is no hook between that and further collective operations."""
        lightning_internals.on_sigterm(trainer, self._note)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)
        self._step, self._steps = trainer.global_step, trainer.estimated_stepping_batches
        if trainer.is_global_zero and not is_dry(trainer):
            set_aside(self.folder(trainer), self._step)
        if self._owed:
            _catch_up(trainer, **self._owed)
        self._owed = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        left = self._steps - self._step
        late = self.max_hours is not None and time.monotonic() - self._since > 3600 * self.max_hours
        # At the end it is never too late: a run that takes longer to begin than it may would not come to its export.
        stop = trainer.strategy.reduce_boolean_decision(self._noted is not None or (late and left >= 1), all=False)
        due = stop or left == 1 or self._step % self.every_n_train_steps == 0
        if left >= 1 and due and not is_dry(trainer):
            self._owed = _owed(trainer)
            self._save(trainer)
            self._owed = {}
        if stop:
            self._leave(trainer)
        if left < 1:
            on_sigterm(partial(leave_now, trainer.strategy.launcher))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning calls this one last, so that all is done that is done at the end."""
        if trainer.is_global_zero and not is_dry(trainer):
            run = getattr(pl_module, "run", self._run)  # it knows what the texts hold
            with staged(self.folder(trainer) / FINISHED, overwrite=True) as file:
                file.write_text(json.dumps({"end": end_of(trainer), "run": run}))

    def state_dict(self) -> dict[str, Any]:
        return self._origin | {"run": self._run, "owed": self._owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._owed = state_dict.get("owed", {})

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts the finished batches of the epoch anew: with more processes, they are fewer and larger."""
        count = getattr(getattr(trainer, "datamodule", None), "batches_done", None)
        if count is not None and trainer.training:
            current = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            more = count() - current["ready"]
            current.update({name: value + more for name, value in current.items()})

    def _listen(self, trainer: pl.Trainer) -> None:
        on_sigterm(self._note)
        if threading.current_thread() is not threading.main_thread():
            return
        environment = lightning_internals.cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and self._requeue is None:
            number = environment.requeue_signal or signal.SIGUSR1
            self._requeue = number, signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        self._noted = number

    def _leave(self, trainer: pl.Trainer) -> NoReturn:
        if self._requeue is not None:  # in all processes or none
            number, requeue = self._requeue
            if trainer.strategy.reduce_boolean_decision(self._noted == number, all=False):
                requeue(number, None)
        why = signal.Signals(self._noted).name if self._noted else "the time limit, or a signal to another process"
        go(f"{why} after step {self._step} of {self._steps:.0f}")

    def _save(self, trainer: pl.Trainer) -> None:
        """Writes a checkpoint and removes those that are too many; all processes together."""
        path = self.folder(trainer) / f"step={self._step:06d}.ckpt"
        try:
            with contextlib.ExitStack() as place:
                begin = partial(place.enter_context, staged(path, overwrite=True)) if trainer.is_global_zero else Path
                temporary = trainer.strategy.broadcast(_together(trainer, begin))
                _together(trainer, partial(self._write, trainer, temporary))
                _together(trainer, place.close)
        except OSError as error:
            if trainer.is_global_zero:
                log.warning("%s; training goes on, and the checkpoints before this one stay", error)
            return
        if trainer.is_global_zero:
            for old in checkpoints(path.parent)[: -self.keep]:
                remove(old)

    def _write(self, trainer: pl.Trainer, path: Path) -> None:
        """Has the strategy write, with failures kept until the collective operations around the writing are over."""
        faults: list[Exception] = []
        with contextlib.ExitStack() as replaced:
            if isinstance(trainer.strategy, DeepSpeedStrategy):
                engine: Any = trainer.strategy.deepspeed_engine
                replaced.enter_context(_replaced(engine.checkpoint_engine, "save", save_file, faults))
                replaced.enter_context(_replaced(engine, COPY_SCRIPT, getattr(engine, COPY_SCRIPT), faults))
            else:
                replaced.enter_context(_replaced(trainer.strategy.checkpoint_io, "save_checkpoint", save_file, faults))
            trainer.save_checkpoint(path, weights_only=False)
        if faults:
            raise faults[0]
        if trainer.is_global_zero and path.is_dir():
            sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
            (path / MANIFEST).write_text(json.dumps({"origin": self.state_dict(), "files": sizes}))


def _owed(trainer: pl.Trainer) -> dict[str, Any]:
    """What Lightning does after a step, but not when a run goes on from a checkpoint of it."""
    owed: dict[str, Any] = {**lightning_internals.due_after_step(trainer)}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return owed | {"metrics": metrics} if any(owed.values()) else {}


def _catch_up(trainer: pl.Trainer, validation: bool, epoch: bool, metrics: dict[str, float]) -> None:
    lightning_internals.set_metrics(trainer, {name: torch.tensor(value) for name, value in metrics.items()})
    if validation:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
    if epoch:
        lightning_internals.end_epoch_for_monitors(trainer)


def is_dry(trainer: pl.Trainer) -> bool:
    """Whether a run is a rehearsal, which leaves what is there as it is."""
    return bool(getattr(trainer, "fast_dev_run", False))


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., None], faults: list[Exception]) -> Iterator[None]:
    """While it lasts, an object's method is another, whose failures are collected."""

    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            faults.append(error)

    setattr(owner, name, attempt)
    try:
        yield
    finally:
        delattr(owner, name)


def _together(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """What `work` gives, once it went well in all processes.

    Raises:
        OSError: It failed in this one or another.
    """
    result, fault = None, None
    try:
        result = work()
    except (OSError, RuntimeError) as error:
        fault = error
        if not trainer.is_global_zero:
            log.warning("rank %d cannot write a checkpoint: %s", trainer.global_rank, error)
    if trainer.strategy.reduce_boolean_decision(fault is not None, all=False):
        code = getattr(fault, "errno", None) or errno.EIO
        reason = getattr(fault, "strerror", None) or fault or "another process failed"
        raise OSError(code, " ".join(str(reason).split())) from fault
    return cast(T, result)
