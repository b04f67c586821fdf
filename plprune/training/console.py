"""What a person sees of a run of the command line: bars, logs, and where things are when it is over.

A run has one folder of logs, `lightning_logs/fit/version_0` under the trainer's `default_root_dir`, in which those of
TensorBoard and a CSV file lie side by side. One that goes on after a stop goes on there: what it logged after its
checkpoint is dropped, as those steps are taken again.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from plprune.io.atomic import staged
from plprune.io.units import format_duration
from plprune.training.lightning_internals import OpenBar, OpenCSVLogger, OpenWriter

FOLDER = "lightning_logs"


class BarsFirst(pl.Callback):
    """Ends Lightning's bar when training ends, before others have something to say. List it first."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(bar := trainer.progress_bar_callback, RichProgressBar):
            bar.teardown(trainer, pl_module, "fit")


class Bar(OpenBar):
    """Lightning's, which would say `Epoch 0/-2` of a run that `max_steps` ends."""

    def train_description(self, epoch: int) -> str:
        return f"{f'epoch {epoch}':<{len(self.validation_description)}}"


class Rows(OpenCSVLogger):
    """Metrics in a CSV file, which goes on where an earlier run has left it.

    Args:
        save_dir: Folder of all logs.
        name: Folder in it.
        version: Folder in that.
        before: Rows of earlier steps stay.
    """

    def __init__(self, save_dir: str, name: str, version: int, before: int = 0) -> None:
        super().__init__(save_dir, name, version)
        self._before = before

    def writer(self) -> ExperimentWriter:
        return _Writer(self.log_dir, self._before)


class Stderr:
    """Standard error as it is when something is written: a live display stands in for it while it is on."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Writes what waits."""
        sys.stderr.flush()


def display_arguments(given: Any, stage: str) -> dict[str, Any]:
    """What a Trainer shows unless its user has said: on a terminal Rich's bar; elsewhere the log says how far it is.

    Args:
        given: The Trainer's arguments, by name.
        stage: fit, validate or test. The last two print results to Rich's own console, which must not be moved.
    """
    listed = given["callbacks"] or []
    callbacks = list(listed) if isinstance(listed, list | tuple) else [listed]
    chosen: dict[str, Any] = {"callbacks": callbacks}
    if given["enable_model_summary"] is None and not any(isinstance(each, ModelSummary) for each in callbacks):
        chosen |= {"enable_model_summary": False}  # there is one module in it, the model
    if given["enable_progress_bar"] is None and not any(isinstance(each, ProgressBar) for each in callbacks):
        there = sys.stderr.isatty() and (stage == "fit" or sys.stdout.isatty())
        console: dict[str, Any] = {"stderr": True} if stage == "fit" else {}
        callbacks += [Bar(refresh_rate=4, console_kwargs=console)] * there
        chosen |= {"enable_progress_bar": there}
    return chosen


def loggers(root: str, stage: str, step: int | None = None) -> list[Logger]:
    """TensorBoard and CSV in one new folder, or in the newest there is.

    Args:
        root: The trainer's `default_root_dir`.
        stage: fit, validate or test, each of which counts its runs.
        step: The number of steps after which an earlier run goes on; None if a new one begins.
    """
    name, newest = f"{FOLDER}/{stage}", _newest(Path(root) / FOLDER / stage)
    version = newest if step is not None and newest >= 0 else newest + 1
    board = TensorBoardLogger(root, name, version, default_hp_metric=False, purge_step=step)
    return [board, Rows(root, name, version, step or 0)]


def summary(trainer: pl.Trainer, outputs: dict[str, list[str]], seconds: float) -> str:
    """Where things are when a fit is over.

    Args:
        trainer: Its trainer.
        outputs: Paths, by what is there.
        seconds: How long it took.
    """
    rows = [(what, path) for what, paths in outputs.items() for path in paths]
    places = [logger.log_dir or logger.save_dir for logger in trainer.loggers]  # trainer.log_dir would be a broadcast
    rows += [("logs", place) for place in dict.fromkeys(places) if place]
    return "\n".join(f"{what:<11}{value}" for what, value in [*rows, ("time", format_duration(seconds))])


class _Writer(OpenWriter):
    def __init__(self, log_dir: str, before: int) -> None:
        self._before = before
        super().__init__(log_dir)

    def begin(self) -> None:
        """Lightning's own would remove what is there."""
        file = Path(self.metrics_file_path)
        if not file.exists():
            return
        with open(file, newline="") as earlier:
            reader = csv.DictReader(earlier)
            rows = [row for row in reader if _whole(row) and int(row["step"]) < self._before]
            self.metrics_keys = list(reader.fieldnames or [])
        with staged(file, overwrite=True) as temporary, open(temporary, "w", newline="") as kept:
            writer = csv.DictWriter(kept, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _whole(row: dict[str | Any, Any]) -> bool:
    """Whether a row was written to its end; one that a killed run began may lack values."""
    return None not in row.values() and row.get("step", "").isdecimal()


def _newest(folder: Path) -> int:
    """The highest number of a version; -1 if there is none."""
    numbers = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1)
