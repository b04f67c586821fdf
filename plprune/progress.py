"""How far a long loop has come, and when it will end."""

import io
import logging
import sys
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress(tqdm):
    """A bar on a terminal; elsewhere, a line in the log every half a minute.

    Args:
        total: Steps of the whole loop.
        title: What is going on.
        unit: What a step is.
        done: Steps that were taken before.
        quiet: Whether to say nothing, as all processes but the first should.
    """

    seconds = 30.0  # between two lines

    def __init__(self, total: int, title: str, unit: str, done: int = 0, quiet: bool = False) -> None:
        self.terminal = sys.stderr.isatty()
        plain: dict[str, Any] = {
            "file": io.StringIO(),
            "mininterval": self.seconds,
            "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}s, {remaining} left",
        }
        where = {} if self.terminal else plain
        super().__init__(total=total, initial=done, desc=title, unit=unit, disable=quiet, **where)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Shows the state: the bar's own drawing on a terminal, a line in the log otherwise."""
        if self.terminal:
            super().display(msg, pos)
        elif self.initial < self.n < (self.total or 0):
            log.info("%s", str(self))  # as it is now, whenever it is formatted
