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
import os
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from plprune.io.atomic import clear, remove, resolved, staged
from plprune.io.distributed import local_rank
from plprune.training import lightning_internals, resuming
from plprune.training.deepspeed_internals import COPY_SCRIPT

T = TypeVar("T")


log = logging.getLogger(__name__)

AGAIN = 75  # EX_TEMPFAIL of sysexits.h

PLAIN, FSDP2 = "one process or DDP", "FSDP2"

ANY_COUNT = (PLAIN, FSDP2)  # their checkpoints do not depend on how many processes wrote them

PATTERN = "step=*.ckpt"

OLD, MANIFEST, FINISHED = "old", "manifest.json", "finished.json"


class Preempted(SystemExit):
    """Ends the process with a code that means: start me again."""

    def __init__(self) -> None:
        # If a process that Lightning started ends with another code than 0, Lightning kills the one that started it.
        others = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
        super().__init__(0 if local_rank() and not others else AGAIN)


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
        return resolved(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._run = resuming.asked(trainer, pl_module, getattr(trainer, "datamodule", None))
        self._origin, self._noted, self._owed = _origin(trainer), None, {}
        if trainer.is_global_zero and not is_dry(trainer):
            clear(self.folder(trainer), PATTERN)

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
            _on_sigterm(partial(_leave_now, trainer.strategy.launcher))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning calls this one last, so that all is done that is done at the end."""
        if trainer.is_global_zero and not is_dry(trainer):
            run = getattr(pl_module, "run", self._run)  # it knows what the texts hold
            with staged(self.folder(trainer) / FINISHED, overwrite=True) as file:
                file.write_text(json.dumps({"end": _end(trainer), "run": run}))

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
        _on_sigterm(self._note)
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
        _go(f"{why} after step {self._step} of {self._steps:.0f}")

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
                replaced.enter_context(_replaced(engine.checkpoint_engine, "save", _save_file, faults))
                replaced.enter_context(_replaced(engine, COPY_SCRIPT, getattr(engine, COPY_SCRIPT), faults))
            else:
                replaced.enter_context(_replaced(trainer.strategy.checkpoint_io, "save_checkpoint", _save_file, faults))
            trainer.save_checkpoint(path, weights_only=False)
        if faults:
            raise faults[0]
        if trainer.is_global_zero and path.is_dir():
            sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
            (path / MANIFEST).write_text(json.dumps({"origin": self.state_dict(), "files": sizes}))


@contextlib.contextmanager
def preemptible(launcher: Any = None) -> Iterator[None]:
    """While it lasts, SIGTERM ends the process with exit code 75; in training, `Checkpoint` saves before.

    Args:
        launcher: What has started further processes, which are then told as well.
    """
    before = _on_sigterm(partial(_leave_now, launcher))
    try:
        yield
    finally:
        _on_sigterm(before or signal.SIG_DFL)


def resume_from(trainer: pl.Trainer, run: resuming.Run | None = None) -> Path | None:
    """The checkpoint with which a trainer's run goes on, for `trainer.fit(ckpt_path=...)`; None: from the start.

    Args:
        trainer: The trainer.
        run: What is asked for, as far as it is known by now.

    Raises:
        ValueError: The trainer has no `Checkpoint`, its strategy or number of processes is not the checkpoint's, or it
            is of another run.
    """
    path = newest(checkpoint_of(trainer).folder(trainer))
    if path is not None:
        there = _check_origin(path, trainer)
        if run is not None:  # what texts and models hold is compared when they are there
            later = {name for name, value in run.items() if isinstance(value, dict)} | set(resuming.LENGTH)
            resuming.check(there.get("run", {}), {name: run[name] for name in run if name not in later})
    return path


def named(path: str, trainer: pl.Trainer, train: bool) -> str:
    """A checkpoint that was named, looked at before anything is done.

    Args:
        path: Where it is; `last` is the newest of `Checkpoint`.
        trainer: The trainer.
        train: Whether it is to be trained on.

    Raises:
        ValueError: There is none, it is damaged, or not one of `Recovery`, or holds less than is needed.
    """
    own = [each.folder(trainer) for each in cast(Any, trainer).callbacks if isinstance(each, Checkpoint)]
    if path == "last" and own and (found := newest(own[0])):
        return str(found)
    if path == "last" and not own and not train and not _last_of_lightning(trainer):
        raise ValueError("there is no last checkpoint: name a file, or leave out --ckpt_path for the model as it is")
    if "://" in path or path == "hpc" or Path(path).is_dir() or (path in ("best", "last") and not own):
        return path  # which Lightning knows, or has something to say about
    if not Path(path).exists():
        place = own[0] if own else "checkpoints"
        raise ValueError(f"there is no checkpoint {path}: name a file, like those in {place}")
    if (fault := _fault(Path(path))) is not None:
        raise ValueError(f"{path} is no checkpoint, or damaged ({fault}): name another by --ckpt_path")
    try:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except Exception as error:  # of another project, it may hold anything
        raise ValueError(f"{path} is no checkpoint of plprune: name another by --ckpt_path") from error
    if not isinstance(content, dict) or "plprune" not in content:
        raise ValueError(f"{path} was not written by plprune.Recovery: name another by --ckpt_path")
    if train and "lr_schedulers" not in content:
        raise ValueError(f"{path} holds weights only, which cannot be trained on: name another by --ckpt_path")
    return path


def _last_of_lightning(trainer: pl.Trainer) -> bool:
    """Whether Lightning's own callbacks find a last checkpoint; without one it would only warn, and judge the model."""
    own = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return any(lightning_internals.last_checkpoints(each, trainer) for each in own)


def checkpoint_of(trainer: pl.Trainer) -> Checkpoint:
    """The `Checkpoint` of a trainer.

    Raises:
        ValueError: It has none.
    """
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, Checkpoint):
            return callback
    raise ValueError("there is nothing to resume from: add plprune.Checkpoint to trainer.callbacks")


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a folder; damaged ones are skipped, with a warning."""
    for path in reversed(checkpoints(folder)):
        fault = _fault(path)
        if fault is None:
            return path
        if rank_zero_only.rank == 0:
            log.warning("skipping the checkpoint %s: %s", path, fault)
    return None


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints of a folder by their step, damaged ones too."""
    return sorted(Path(folder).glob(PATTERN), key=step_of)


def set_aside(folder: str | os.PathLike[str], step: int = 0) -> None:
    """Moves checkpoints of later steps out of the way, as a run begins at `step` that they do not belong to."""
    folder = Path(folder)
    (folder / FINISHED).unlink(missing_ok=True)
    later = [path for path in checkpoints(folder) if step_of(path) > step]
    if later:
        shutil.rmtree(folder / OLD, ignore_errors=True)
        (folder / OLD).mkdir()
        for path in later:
            os.replace(path, folder / OLD / path.name)
        log.info("moved %d checkpoints of an earlier run to %s", len(later), folder / OLD)


def begin_anew(trainer: pl.Trainer) -> None:
    """Forgets that a run in a trainer's folder has ended; its checkpoints are moved when training begins."""
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, Checkpoint) and rank_zero_only.rank == 0:
            (callback.folder(trainer) / FINISHED).unlink(missing_ok=True)


def is_finished(trainer: pl.Trainer, run: resuming.Run | None = None) -> bool:
    """Whether a run has ended in a trainer's folder, and was not given more steps or time since.

    Args:
        trainer: The trainer.
        run: What is asked for, as far as it is known by now.

    Raises:
        ValueError: Another run has.
    """
    file = checkpoint_of(trainer).folder(trainer) / FINISHED
    ended = json.loads(file.read_text()) if file.exists() else {}
    done = ended.get("end", ended | {"max_time": []}) == _end(trainer)
    if done and run is not None:
        resuming.check(ended.get("run", {}), run)
    return done


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


def _end(trainer: pl.Trainer) -> dict[str, Any]:
    times = [lightning_internals.limit_of(each) for each in cast(Any, trainer).callbacks if isinstance(each, Timer)]
    return resuming.length(trainer) | {"max_time": times}


def is_dry(trainer: pl.Trainer) -> bool:
    """Whether a run is a rehearsal, which leaves what is there as it is."""
    return bool(getattr(trainer, "fast_dev_run", False))


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written, by its name; -1 if that is none of ours."""
    digits = path.name[len("step=") : -len(".ckpt")]
    return int(digits) if digits.isdecimal() else -1


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is; every byte is read."""
    files = [path]
    try:
        if path.is_dir():
            sizes = json.loads((path / MANIFEST).read_text())["files"]
            for name, size in sizes.items():
                if (path / name).stat().st_size != size:
                    return f"{name} is truncated"
            files = [path / name for name in sizes if name.endswith(".pt")]
        for file in files:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return f"{file.name} is corrupted"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Exception as error:  # there is no end to what a damaged archive may raise
        return f"it is truncated or corrupted ({error})"
    return None


def _origin(trainer: pl.Trainer) -> dict[str, Any]:
    """What a checkpoint must be resumed with."""
    return {"processes": trainer.num_nodes * trainer.num_devices, "strategy": _kind(trainer.strategy)}


def _kind(strategy: Strategy) -> str:
    if isinstance(strategy, DeepSpeedStrategy):
        stage = cast(Any, strategy.config).get("zero_optimization", {}).get("stage", 0)
        return f"DeepSpeed ZeRO-{stage}"
    if isinstance(strategy, ModelParallelStrategy):
        return FSDP2
    return PLAIN if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) else type(strategy).__name__


def _check_origin(path: Path, trainer: pl.Trainer) -> dict[str, Any]:
    if path.is_dir():
        there = json.loads((path / MANIFEST).read_text())["origin"]
    else:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        there = content.get("callbacks", {}).get(checkpoint_of(trainer).state_key)
    if there is None:
        raise ValueError(f"{path} was not written by plprune.Checkpoint: give it by --ckpt_path")
    here = _origin(trainer)
    if there["strategy"] != here["strategy"]:
        raise ValueError(
            f"{path} was written under {there['strategy']}, and cannot go on under {here['strategy']}, which keeps "
            "its states differently: use the same strategy, or start without --resume"
        )
    if there["processes"] != here["processes"] and there["strategy"] not in ANY_COUNT:
        raise ValueError(
            f"{path} was written by {there['processes']} processes under {there['strategy']}, and cannot go on with "
            f"{here['processes']}, as each has a part of the states: use as many, or start without --resume"
        )
    return there


def _save_file(state_dict: Any, path: Path, **_: Any) -> None:
    try:
        with open(path, "wb") as file:  # given a name, torch does not know why it failed
            torch.save(state_dict, file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.truncate(path, 0)
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


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


def _on_sigterm(handler: Any) -> Any:
    """Sets what is done at SIGTERM, and gives back what was done before; only the main thread can."""
    main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if main else None


def _leave_now(launcher: Any, number: int, _: Any) -> NoReturn:
    _on_sigterm(signal.SIG_IGN)
    if launcher is not None:
        launcher.kill(number)
    _go(signal.Signals(number).name)


def _go(why: str) -> NoReturn:
    if rank_zero_only.rank == 0:
        log.warning("%s: stopped; start the same command again, with --resume, to go on (exit code %d)", why, AGAIN)
    raise Preempted
