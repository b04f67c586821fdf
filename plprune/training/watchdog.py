"""Several processes that notice when one of them is gone, and say which.

A collective operation waits for a process that was killed or ran out of memory: minutes with NCCL, and what it says in
the end does not name the culprit. Every process therefore writes a sign of life to the store that the group was made
with, reads those of the others, and ends with one line once one of them has failed or fallen silent.
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
BEAT = 2.0  # seconds between signs of life
SILENCE = 40.0  # seconds without one, after which a process counts as gone
GRACE = 12.0  # the same, once the connection to some process is known to be broken
PREFIX = "plprune/alive/"
BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "recvValue failed", "Socket")


class Watch(pl.Callback):
    """Ends every process of a run within a minute when one of them has failed, with a line that names it.

    `plprune fit` adds it by itself. In a script of your own, list it first.
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
        self.setup(trainer, pl_module, "fit")  # it may have failed before
        if self._peers is None:
            return
        if isinstance(exception, RuntimeError) and any(sign in str(exception) for sign in BROKEN):
            self._peers.silence = GRACE  # another one's fault: the thread is about to name it
            self._peers.join(2 * GRACE)
        asked = isinstance(exception, SystemExit | KeyboardInterrupt)
        self._peers.leave(
            "done" if asked else f"failed: {' '.join(str(exception).split()) or type(exception).__name__}"
        )


class Peers(threading.Thread):
    """The signs of life of all processes.

    Args:
        rank: This process's.
        count: How many there are.
    """

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(daemon=True, name="plprune-watch")
        self.rank, self.count, self.silence = rank, count, SILENCE
        self.store = dist.PrefixStore(PREFIX, _own_store())  # type: ignore[reportPrivateImportUsage]
        self._left = threading.Event()
        self._last: dict[int, tuple[str, float]] = {}  # what each process wrote, and when that was first read
        self._beat()

    def run(self) -> None:
        while not self._left.wait(BEAT):
            if reason := self._look():
                log.error("plprune: error: %s; this was rank %d, which stops", reason, self.rank)
                os._exit(1)

    def leave(self, word: str) -> None:
        """The last sign of life."""
        if not self._left.is_set():
            self._left.set()
            with contextlib.suppress(RuntimeError):  # nobody may be there to read it
                self.store.set(str(self.rank), word)
            self.join(BEAT)  # a thread that the end of Python finds within the store would abort the process

    def _beat(self) -> None:
        self.store.set(str(self.rank), f"{time.time()} {platform.node()}, process {os.getpid()}")

    def _look(self) -> str | None:
        """What is wrong with another process, if anything is."""
        try:
            self._beat()
            return next(filter(None, map(self._wrong, range(self.count))), None)
        except RuntimeError as error:
            return f"rank 0 is gone, or the store that it keeps ({' '.join(str(error).split())[:120]})"

    def _wrong(self, rank: int) -> str | None:
        now = time.monotonic()
        if not self.store.check([str(rank)]):
            return None  # it has not begun
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


def _own_store() -> Any:
    """A connection of its own to the store: the group's would be held up by whoever waits on it."""
    make: Any = dist.TCPStore  # type: ignore[reportPrivateImportUsage]
    return make(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
