"""Ends all processes of a run soon after one has died, and names the dead one.

A collective operation waits for a dead process: minutes with NCCL, whose final error does not name it. Every process
therefore writes a heartbeat to the store with which the process group was made, reads the heartbeats of the others, and
exits with one line when another one has failed or is silent.
"""

import contextlib
import logging
import os
import platform
import threading
import time
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from plprune.io import distributed

log = logging.getLogger(__name__)
BEAT = 2.0  # seconds between heartbeats
SILENCE = 40.0  # seconds without a heartbeat, after which a process counts as dead
GRACE = 12.0  # the same, once a connection to some process is known to be broken
PREFIX = "plprune/alive/"
BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "recvValue failed", "Socket")


class Watch(pl.Callback):
    """Ends every process of a run within a minute after one of them has failed, with a line that names it.

    `plprune fit` adds this callback. In a script, list it first.
    """

    def __init__(self) -> None:
        self._peers: Peers | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._peers is None and distributed.world() is not None:
            self._peers = Peers(distributed.rank(distributed.world()), distributed.size(distributed.world()))
            self._peers.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._peers is not None:
            self._peers.leave("done")
            self._peers = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.setup(trainer, pl_module, "fit")  # in case the exception came before it
        if self._peers is None:
            return
        if isinstance(exception, RuntimeError) and any(sign in str(exception) for sign in BROKEN):
            self._peers.silence = GRACE  # the thread will soon name the process that caused this
            self._peers.join(2 * GRACE)
        intended = isinstance(exception, SystemExit | KeyboardInterrupt)
        reason = " ".join(str(exception).split()) or type(exception).__name__
        self._peers.leave("done" if intended else f"failed: {reason}")


class Peers(threading.Thread):
    """Writes this process's heartbeat, and watches those of all processes.

    Args:
        rank: The rank of this process.
        count: The number of processes.
    """

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(daemon=True, name="plprune-watch")
        self.rank, self.count, self.silence = rank, count, SILENCE
        self.store = dist.PrefixStore(PREFIX, _connect())  # type: ignore[reportPrivateImportUsage]
        self._left = threading.Event()
        self._last: dict[int, tuple[str, float]] = {}  # of each process, the last text and when it was first read
        self._beat()

    def run(self) -> None:
        while not self._left.wait(BEAT):
            if reason := self._check():
                log.error("plprune: error: %s; this was rank %d, which stops", reason, self.rank)
                os._exit(1)

    def leave(self, status: str) -> None:
        """Writes a last status, done or failed, and ends the thread."""
        if not self._left.is_set():
            self._left.set()
            with contextlib.suppress(RuntimeError):  # the process with the store may have ended
                self.store.set(str(self.rank), status)
            self.join(BEAT)  # Python would abort if it ended while the thread uses the store

    def _beat(self) -> None:
        self.store.set(str(self.rank), f"{time.time()} {platform.node()}, process {os.getpid()}")

    def _check(self) -> str | None:
        """Writes a heartbeat, and returns what is wrong with another process, or None."""
        try:
            self._beat()
            return next(filter(None, map(self._wrong, range(self.count))), None)
        except RuntimeError as error:
            return f"rank 0, which keeps the store, is dead ({' '.join(str(error).split())[:120]})"

    def _wrong(self, rank: int) -> str | None:
        now = time.monotonic()
        if not self.store.check([str(rank)]):
            return None  # it has not started yet
        word = self.store.get(str(rank)).decode()
        if word.startswith("failed"):
            return f"rank {rank} {word}"
        if word == "done":
            return None
        before, since = self._last.setdefault(rank, (word, now))
        if word != before:
            self._last[rank] = (word, now)
        elif now - since > self.silence:
            return f"rank {rank} ({word.partition(' ')[2]}) has not answered for {now - since:.0f} seconds"
        return None


def _connect() -> Any:
    """A second connection to the store; the group's is blocked while another thread waits on it."""
    make: Any = dist.TCPStore  # type: ignore[reportPrivateImportUsage]
    return make(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
