"""With which checkpoint a run goes on, and whether it has ended."""

import json
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint

from plprune.training import lightning_internals, resuming
from plprune.training.checkpoint_files import ANY_COUNT, FINISHED, MANIFEST, end_of, fault, newest, origin
from plprune.training.checkpointing import Checkpoint


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
    if (wrong := fault(Path(path))) is not None:
        raise ValueError(f"{path} is no checkpoint, or damaged ({wrong}): name another by --ckpt_path")
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
    done = ended.get("end", ended | {"max_time": []}) == end_of(trainer)
    if done and run is not None:
        resuming.check(ended.get("run", {}), run)
    return done


def _check_origin(path: Path, trainer: pl.Trainer) -> dict[str, Any]:
    if path.is_dir():
        there = json.loads((path / MANIFEST).read_text())["origin"]
    else:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        there = content.get("callbacks", {}).get(checkpoint_of(trainer).state_key)
    if there is None:
        raise ValueError(f"{path} was not written by plprune.Checkpoint: give it by --ckpt_path")
    here = origin(trainer)
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
