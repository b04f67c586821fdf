"""Progress on a terminal, and without one."""

import io
import logging
import re
import sys

import pytest
from rich import get_console, progress

from plprune.io import progress as progress_module
from plprune.io.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What stands for a terminal from now on; pytest would put its own in the place of a fixture's."""
    there = Terminal()
    monkeypatch.setattr(sys, "stderr", there)
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    return there


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def screen(terminal: Terminal) -> list[str]:
    return lines_on_screen(terminal.getvalue())


def lines_on_screen(text: str) -> list[str]:
    """What is left on a terminal that obeys the few codes that are used: line up, erase line, return."""
    lines, row, column = [""], 0, 0
    for code, word in re.findall(r"(\x1b\[[0-9;?]*[a-zA-Z]|\r|\n)|([^\x1b\r\n]+)", text):
        if code in ("\r", "\n"):
            row, column = row + (code == "\n"), 0
            lines += [""] * (row + 1 - len(lines))
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code.endswith("K"):
            lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + word + lines[row][column + len(word) :]
            column += len(word)
    return [line.strip() for line in lines if line.strip()]


def test_without_a_terminal_the_log_says_when_it_will_end(caplog, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Progress, "seconds", 0.0)
    with caplog.at_level(logging.INFO, "plprune.io.progress"), Progress(3, "calibrating", "block") as bar:
        for _ in range(3):
            bar.update()
    assert [re.sub(r"\d+ s left", "TIME left", line) for line in messages(caplog)] == [
        "calibrating: 1 of 3 blocks, TIME left",
        "calibrating: 2 of 3 blocks, TIME left",
    ]
    assert capsys.readouterr().err == ""


def test_what_was_done_before_does_not_count_for_the_time_left(caplog, monkeypatch) -> None:
    monkeypatch.setattr(Progress, "seconds", 0.0)
    now = iter([100.0, 160.0])
    monkeypatch.setattr("plprune.io.progress.time.monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO, "plprune.io.progress"), Progress(70, "training", "step", done=8) as bar:
        bar.update(2)
    assert messages(caplog) == ["training: 10 of 70 steps, 30 minutes left"]


@pytest.mark.parametrize(("quiet", "seconds"), [(True, 0.0), (False, 30.0)])
def test_it_is_silent_where_it_should_be(caplog, monkeypatch, quiet: bool, seconds: float) -> None:
    monkeypatch.setattr(Progress, "seconds", seconds)
    with caplog.at_level(logging.INFO, "plprune.io.progress"), Progress(3, "calibrating", "block", quiet=quiet) as bar:
        for _ in range(3):
            bar.update()
    assert messages(caplog) == []


def test_a_terminal_gets_a_bar(caplog, monkeypatch) -> None:
    terminal = terminal_of(monkeypatch)
    with caplog.at_level(logging.INFO, "plprune.io.progress"), Progress(3, "calibrating", "block") as bar:
        for _ in range(3):
            bar.update()
    (line,) = screen(terminal)
    assert re.fullmatch(r"calibrating ━+ 3/3 blocks 0:00:00 < 0:00:00", line)
    assert messages(caplog) == []


def test_bars_are_nested_in_one_display(monkeypatch) -> None:
    terminal = terminal_of(monkeypatch)
    with Progress(2, "comparing", "cell") as outer:
        for _ in range(2):
            with Progress(5, "evaluating", "window") as inner:
                display = Progress._display
                inner.update(5)
            assert Progress._display is display
            outer.update()
    assert [line.split()[0] for line in screen(terminal)] == ["comparing"]
    assert "evaluating" in terminal.getvalue()
    assert Progress._display is None


def test_what_is_written_meanwhile_stays_above_the_bar(monkeypatch) -> None:
    terminal = terminal_of(monkeypatch)
    with Progress(2, "calibrating", "block") as bar:
        bar.update()
        print("a word", file=sys.stderr)
    assert [line.split()[0] for line in screen(terminal)] == ["a", "calibrating"]
    assert sys.stderr is terminal


def test_it_is_drawn_within_the_display_of_others(monkeypatch) -> None:
    terminal = terminal_of(monkeypatch)
    console = get_console()
    monkeypatch.setattr(console, "_file", terminal)
    monkeypatch.setattr(console, "_force_terminal", True)
    with progress.Progress(console=console) as theirs:
        theirs.add_task("Epoch 0", total=1)
        with Progress(2, "evaluating", "window") as bar:
            bar.update()
            assert Progress._display is not None
            assert Progress._display.console is console
        theirs.update(theirs.task_ids[0], completed=1)
    assert {line.split()[0] for line in screen(terminal)} == {"Epoch", "evaluating"}


def test_the_cursor_comes_back_if_a_bar_is_never_closed(monkeypatch) -> None:
    terminal = terminal_of(monkeypatch)
    bar = Progress(2, "calibrating", "block")
    progress_module._stop()
    assert terminal.getvalue().endswith("\x1b[?25h")
    bar.close()
