"""The terminal output and the logs of a command: progress bars, log lines, log folders and the final summary.

TensorBoard events and a CSV file are written to the same folder, `lightning_logs/fit/version_0` and so on under the
trainer's `default_root_dir`. A resumed run continues there; rows of the steps that it takes again are dropped.
"""

import csv
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from plprune.io.atomic import staged
from plprune.io.progress import Progress
from plprune.io.units import format_duration
from plprune.training.lightning_internals import EpochBar, KeepingWriter, OpenCSVLogger

FOLDER = "lightning_logs"
LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric")  # loggers that have their own handlers


class CloseBar(pl.Callback):
    """Closes Lightning's progress bar at the end of training, before other callbacks print. List it first."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(bar := trainer.progress_bar_callback, RichProgressBar):
            bar.teardown(trainer, pl_module, "fit")


class ResumableCSVLogger(OpenCSVLogger):
    """Writes metrics to a CSV file, after the rows that an earlier run has left there.

    Args:
        save_dir: The folder of all logs.
        name: A folder in it.
        version: The number of a folder in that.
        before: The step from which earlier rows are dropped.
    """

    def __init__(self, save_dir: str, name: str, version: int, before: int = 0) -> None:
        super().__init__(save_dir, name, version)
        self._before = before

    def make_writer(self) -> ExperimentWriter:
        writer = KeepingWriter(self.log_dir)
        writer.metrics_keys = _drop_rows(Path(writer.metrics_file_path), self._before)
        return writer


class CurrentStderr:
    """Looks `sys.stderr` up at every write, because live displays replace it while they are shown."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Flushes the stream."""
        sys.stderr.flush()


def configure_logging() -> None:
    """Shows plprune's log lines, and only those lines of other libraries on which a user can act."""
    logging.basicConfig(format="%(message)s", stream=CurrentStderr())
    logging.getLogger("plprune").setLevel(logging.WARNING if rank_zero_only.rank else logging.INFO)
    Progress.silent = bool(rank_zero_only.rank)
    for handler in [each for name in LIGHTNING for each in logging.getLogger(name).handlers]:
        handler.addFilter(lambda record: not re.search("Tip:|Detected KeyboardInterrupt", record.getMessage()))
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(CurrentStderr())
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, and logs its guess
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|dataloader is not resumable).*")
    if rank_zero_only.rank or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def display_arguments(given: Any, stage: str) -> dict[str, Any]:
    """Chooses a Trainer's display where its user has not: Rich's bar on a terminal, and log lines elsewhere.

    Args:
        given: The Trainer's arguments, by name.
        stage: fit, validate or test. The last two print results to Rich's default console, which must stay as it is.
    """
    listed = given["callbacks"] or []
    callbacks = list(listed) if isinstance(listed, list | tuple) else [listed]
    chosen: dict[str, Any] = {"callbacks": callbacks}
    if given["enable_model_summary"] is None and not any(isinstance(each, ModelSummary) for each in callbacks):
        chosen |= {"enable_model_summary": False}  # it would list one module, the model
    if given["enable_progress_bar"] is None and not any(isinstance(each, ProgressBar) for each in callbacks):
        shown = sys.stderr.isatty() and (stage == "fit" or sys.stdout.isatty())
        console: dict[str, Any] = {"stderr": True} if stage == "fit" else {}
        callbacks += [EpochBar(refresh_rate=4, console_kwargs=console)] * shown
        chosen |= {"enable_progress_bar": shown}
    return chosen


def loggers(root: str, stage: str, step: int | None = None) -> list[Logger]:
    """Creates a TensorBoard and a CSV logger for the same folder.

    Args:
        root: The trainer's `default_root_dir`.
        stage: fit, validate or test; each has its own versions.
        step: The step from which the run in the newest folder continues; None for a new run in a new folder.
    """
    name, newest = f"{FOLDER}/{stage}", _newest(Path(root) / FOLDER / stage)
    version = newest if step is not None and newest >= 0 else newest + 1
    board = TensorBoardLogger(root, name, version, default_hp_metric=False, purge_step=step)
    return [board, ResumableCSVLogger(root, name, version, step or 0)]


def fit_summary(trainer: pl.Trainer, outputs: dict[str, list[str]], seconds: float) -> str:
    """Lists the paths of a finished fit, and its duration.

    Args:
        trainer: The trainer.
        outputs: Paths by kind, for example model and report.
        seconds: The duration.
    """
    rows = [(kind, path) for kind, paths in outputs.items() for path in paths]
    folders = [logger.log_dir or logger.save_dir for logger in trainer.loggers]  # trainer.log_dir would be a broadcast
    rows += [("logs", folder) for folder in dict.fromkeys(folders) if folder]
    return "\n".join(f"{kind:<11}{value}" for kind, value in [*rows, ("time", format_duration(seconds))])


def _drop_rows(file: Path, step: int) -> list[str]:
    """Drops the rows of a CSV file from a step on, and returns its columns."""
    if not file.exists():
        return []
    with open(file, newline="") as earlier:
        reader = csv.DictReader(earlier)
        rows = [row for row in reader if _is_complete(row) and int(row["step"]) < step]
        columns = list(reader.fieldnames or [])
    with staged(file, overwrite=True) as temporary, open(temporary, "w", newline="") as kept:
        writer = csv.DictWriter(kept, columns)
        writer.writeheader()
        writer.writerows(rows)
    return columns


def _is_complete(row: dict[str | Any, Any]) -> bool:
    """Whether a row was written to its end; the last row of a killed run may lack values."""
    return None not in row.values() and row.get("step", "").isdecimal()


def _newest(folder: Path) -> int:
    """The highest version number in a folder; -1 if there is none."""
    numbers = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1)
