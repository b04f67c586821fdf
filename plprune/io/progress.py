"""Progress bars, and progress lines in the log where there is no terminal.

All bars of a process share one live display, because two displays would draw over each other. While another display is
on, such as Lightning's during training, the bars are drawn below it.
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
    """A bar on a terminal; elsewhere a line in the log every 30 seconds. Bars may be nested.

    Args:
        total: Steps of the whole loop.
        title: The name of the work, such as "calibrating".
        unit: The name of a step, in the singular.
        done: Steps that an earlier run has taken.
        quiet: Whether to show nothing, as for all processes but the first.
    """

    seconds = 30.0  # between two log lines
    silent: ClassVar[bool] = False  # hides all bars of this process
    _display: ClassVar[progress.Progress | None] = None  # exists while a bar is open
    _open: ClassVar[list["Progress"]] = []

    def __init__(self, total: int, title: str, unit: str, done: int = 0, quiet: bool = False) -> None:
        self.total, self.title, self.unit, self.n, self.quiet = total, title, unit, done, quiet or self.silent
        self._first, self._start = done, time.monotonic()
        self._last_line = self._start
        self._task: progress.TaskID | None = None
        if not self.quiet and sys.stderr.isatty():
            self._task = self._live().add_task(title, total=total, completed=done, unit=f"{unit}s")
            Progress._open.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """Advances by a number of steps."""
        self.n += steps
        if self._task is not None:
            self._live().update(self._task, completed=self.n)
        elif not self.quiet and self._first < self.n < self.total:
            self._log()

    def close(self) -> None:
        """Ends the bar: a nested bar disappears, and the outermost stays on the terminal."""
        if self._task is None:
            return
        Progress._open.remove(self)
        if Progress._open:
            self._live().remove_task(self._task)
        else:
            _stop()
        self._task = None

    def _log(self) -> None:
        now = time.monotonic()
        if now - self._last_line >= self.seconds:
            self._last_line = now
            left = (now - self._start) / (self.n - self._first) * (self.total - self.n)
            log.info("%s: %d of %d %ss, %s left", self.title, self.n, self.total, self.unit, format_duration(left))

    @staticmethod
    def _live() -> progress.Progress:
        if Progress._display is None:
            Progress._display = _new_display()
            Progress._display.start()
        return Progress._display


def _new_display() -> progress.Progress:
    shared = get_console()
    nested = bool(getattr(shared, "_live_stack", None))  # displays nest only in the same console
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[unit]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("<"),
        progress.TimeRemainingColumn(),
        console=shared if nested else Console(stderr=True),
        speed_estimate_period=3600,  # a step may take minutes
        refresh_per_second=4,
    )


@atexit.register
def _stop() -> None:
    """Ends the display, which gives the terminal its cursor back."""
    if Progress._display is not None:
        Progress._display.stop()
        Progress._display = None
