"""Progress on a terminal, and without one."""

import logging
import re
import sys

import pytest

from plprune.progress import Progress


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_without_a_terminal_the_log_says_when_it_will_end(caplog, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Progress, "seconds", 0.0)
    with caplog.at_level(logging.INFO, "plprune.progress"), Progress(3, "calibrating", "block") as bar:
        for _ in range(3):
            bar.update()
    assert [re.sub(r"\d\d:\d\d", "TIME", line) for line in messages(caplog)] == [
        "calibrating: 1 of 3 blocks, TIME left",
        "calibrating: 2 of 3 blocks, TIME left",
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("quiet", "seconds"), [(True, 0.0), (False, 30.0)])
def test_it_is_silent_where_it_should_be(caplog, monkeypatch, quiet: bool, seconds: float) -> None:
    monkeypatch.setattr(Progress, "seconds", seconds)
    with caplog.at_level(logging.INFO, "plprune.progress"), Progress(3, "calibrating", "block", quiet=quiet) as bar:
        for _ in range(3):
            bar.update()
    assert messages(caplog) == []


def test_a_terminal_gets_a_bar(caplog, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with caplog.at_level(logging.INFO, "plprune.progress"), Progress(3, "calibrating", "block") as bar:
        for _ in range(3):
            bar.update()
    assert "calibrating: 100%" in capsys.readouterr().err
    assert messages(caplog) == []
