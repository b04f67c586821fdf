"""A run that has to go: the signal is noted, and the process ends with a code that means start me again."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from plprune.io.distributed import local_rank

log = logging.getLogger(__name__)
AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class Preempted(SystemExit):
    """Ends the process with a code that means: start me again."""

    def __init__(self) -> None:
        # If a process that Lightning started ends with another code than 0, Lightning kills the one that started it.
        others = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
        super().__init__(0 if local_rank() and not others else AGAIN)


@contextlib.contextmanager
def preemptible(launcher: Any = None) -> Iterator[None]:
    """While it lasts, SIGTERM ends the process with exit code 75; in training, `Checkpoint` saves before.

    Args:
        launcher: What has started further processes, which are then told as well.
    """
    before = on_sigterm(partial(leave_now, launcher))
    try:
        yield
    finally:
        on_sigterm(before or signal.SIG_DFL)


def on_sigterm(handler: Any) -> Any:
    """Sets what is done at SIGTERM, and gives back what was done before; only the main thread can."""
    main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if main else None


def leave_now(launcher: Any, number: int, _: Any) -> NoReturn:
    """Ends this process, and those that it started, at once; a handler of signals."""
    on_sigterm(signal.SIG_IGN)
    if launcher is not None:
        launcher.kill(number)
    go(signal.Signals(number).name)


def go(why: str) -> NoReturn:
    """Ends this process so that its run can go on later; the log says why."""
    if rank_zero_only.rank == 0:
        log.warning("%s: stopped; start the same command again, with --resume, to go on (exit code %d)", why, AGAIN)
    raise Preempted
