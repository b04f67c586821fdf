"""Checkpoints on disk: finds the complete ones, and records which strategy they need."""

import contextlib
import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import Timer

from plprune.training import lightning_internals
from plprune.training.run_identity import training_length

log = logging.getLogger(__name__)
PLAIN, FSDP2 = "one process or DDP", "FSDP2"
ANY_COUNT = (PLAIN, FSDP2)  # kinds of strategies whose checkpoints any number of processes can read
PATTERN = "step=*.ckpt"
OLD, MANIFEST, FINISHED = "old", "manifest.json", "finished.json"


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a folder; damaged ones are skipped with a warning."""
    for path in reversed(checkpoints(folder)):
        wrong = fault(path)
        if wrong is None:
            return path
        if rank_zero_only.rank == 0:
            log.warning("skipping the checkpoint %s: %s", path, wrong)
    return None


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints of a folder in the order of their steps, including damaged ones."""
    return sorted(Path(folder).glob(PATTERN), key=step_of)


def set_aside(folder: str | os.PathLike[str], step: int = 0) -> None:
    """Moves the checkpoints of steps after `step` to the folder `old`, because a new run begins at `step`."""
    folder = Path(folder)
    (folder / FINISHED).unlink(missing_ok=True)
    later = [path for path in checkpoints(folder) if step_of(path) > step]
    if later:
        shutil.rmtree(folder / OLD, ignore_errors=True)
        (folder / OLD).mkdir()
        for path in later:
            os.replace(path, folder / OLD / path.name)
        log.info("moved %d checkpoints of an earlier run to %s", len(later), folder / OLD)


def end_of(trainer: pl.Trainer) -> dict[str, Any]:
    """The steps, epochs and times after which a run ends."""
    times = [lightning_internals.limit_of(each) for each in cast(Any, trainer).callbacks if isinstance(each, Timer)]
    return training_length(trainer) | {"max_time": times}


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint; -1 if there is none."""
    digits = path.name[len("step=") : -len(".ckpt")]
    return int(digits) if digits.isdecimal() else -1


def fault(path: Path) -> str | None:
    """Reads every byte of a checkpoint, and returns what is wrong with it, or None."""
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
    except Exception as error:  # a damaged archive may raise anything
        return f"it is truncated or corrupted ({error})"
    return None


def origin(trainer: pl.Trainer) -> dict[str, Any]:
    """The number of processes and the kind of strategy that write a checkpoint."""
    return {"processes": trainer.num_nodes * trainer.num_devices, "strategy": _kind(trainer.strategy)}


def _kind(strategy: strategies.Strategy) -> str:
    if isinstance(strategy, strategies.DeepSpeedStrategy):
        stage = cast(Any, strategy.config).get("zero_optimization", {}).get("stage", 0)
        return f"DeepSpeed ZeRO-{stage}"
    if isinstance(strategy, strategies.ModelParallelStrategy):
        return FSDP2
    plain = isinstance(strategy, strategies.SingleDeviceStrategy | strategies.DDPStrategy)
    return PLAIN if plain else type(strategy).__name__


def save_file(state_dict: Any, path: Path, **_: Any) -> None:
    """Writes a checkpoint; on failure empties the file and raises the OSError that torch hides."""
    try:
        with open(path, "wb") as file:  # if torch opened it, the error would not say why
            torch.save(state_dict, file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.truncate(path, 0)
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
