"""What a person sees of a run: which bar, which logs, and where things are."""

import csv
import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from plprune.training.console import (
    CloseBar,
    CurrentStderr,
    ResumableCSVLogger,
    display_arguments,
    fit_summary,
    loggers,
)
from plprune.training.lightning_internals import EpochBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def asked(**given: Any) -> dict[str, Any]:
    return {"callbacks": None, "enable_progress_bar": None, "enable_model_summary": None} | given


def kinds(chosen: dict[str, Any]) -> list[type]:
    return [type(each) for each in chosen["callbacks"]]


@pytest.mark.parametrize(
    ("stage", "out", "err", "bar"),
    [
        ("fit", True, True, True),
        ("fit", False, True, True),  # what is printed goes into a pipe
        ("fit", True, False, False),
        ("test", True, True, True),
        ("test", False, True, False),
    ],
)
def test_a_terminal_gets_a_bar(monkeypatch, stage: str, out: bool, err: bool, bar: bool) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal() if out else io.StringIO())
    monkeypatch.setattr(sys, "stderr", Terminal() if err else io.StringIO())
    chosen = display_arguments(asked(), stage)
    assert kinds(chosen) == [EpochBar] * bar
    assert chosen["enable_progress_bar"] is bar
    assert chosen["enable_model_summary"] is False


@pytest.mark.parametrize("listed", [TQDMProgressBar(), [RichProgressBar()], [ModelSummary(), TQDMProgressBar()]])
def test_what_is_listed_stays(monkeypatch, listed: Any) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    chosen = display_arguments(asked(callbacks=listed), "fit")
    assert chosen["callbacks"] == (listed if isinstance(listed, list) else [listed])
    assert "enable_progress_bar" not in chosen
    assert ("enable_model_summary" in chosen) == (ModelSummary not in kinds(chosen))


@pytest.mark.parametrize("wish", [True, False])
def test_a_wish_is_left_to_lightning(monkeypatch, wish: bool) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert display_arguments(asked(enable_progress_bar=wish, enable_model_summary=wish), "fit") == {"callbacks": []}


def test_lightnings_bar_has_ended_when_others_speak() -> None:
    ended: list[str] = []
    bar = RichProgressBar()
    cast(Any, bar).teardown = lambda *args: ended.append(args[-1])
    for callback in (bar, None):
        CloseBar().on_train_end(cast(Any, SimpleNamespace(progress_bar_callback=callback)), cast(Any, None))
    assert ended == ["fit"]


def test_both_loggers_write_to_one_folder_and_a_new_run_to_another(tmp_path: Path) -> None:
    for version in range(2):
        board, rows = loggers(str(tmp_path), "fit", None)
        assert isinstance(board, TensorBoardLogger)
        assert isinstance(rows, ResumableCSVLogger)
        assert board.log_dir == rows.log_dir == str(tmp_path / f"lightning_logs/fit/version_{version}")
        Path(rows.log_dir).mkdir(parents=True)
    assert loggers(str(tmp_path), "test")[0].version == 0
    assert loggers(str(tmp_path), "fit", step=3)[0].version == 1
    assert loggers(str(tmp_path / "else"), "fit", step=3)[0].version == 0


def test_rows_of_steps_that_are_taken_again_are_dropped(tmp_path: Path) -> None:
    first = ResumableCSVLogger(str(tmp_path), "fit", 0)
    for step in range(6):
        first.log_metrics({"loss": step / 2}, step)
    first.save()
    again = ResumableCSVLogger(str(tmp_path), "fit", 0, before=4)
    again.log_metrics({"loss": 9.0, "more": 1.0}, 4)
    again.save()
    with open(tmp_path / "fit" / "version_0" / "metrics.csv", newline="") as file:
        kept = [(row["step"], row["loss"], row["more"]) for row in csv.DictReader(file)]
    assert kept == [("0", "0.0", ""), ("1", "0.5", ""), ("2", "1.0", ""), ("3", "1.5", ""), ("4", "9.0", "1.0")]
    assert [path.name for path in (tmp_path / "fit" / "version_0").iterdir()] == ["metrics.csv"]


def test_a_row_that_a_killed_run_has_begun_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "fit" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text("loss,step,tokens\n2.0,0,7\n1.5,1,7\n1.")
    ResumableCSVLogger(str(tmp_path), "fit", 0, before=9).save()
    assert file.read_text().split() == ["loss,step,tokens", "2.0,0,7", "1.5,1,7"]


def test_only_the_first_process_writes_rows(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    rows = ResumableCSVLogger(str(tmp_path), "fit", 0)
    rows.log_metrics({"loss": 1.0}, 0)
    rows.save()
    assert list(tmp_path.iterdir()) == []


def test_the_summary_says_where_things_are() -> None:
    places = [CSVLogger("runs", "a", 0), CSVLogger("runs", "a", 0)]
    lines = fit_summary(
        cast(Any, SimpleNamespace(loggers=places)), {"model": ["out", "more"], "report": []}, 75
    ).splitlines()
    assert [line.split() for line in lines] == [
        ["model", "out"],
        ["model", "more"],
        ["logs", "runs/a/version_0"],
        ["time", "75", "s"],
    ]


def test_the_log_goes_where_the_standard_error_is_now(monkeypatch) -> None:
    handler = logging.StreamHandler(cast(Any, CurrentStderr()))
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    handler.emit(logging.LogRecord("a", logging.INFO, "", 0, "a line", None, None))
    assert later.getvalue() == "a line\n"
