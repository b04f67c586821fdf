"""Finds the checkpoint from which a run continues, and tells whether the run has finished."""

import json
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint

from plprune.training import lightning_internals
from plprune.training.checkpoint_files import ANY_COUNT, FINISHED, MANIFEST, end_of, fault, newest, origin
from plprune.training.checkpointing import Checkpoint
from plprune.training.run_identity import LENGTH, Run, check_same_run, check_written_by_recovery


def checkpoint_to_resume(trainer: pl.Trainer, run: Run | None = None) -> Path | None:
    """Finds the checkpoint from which a run continues, for `trainer.fit(ckpt_path=...)`.

    Args:
        trainer: The trainer.
        run: The run, as far as it is known before texts and models are loaded.

    Returns:
        The newest complete checkpoint; None if there is none, and the run begins at the start.

    Raises:
        ValueError: The trainer has no `Checkpoint`, or the checkpoint belongs to another run, strategy or number of
            processes.
    """
    path = newest(_checkpoint_callback(trainer).folder(trainer))
    if path is not None:
        saved = _check_origin(path, trainer)
        if run is not None:
            known = {k: v for k, v in run.items() if not isinstance(v, dict) and k not in LENGTH}
            check_same_run(saved.get("run", {}), known)
    return path


def resolve_checkpoint(path: str, trainer: pl.Trainer, training: bool) -> str:
    """Checks the checkpoint that a user has named before any work is done.

    Args:
        path: Its path; `last` is the newest checkpoint of the trainer's `Checkpoint`.
        trainer: The trainer.
        training: Whether it is trained further.

    Returns:
        The path that Lightning is given.

    Raises:
        ValueError: The checkpoint is missing or damaged, was not written by `Recovery`, or lacks what training needs.
    """
    callback = _find_checkpoint_callback(trainer)
    folder = callback and callback.folder(trainer)
    if path == "last" and folder and (found := newest(folder)):
        return str(found)
    if path == "last" and not folder and not training and not _lightning_finds_last(trainer):
        raise ValueError("there is no last checkpoint: name a file, or leave out --ckpt_path for the model as it is")
    if "://" in path or path == "hpc" or Path(path).is_dir() or (path in ("best", "last") and not folder):
        return path  # Lightning resolves these, or reports what is wrong
    if not Path(path).exists():
        raise ValueError(f"there is no checkpoint {path}: name a file, like those in {folder or 'checkpoints'}")
    if (wrong := fault(Path(path))) is not None:
        raise ValueError(f"{path} is no checkpoint, or is damaged ({wrong}): give another one with --ckpt_path")
    try:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another project may hold anything
        raise ValueError(f"{path} is no checkpoint of plprune: give another one with --ckpt_path") from error
    check_written_by_recovery(content, training, path)
    return path


def unmark_finished(trainer: pl.Trainer) -> None:
    """Removes the mark that a run has finished in a trainer's folder, as a new run begins there."""
    callback = _find_checkpoint_callback(trainer)
    if callback is not None and rank_zero_only.rank == 0:
        (callback.folder(trainer) / FINISHED).unlink(missing_ok=True)


def is_finished(trainer: pl.Trainer, run: Run | None = None) -> bool:
    """Whether the run in a trainer's folder has finished, and was not given more steps, epochs or time since.

    Args:
        trainer: The trainer.
        run: The run, as far as it is known.

    Raises:
        ValueError: Another run has finished there.
    """
    file = _checkpoint_callback(trainer).folder(trainer) / FINISHED
    finished = json.loads(file.read_text()) if file.exists() else {}
    same_end = finished.get("end", finished | {"max_time": []}) == end_of(trainer)
    if same_end and run is not None:
        check_same_run(finished.get("run", {}), run)
    return same_end


def _find_checkpoint_callback(trainer: pl.Trainer) -> Checkpoint | None:
    return next((each for each in cast(Any, trainer).callbacks if isinstance(each, Checkpoint)), None)


def _checkpoint_callback(trainer: pl.Trainer) -> Checkpoint:
    """The trainer's `Checkpoint`.

    Raises:
        ValueError: It has none.
    """
    callback = _find_checkpoint_callback(trainer)
    if callback is None:
        raise ValueError("there is nothing to resume from: add plprune.Checkpoint to trainer.callbacks")
    return callback


def _lightning_finds_last(trainer: pl.Trainer) -> bool:
    """Whether Lightning's callbacks find a last checkpoint; without one, Lightning evaluates the model as it is."""
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return any(lightning_internals.last_checkpoints(each, trainer) for each in callbacks)


def _check_origin(path: Path, trainer: pl.Trainer) -> dict[str, Any]:
    """Checks that a trainer's strategy and number of processes can continue from a checkpoint.

    Returns:
        The entry that `Checkpoint` wrote into it.
    """
    if path.is_dir():
        saved = json.loads((path / MANIFEST).read_text())["origin"]
    else:
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        saved = content.get("callbacks", {}).get(_checkpoint_callback(trainer).state_key)
    if saved is None:
        raise ValueError(f"{path} was not written by plprune.Checkpoint: give it with --ckpt_path")
    current = origin(trainer)
    if saved["strategy"] != current["strategy"]:
        raise ValueError(
            f"{path} was written under {saved['strategy']}, and {current['strategy']} stores its states differently: "
            "use the same strategy, or start without --resume"
        )
    if saved["processes"] != current["processes"] and saved["strategy"] not in ANY_COUNT:
        raise ValueError(
            f"{path} was written by {saved['processes']} processes under {saved['strategy']}, each with a part of the "
            f"states, and this run has {current['processes']}: use as many, or start without --resume"
        )
    return saved
