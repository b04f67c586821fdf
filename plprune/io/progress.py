"""How far a long loop has come, and when it will end.

All bars of a process share one live display: two that each move the cursor would draw over one another. Where someone
else's is on, Lightning's while it trains for example, they are drawn below it.
"""

import atexit
import logging
import sys
import time
from typing import ClassVar

from rich import get_console, progress
from rich.console import Console
from typing_extensions import Self

from plprune.io.units import format_duration

log = logging.getLogger(__name__)


class Progress:
    """A bar on a terminal; elsewhere, a line in the log every half a minute. Bars may be nested.

    Args:
        total: Steps of the whole loop.
        title: What is going on.
        unit: What a step is.
        done: Steps that were taken before.
        quiet: Whether to say nothing, as all processes but the first should.
    """

    seconds = 30.0  # between two lines
    silent: ClassVar[bool] = False  # all bars of this process, where it is one of several
    _display: ClassVar[progress.Progress | None] = None  # there is one while a bar is open
    _open: ClassVar[list["Progress"]] = []

    def __init__(self, total: int, title: str, unit: str, done: int = 0, quiet: bool = False) -> None:
        self.total, self.title, self.unit, self.n, self.quiet = total, title, unit, done, quiet or self.silent
        self._first, self._start = done, time.monotonic()
        self._said = self._start
        self._task: progress.TaskID | None = None
        if not self.quiet and sys.stderr.isatty():
            self._task = self._live().add_task(title, total=total, completed=done, unit=f"{unit}s")
            Progress._open.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """Takes steps."""
        self.n += steps
        if self._task is not None:
            self._live().update(self._task, completed=self.n)
        elif not self.quiet and self._first < self.n < self.total:
            self._say()

    def close(self) -> None:
        """Ends the bar: an inner one goes, and the last one stays on the terminal as it is."""
        if self._task is None:
            return
        Progress._open.remove(self)
        if Progress._open:
            self._live().remove_task(self._task)
        else:
            _stop()
        self._task = None

    def _say(self) -> None:
        now = time.monotonic()
        if now - self._said >= self.seconds:
            self._said = now
            left = (now - self._start) / (self.n - self._first) * (self.total - self.n)
            log.info("%s: %d of %d %ss, %s left", self.title, self.n, self.total, self.unit, format_duration(left))

    @staticmethod
    def _live() -> progress.Progress:
        """The display, which is made for the first bar."""
        if Progress._display is None:
            Progress._display = _new_display()
            Progress._display.start()
        return Progress._display


def _new_display() -> progress.Progress:
    shared = get_console()
    someone = bool(getattr(shared, "_live_stack", None))  # a display in another nests only in the same console
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[unit]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("<"),
        progress.TimeRemainingColumn(),
        console=shared if someone else Console(stderr=True),
        speed_estimate_period=3600,  # a step may take minutes
        refresh_per_second=4,
    )


@atexit.register
def _stop() -> None:
    """Ends the display, or the terminal would be left without a cursor."""
    if Progress._display is not None:
        Progress._display.stop()
        Progress._display = None
