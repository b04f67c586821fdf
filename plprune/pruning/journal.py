"""The progress of a long pruning, on disk: a run that is killed at any moment resumes at the block where it stopped.

A journal is a hidden folder beside the output. Everything in it is written under `new/`, flushed, and then renamed, so
that it is complete or absent. A resumed run deletes what is left under `new/`. Nothing is pickled.

    asked.json      the request: a run with another request is refused
    passes/0/00012  the record of block 12 in the first pass over the blocks: its statistics, or the version of the
                    block that the pass made; and the hidden states that enter the next block
    blocks/00012.1  block 12 after its first change, a shard of the output; a second change makes 00012.2
    results         results of long searches, by key
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from plprune.architecture.blocks import Decision
from plprune.io.atomic import flush, lock, write_errors
from plprune.io.progress import Progress
from plprune.io.state import read_state, write_state
from plprune.pruning.hidden_states import DiskStates, HiddenStates, MemoryStates

T = TypeVar("T")
ASKED, NEW = "asked.json", "new"
SHARD, DECISIONS, STATE, HIDDEN = "model.safetensors", "decisions.safetensors", "state.safetensors", "hidden"


class NoJournal:
    """Takes the place of a journal when the model is in memory: nothing is stored, nothing is resumed."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []  # of this pruning, in order; with those that an earlier run has carried out

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """The result of `compute`, which a journal stores by its key and then computes only once for all runs.

        Args:
            key: A file name.
            compute: Returns a value of JSON's types.
        """
        return compute()

    def hidden_states(self, device: torch.device) -> HiddenStates:
        """An empty collection of hidden states: on disk if the model's blocks are there too, else on `device`."""
        return MemoryStates(device)


@dataclass
class BlockRecord:
    """The result of one block in one pass.

    Args:
        influence: State of the :class:`BlockInfluence`.
        observed: States of the statistics by consumer, for each observation; None if the pass changed the block.
        version: The block's version at the end.
    """

    influence: dict[str, Any]
    observed: list[dict[str, Any]] | None
    version: int


class Journal(NoJournal):
    """The journal of one output. Only one process at a time can open it.

    Args:
        folder: The folder.
        asked: The request, in JSON's types: everything that the result depends on.
        resume: Whether to continue an unfinished run, if there is one.
        overwrite: Whether to delete an unfinished run, unless `resume` is set.

    Raises:
        ValueError: There is an unfinished run and neither flag is set, or its request differs, or another process has
            the journal open.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, asked: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
        super().__init__()
        self.folder, self.passes, self.in_pass, self.blocks = folder, 0, False, 0
        self._bar: Progress | None = None
        self._collections = itertools.count()
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            lock(self._lock)
            self._begin(asked, resume, overwrite)
        except BlockingIOError as error:
            self.close()
            raise ValueError(
                f"another process is at work on {folder}: wait for it, or choose another output"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        started = any((self.folder / kind).exists() for kind in ("passes", "blocks", "results"))
        if not started or issubclass(raised or object, NotFinite):  # a resumed run would come to the same NaN
            self.remove()
        self.close()

    def close(self) -> None:
        """Releases the lock; the files stay."""
        if self._bar is not None:
            self._bar.close()
        os.close(self._lock)

    def remove(self) -> None:
        """Deletes the folder."""
        (self.folder / ASKED).unlink(missing_ok=True)  # first, as without it the other files count as absent
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """An empty folder, which is renamed to `name` if the context ends without an error."""
        scratch, target = self.scratch(name.replace("/", "-")), self.folder / name
        with write_errors(target):
            try:
                yield scratch
                flush(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def scratch(self, name: str) -> Path:
        """An empty folder for files that are not needed after the process ends."""
        folder = self.folder / NEW / name
        with write_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder

    def once(self, key: str, compute: Callable[[], T]) -> T:
        file = self.folder / "results" / key / "result.json"
        if not file.exists():
            result = compute()
            with self.publish(f"results/{key}") as folder:
                (folder / file.name).write_text(json.dumps(result))
        return json.loads(file.read_text())

    def hidden_states(self, device: torch.device) -> HiddenStates:
        return DiskStates(self.scratch(f"states.{next(self._collections)}"))

    def version(self, block: int, number: int) -> Path:
        """The folder of a version of a block, which need not exist."""
        return self.folder / "blocks" / f"{block:05}.{number}"

    def decisions_of(self, block: int, number: int) -> list[Decision]:
        """The decisions that turned the previous version of a block into this one."""
        return [Decision(**decision) for decision in read_state(self.version(block, number) / DECISIONS)]

    def write_block(
        self,
        block: int,
        number: int,
        tensors: dict[str, Tensor],
        decisions: list[Decision],
        check: Callable[[Path, Iterable[tuple[str, Tensor]]], None],
    ) -> None:
        """Stores a version of a block, if `check` finds that the files agree with the tensors."""
        with self.publish(f"blocks/{self.version(block, number).name}") as folder:
            save_file(tensors, folder / SHARD, metadata={"format": "pt"})
            check(folder, tensors.items())
            write_state([vars(decision) for decision in decisions], folder / DECISIONS)

    def advance(self) -> None:
        """Advances the progress bar of written blocks; during a pass there is none, as the pass shows its own."""
        if self._bar is None and not self.in_pass:
            self._bar = Progress(self.blocks, "writing blocks", "block")
            self._bar.n = 1
        elif self._bar is not None and self._bar.n < self.blocks:
            self._bar.update()

    def _begin(self, asked: dict[str, Any], resume: bool, overwrite: bool) -> None:
        file = self.folder / ASKED
        shutil.rmtree(self.folder / NEW, ignore_errors=True)
        if file.exists() and not resume and not overwrite:
            raise ValueError(
                f"an unfinished run is in {self.folder}: go on with it by --resume, or start again by --overwrite"
            )
        if file.exists() and resume:
            return _check_same(json.loads(file.read_text()), asked, self.folder)
        with write_errors(file):
            file.unlink(missing_ok=True)
            for path in [path for path in self.folder.iterdir() if path.is_dir()]:
                shutil.rmtree(path)
            (self.folder / NEW).mkdir()
            (self.folder / NEW / ASKED).write_text(json.dumps(asked, indent=2))
            flush(self.folder / NEW)
            os.replace(self.folder / NEW / ASKED, file)


class PassLog:
    """The records of one pass over the blocks; an earlier run may have written the first of them.

    Passes are numbered in the order in which the method makes them.

    Args:
        journal: The journal that stores the records.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal, self.folder = journal, journal.folder / f"passes/{journal.passes}"
        journal.passes += 1
        self.done = len(list(self.folder.iterdir())) if self.folder.exists() else 0
        for index in range(self.done - 1):
            shutil.rmtree(self._place(index) / HIDDEN, ignore_errors=True)

    def __enter__(self) -> "PassLog":
        self.journal.in_pass = True
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.in_pass = False

    def read(self, index: int, device: torch.device) -> BlockRecord:
        """The record of a block; tensors that were on an accelerator go to `device`."""
        return BlockRecord(**read_state(self._place(index) / STATE, device))

    def entering(self) -> DiskStates:
        """The hidden states that enter the first block without a record."""
        return DiskStates(self._place(self.done - 1) / HIDDEN)

    def append(self, record: BlockRecord, leaving: HiddenStates | None) -> None:
        """Stores the record of the next block, and the hidden states that leave it, in one step."""
        place = self._place(self.done)
        with self.journal.publish(str(place.relative_to(self.journal.folder))) as folder:
            write_state(vars(record), folder / STATE)
            if isinstance(leaving, DiskStates):
                os.replace(leaving.folder, folder / HIDDEN)
            elif leaving is not None:
                (folder / HIDDEN).mkdir()
                copies = DiskStates(folder / HIDDEN)
                for hidden in leaving:
                    copies.append(hidden)
        if isinstance(leaving, DiskStates):
            leaving.folder = place / HIDDEN
        if self.done:
            shutil.rmtree(self._place(self.done - 1) / HIDDEN, ignore_errors=True)
        self.done += 1

    def _place(self, index: int) -> Path:
        return self.folder / f"{index:05}"


class NotFinite(ValueError):
    """A computed value is NaN or infinite."""


def _check_same(stored: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    old, new = _flat(stored), _flat(json.loads(json.dumps(asked)))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            raise ValueError(
                f"the unfinished run in {folder} has another {key} ({old.get(key)}, now {new.get(key)}): give the same "
                "command, or start again by --overwrite without --resume"
            )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as one dictionary."""
    return {
        name: value
        for key, content in values.items()
        for name, value in (content if isinstance(content, dict) else {key: content}).items()
    }
