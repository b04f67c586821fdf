"""Measures the throughput of training, and estimates the time left."""

import time

from plprune.io.progress import Progress


class Throughput:
    """Counts tokens and steps of a training from now on, and shows the progress.

    Args:
        step: Steps that were taken before.
        steps: Steps of the whole training.
        quiet: Whether to show nothing.
    """

    def __init__(self, step: int, steps: int, quiet: bool) -> None:
        self._first, self._steps = step, steps
        self._start = self._since = time.perf_counter()
        self._tokens = 0
        self._progress = Progress(steps, "training", "step", step, quiet)

    def count(self, tokens: int) -> None:
        """Adds tokens that were trained on."""
        self._tokens += tokens

    def measure(self, step: int) -> tuple[float, float | None]:
        """Tokens per second since the last call, and the minutes left, if a step was taken."""
        now, done = time.perf_counter(), step - self._first
        tokens_per_second = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        self._progress.update(step - self._progress.n)
        return tokens_per_second, (self._steps - step) * (now - self._start) / done / 60 if done > 0 else None

    def close(self) -> None:
        """Ends the display of the progress."""
        self._progress.close()
