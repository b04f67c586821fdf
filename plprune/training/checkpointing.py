"""The callback that writes checkpoints, and ends a run in good order when its process must stop.

Lightning's `ModelCheckpoint` assembles a file in /tmp, lets DeepSpeed write under the final name, and stops training
when the disk is full. On SIGTERM, Lightning broadcasts within the signal handler, while other ranks may be in another
collective operation, and exits with code 0. Here the handler only records the signal, and all ranks decide together
after each step.

The last checkpoint is written before the last step: Lightning calls no `on_train_end` when there is nothing left to
train, so a run that was killed during its export would otherwise not export when resumed.
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
from plprune.training import lightning_internals
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
from plprune.training.preemption import leave, leave_on_signal, on_sigterm
from plprune.training.run_identity import Run, identify

log = logging.getLogger(__name__)
T = TypeVar("T")


class Checkpoint(LightningCheckpoint):
    """Writes complete checkpoints, and stops a run on request so that it can be resumed exactly.

    On SIGTERM, on SLURM's requeue signal and after `max_hours`, the current step is finished, a checkpoint is written,
    and the process ends with exit code 75, without export or evaluation. A run that ends by its steps, by
    `EarlyStopping` or by `max_time` is finished: it is resumed only with more steps or time. If a checkpoint cannot be
    written, for example because the disk is full, there is a warning, earlier checkpoints stay, training continues,
    and the next one is tried when it is due. A dry run (`fast_dev_run`) writes, moves and removes nothing.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints.
        keep: The number of checkpoints to keep.
        dirpath: The folder to write to; if not given, `checkpoints` in the trainer's `default_root_dir`.
        max_hours: The time, with loading and pruning, after which the run ends with exit code 75 so that it can be
            started again; if not given, there is no limit.
    """

    def __init__(
        self, every_n_train_steps: int = 100, keep: int = 2, dirpath: str | None = None, max_hours: float | None = None
    ) -> None:
        self.best_model_path = ""  # Lightning reads it; checkpoints are not compared here
        for name, value in {"every_n_train_steps": every_n_train_steps, "keep": keep, "max_hours": max_hours}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, but must be above 0")
        self.every_n_train_steps, self.keep, self.dirpath = every_n_train_steps, keep, dirpath
        self.max_hours, self._since = max_hours, time.monotonic()
        self._origin: dict[str, Any] = {}
        self._run: Run = {}
        self._step, self._steps = 0, 0.0
        self._pending: dict[str, Any] = {}  # what Lightning does after the checkpoint's step
        self._signal: int | None = None  # received in training
        self._requeue: tuple[int, Any] | None = None  # SLURM's signal, and Lightning's handler of it

    def folder(self, trainer: pl.Trainer) -> Path:
        """The folder of a trainer's checkpoints."""
        return resolve_path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._run = identify(trainer, pl_module, getattr(trainer, "datamodule", None))
        self._origin, self._signal, self._pending = origin(trainer), None, {}
        if trainer.is_global_zero and not is_dry(trainer):
            remove_leftovers(self.folder(trainer), PATTERN)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces the handler that Lightning sets next; collective operations follow without another hook."""
        lightning_internals.on_sigterm(trainer, self._note)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen(trainer)
        self._step, self._steps = trainer.global_step, trainer.estimated_stepping_batches
        if trainer.is_global_zero and not is_dry(trainer):
            set_aside(self.folder(trainer), self._step)
        if self._pending:
            _catch_up(trainer, **self._pending)
        self._pending = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        left = self._steps - self._step
        late = self.max_hours is not None and time.monotonic() - self._since > 3600 * self.max_hours
        # There is no time limit for the last step, or a run that takes longer to begin would never reach its export.
        stop = trainer.strategy.reduce_boolean_decision(self._signal is not None or (late and left >= 1), all=False)
        due = stop or left == 1 or self._step % self.every_n_train_steps == 0
        if left >= 1 and due and not is_dry(trainer):
            self._pending = _due_after_step(trainer)
            self._save(trainer)
            self._pending = {}
        if stop:
            self._leave(trainer)
        if left < 1:
            on_sigterm(partial(leave_on_signal, trainer.strategy.launcher))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Marks the run as finished; Lightning calls this hook last."""
        if trainer.is_global_zero and not is_dry(trainer):
            run = getattr(pl_module, "run", self._run)  # the module knows the content of the texts
            with staged(self.folder(trainer) / FINISHED, overwrite=True) as file:
                file.write_text(json.dumps({"end": end_of(trainer), "run": run}))

    def state_dict(self) -> dict[str, Any]:
        return self._origin | {"run": self._run, "owed": self._pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict.get("owed", {})

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts the finished batches of the epoch anew, as more processes take fewer and larger ones."""
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
        self._signal = number

    def _leave(self, trainer: pl.Trainer) -> NoReturn:
        if self._requeue is not None:  # the same in all processes
            number, requeue = self._requeue
            if trainer.strategy.reduce_boolean_decision(self._signal == number, all=False):
                requeue(number, None)
        reason = signal.Signals(self._signal).name if self._signal else "the time limit, or a signal to another process"
        leave(f"{reason} after step {self._step} of {self._steps:.0f}")

    def _save(self, trainer: pl.Trainer) -> None:
        """Writes a checkpoint and removes the oldest ones; all processes together."""
        path = self.folder(trainer) / f"step={self._step:06d}.ckpt"
        try:
            with contextlib.ExitStack() as stack:
                begin = partial(stack.enter_context, staged(path, overwrite=True)) if trainer.is_global_zero else Path
                temporary = trainer.strategy.broadcast(_together(trainer, begin))
                _together(trainer, partial(self._write, trainer, temporary))
                _together(trainer, stack.close)
        except OSError as error:
            if trainer.is_global_zero:
                log.warning("%s; training goes on, and the checkpoints before this one stay", error)
            return
        if trainer.is_global_zero:
            for old in checkpoints(path.parent)[: -self.keep]:
                remove(old)

    def _write(self, trainer: pl.Trainer, path: Path) -> None:
        """Lets the strategy write, and raises errors only after the collective operations around the writing."""
        faults: list[Exception] = []
        with contextlib.ExitStack() as stack:
            if isinstance(trainer.strategy, DeepSpeedStrategy):
                engine: Any = trainer.strategy.deepspeed_engine
                stack.enter_context(_replaced(engine.checkpoint_engine, "save", save_file, faults))
                stack.enter_context(_replaced(engine, COPY_SCRIPT, getattr(engine, COPY_SCRIPT), faults))
            else:
                stack.enter_context(_replaced(trainer.strategy.checkpoint_io, "save_checkpoint", save_file, faults))
            trainer.save_checkpoint(path, weights_only=False)
        if faults:
            raise faults[0]
        if trainer.is_global_zero and path.is_dir():
            sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
            (path / MANIFEST).write_text(json.dumps({"origin": self.state_dict(), "files": sizes}))


def _due_after_step(trainer: pl.Trainer) -> dict[str, Any]:
    """What Lightning does after this step, and would skip when resuming from a checkpoint of it."""
    due: dict[str, Any] = {**lightning_internals.due_after_step(trainer)}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return due | {"metrics": metrics} if any(due.values()) else {}


def _catch_up(trainer: pl.Trainer, validation: bool, epoch: bool, metrics: dict[str, float]) -> None:
    """Does what :func:`_due_after_step` returned."""
    lightning_internals.set_metrics(trainer, {name: torch.tensor(value) for name, value in metrics.items()})
    if validation:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
    if epoch:
        lightning_internals.end_epoch_for_monitors(trainer)


def is_dry(trainer: pl.Trainer) -> bool:
    """Whether a run is a dry run (`fast_dev_run`), which must leave existing files alone."""
    return bool(getattr(trainer, "fast_dev_run", False))


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., None], faults: list[Exception]) -> Iterator[None]:
    """Replaces a method of an object within the context, and collects its errors in `faults`."""

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
    """Runs `work` in all processes.

    Raises:
        OSError: It failed in this process or in another.
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
