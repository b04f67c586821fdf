"""The progress of a long pruning, on disk: a run that is killed at any moment resumes at the block where it stopped.

A journal is a hidden folder beside the output. Everything in it is written under `new/`, flushed, and then renamed, so
that it is complete or absent. A resumed run deletes what is left under `new/`. Nothing is pickled.

    asked.json      the request: a run with another request is refused
    walks/0/00012   the record of block 12 in the first pass over the blocks: its statistics, or the version of the
                    block that the pass made; and the hidden states that enter the next block
    blocks/00012.1  block 12 after its first change, a shard of the output; a second change makes 00012.2
    notes           results of searches that take hours
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import save_file
from torch import Tensor

from plprune.architecture.blocks import Decision
from plprune.io.atomic import flush, lock, write_errors
from plprune.io.progress import Progress
from plprune.io.state import read_state, read_tensors, write_state

ASKED, NEW = "asked.json", "new"
SHARD, DECISIONS, STATE, HIDDEN = "model.safetensors", "decisions.safetensors", "state.safetensors", "hidden"


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


class Journal:
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
        self.folder, self.walks, self.walking, self.blocks = folder, 0, False, 0
        self._bar: Progress | None = None
        self.taken_over: list[Decision] = []  # decisions of earlier runs that no plan has yet
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
        started = any((self.folder / kind).exists() for kind in ("walks", "blocks", "notes"))
        if not started or issubclass(raised or object, NotFinite):  # a run that goes on would come to the same
            self.remove()
        self.close()

    def close(self) -> None:
        """Releases the lock; the files stay."""
        if self._bar is not None:
            self._bar.close()
        os.close(self._lock)

    def remove(self) -> None:
        """Deletes the folder."""
        (self.folder / ASKED).unlink(missing_ok=True)  # without it the rest counts as nothing
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """An empty folder, which is renamed to `name` if the context ends without an error."""
        room, place = self.room(name.replace("/", "-")), self.folder / name
        with write_errors(place):
            try:
                yield room
                flush(room)
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.exists():
                    shutil.rmtree(place)
                os.replace(room, place)
            finally:
                shutil.rmtree(room, ignore_errors=True)

    def room(self, name: str) -> Path:
        """An empty folder for files that are not needed after the process ends."""
        room = self.folder / NEW / name
        with write_errors(room):
            shutil.rmtree(room, ignore_errors=True)
            room.mkdir(parents=True)
        return room

    def recall(self, key: str) -> Any:
        """The value that an earlier run stored under this key, or None."""
        file = self.folder / "notes" / key / "note.json"
        return json.loads(file.read_text()) if file.exists() else None

    def remember(self, key: str, value: Any) -> None:
        """Stores the result of a search, in JSON's types."""
        with self.publish(f"notes/{key}") as room:
            (room / "note.json").write_text(json.dumps(value))

    def version(self, block: int, number: int) -> Path:
        """The folder of a version of a block, which need not exist."""
        return self.folder / "blocks" / f"{block:05}.{number}"

    def decided(self, block: int, number: int) -> list[Decision]:
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
        with self.publish(f"blocks/{self.version(block, number).name}") as room:
            save_file(tensors, room / SHARD, metadata={"format": "pt"})
            check(room, tensors.items())
            write_state([vars(decision) for decision in decisions], room / DECISIONS)

    def advance(self) -> None:
        """Advances the bar of written blocks; during a pass, the bar of the pass is shown instead."""
        if self._bar is None and not self.walking:
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
    """The records of one pass over the blocks. Earlier runs may have made some; passes are identified by their order.

    Args:
        journal: The journal that has them.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal, self.name = journal, f"walks/{journal.walks}"
        journal.walks += 1
        folder = journal.folder / self.name
        self.done = len(list(folder.iterdir())) if folder.exists() else 0
        for index in range(self.done - 1):
            shutil.rmtree(self._place(index) / HIDDEN, ignore_errors=True)

    def __enter__(self) -> "PassLog":
        self.journal.walking = True
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.walking = False

    def record(self, index: int, device: torch.device) -> BlockRecord:
        """The record of a block; tensors that were on an accelerator go to `device`."""
        return BlockRecord(**read_state(self._place(index) / STATE, device))

    def entering(self) -> "DiskStates":
        """The hidden states that enter the first block without a record."""
        return DiskStates(self._place(self.done - 1) / HIDDEN)

    def commit(self, record: BlockRecord, leaving: "Sequence[Tensor] | DiskStates | None") -> None:
        """Stores the record of the next block, and the hidden states that leave it, in one step."""
        with self.journal.publish(str(self._place(self.done).relative_to(self.journal.folder))) as room:
            write_state(vars(record), room / STATE)
            if isinstance(leaving, DiskStates):
                leaving.move(room / HIDDEN)
            elif leaving is not None:
                (room / HIDDEN).mkdir()
                copies = DiskStates(room / HIDDEN)
                for hidden in leaving:
                    copies.append(hidden)
        if isinstance(leaving, DiskStates):
            leaving.folder = self._place(self.done) / HIDDEN
        if self.done:
            shutil.rmtree(self._place(self.done - 1) / HIDDEN, ignore_errors=True)
        self.done += 1

    def _place(self, index: int) -> Path:
        return self.journal.folder / self.name / f"{index:05}"


class DiskStates(Sequence[Tensor]):
    """Hidden states in files, one in memory at a time.

    Args:
        folder: The folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(list(self.folder.iterdir()))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return read_tensors(self._file(index))["x"].clone()  # aligned like a computed tensor; a mapped one may not be

    def append(self, tensor: Tensor) -> None:
        """Writes one more."""
        with write_errors(self.folder):
            save_file({"x": tensor.detach().cpu().contiguous()}, self._file(len(self)))

    def discard(self) -> None:
        """Deletes the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def move(self, folder: Path) -> None:
        """Moves the files; the caller then sets `folder`."""
        os.replace(self.folder, folder)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05}.safetensors"


class NotFinite(ValueError):
    """A computed value is NaN or infinite."""


def _check_same(there: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    old, new = _flat(there), _flat(json.loads(json.dumps(asked)))
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
