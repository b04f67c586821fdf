"""Ends a process that is asked to stop, with an exit code that means: start me again."""

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
    """Ends the process with exit code 75."""

    def __init__(self) -> None:
        # If a process that Lightning started exits with another code than 0, Lightning kills the main process.
        others = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
        super().__init__(0 if local_rank() and not others else AGAIN)


@contextlib.contextmanager
def preemptible(launcher: Any = None) -> Iterator[None]:
    """Within the context, SIGTERM ends the process with exit code 75; in training, `Checkpoint` saves first.

    Args:
        launcher: Lightning's launcher, whose processes are sent the signal as well.
    """
    before = on_sigterm(partial(leave_on_signal, launcher))
    try:
        yield
    finally:
        on_sigterm(before or signal.SIG_DFL)


def on_sigterm(handler: Any) -> Any:
    """Sets the handler of SIGTERM and returns the one before; does nothing outside of the main thread."""
    main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if main else None


def leave_on_signal(launcher: Any, number: int, _: Any) -> NoReturn:
    """Handles a signal by ending this process, and the ones that it started, at once."""
    on_sigterm(signal.SIG_IGN)
    if launcher is not None:
        launcher.kill(number)
    leave(signal.Signals(number).name)


def leave(reason: str) -> NoReturn:
    """Ends this process so that the run can be resumed, and logs the reason."""
    if rank_zero_only.rank == 0:
        log.warning("%s: stopped; start the same command again with --resume to continue (exit code %d)", reason, AGAIN)
    raise Preempted
