"""What a long pruning has done so far, on disk: after a kill at any moment it goes on with the block where it was.

A journal is a hidden folder beside the output. Whatever is in it was written under `new/`, flushed, and then renamed:
it is there whole or not at all, and what a killed run left under `new/` is thrown away. Nothing in it is pickled.

    asked.json      what was asked: a run that was asked for something else does not go on here
    walks/0/00012   what the first walk over the blocks knows after block 12: what was observed there, or which versions
                    of the block it made, and the hidden states that enter the next block
    blocks/00012.1  a block as a first change left it, a shard of the output; a second change would make 00012.2
    notes           results of searches that cost hours
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
from torch import Tensor, nn

from plprune.architecture.blocks import Decision
from plprune.io.atomic import writing
from plprune.io.progress import Progress
from plprune.io.state import read_state, read_tensors, write_state

ASKED, NEW = "asked.json", "new"

SHARD, DECISIONS, STATE, HIDDEN = "model.safetensors", "decisions.safetensors", "state.safetensors", "hidden"


@dataclass
class BlockRecord:
    """A block that a walk has behind it.

    Args:
        influence: The state of the influence that was measured.
        observed: The states of each observation's statistics, by consumer; None if the block was changed.
        version: The block's version when the walk left it.
    """

    influence: dict[str, Any]
    observed: list[dict[str, Any]] | None
    version: int


class Journal:
    """The journal of one output; no two processes write to it at the same time.

    Args:
        folder: Where it is.
        asked: What is asked of the run, in JSON's types; everything that decides the result.
        resume: Whether to go on with what is there, if anything is.
        overwrite: Whether to throw away what is there, unless `resume` is set.

    Raises:
        ValueError: What is there may not be thrown away, or was asked otherwise, or another process is at work on it.
        OSError: It cannot be written.
    """

    def __init__(self, folder: Path, asked: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
        self.folder, self.walks, self.walking, self.blocks = folder, 0, False, 0
        self._bar: Progress | None = None
        self.taken_over: list[Decision] = []  # decisions of earlier runs that nobody has written down yet
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            _lock(self._lock)
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
        """Lets other processes have it; what is in it stays."""
        if self._bar is not None:
            self._bar.close()
        os.close(self._lock)

    def remove(self) -> None:
        """Removes it, when all is done."""
        (self.folder / ASKED).unlink(missing_ok=True)  # without it the rest counts as nothing
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """An empty folder to fill, which takes the name `name` when the context ends well."""
        room, place = self.room(name.replace("/", "-")), self.folder / name
        with writing(place):
            try:
                yield room
                _flush(room)
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.exists():
                    shutil.rmtree(place)
                os.replace(room, place)
            finally:
                shutil.rmtree(room, ignore_errors=True)

    def room(self, name: str) -> Path:
        """An empty folder whose content need not survive the process."""
        room = self.folder / NEW / name
        with writing(room):
            shutil.rmtree(room, ignore_errors=True)
            room.mkdir(parents=True)
        return room

    def recall(self, key: str) -> Any:
        """What an earlier run has noted under this key; None if nothing."""
        file = self.folder / "notes" / key / "note.json"
        return json.loads(file.read_text()) if file.exists() else None

    def remember(self, key: str, value: Any) -> None:
        """Notes the result of a search, in JSON's types."""
        with self.publish(f"notes/{key}") as room:
            (room / "note.json").write_text(json.dumps(value))

    def version(self, block: int, number: int) -> Path:
        """Where a version of a block is, or would be."""
        return self.folder / "blocks" / f"{block:05}.{number}"

    def decided(self, block: int, number: int) -> list[Decision]:
        """The decisions that led to a version of a block from the one before it."""
        return [Decision(**decision) for decision in read_state(self.version(block, number) / DECISIONS)]

    def write_block(
        self,
        block: int,
        number: int,
        tensors: dict[str, Tensor],
        decisions: list[Decision],
        check: Callable[[Path, Iterable[tuple[str, Tensor]]], None],
    ) -> None:
        """Keeps a version of a block, once a check of the folder against its tensors has passed."""
        with self.publish(f"blocks/{self.version(block, number).name}") as room:
            save_file(tensors, room / SHARD, metadata={"format": "pt"})
            check(room, tensors.items())
            write_state([vars(decision) for decision in decisions], room / DECISIONS)

    def advance(self) -> None:
        """Shows how far the writing of blocks has come, unless a walk over them shows it."""
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
        with writing(file):
            file.unlink(missing_ok=True)
            for path in [path for path in self.folder.iterdir() if path.is_dir()]:
                shutil.rmtree(path)
            (self.folder / NEW).mkdir()
            (self.folder / NEW / ASKED).write_text(json.dumps(asked, indent=2))
            _flush(self.folder / NEW)
            os.replace(self.folder / NEW / ASKED, file)


class PassLog:
    """One walk over the blocks, of which earlier runs may have done a part; the journal tells walks apart by order.

    Args:
        journal: Where it is kept.
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
        """What is known of a block that is done, tensors on `device` that were on an accelerator."""
        return BlockRecord(**read_state(self._place(index) / STATE, device))

    def entering(self) -> "DiskStates":
        """The hidden states that enter the first block that is not done."""
        return DiskStates(self._place(self.done - 1) / HIDDEN)

    def commit(self, record: BlockRecord, leaving: "Sequence[Tensor] | DiskStates | None") -> None:
        """Keeps what is known of the next block, and what leaves it, if another follows; all of it or nothing."""
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
    """Tensors in files, one in memory at a time.

    Args:
        folder: Where they are, and more are put.
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
        return read_tensors(self._file(index))[
            "x"
        ].clone()  # a clone is aligned, as what is computed is; a map may not be

    def append(self, tensor: Tensor) -> None:
        """Adds one at the end."""
        with writing(self.folder):
            save_file({"x": tensor.detach().cpu().contiguous()}, self._file(len(self)))

    def discard(self) -> None:
        """Removes the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def move(self, folder: Path) -> None:
        """Moves the files; where they end up is for the caller to say."""
        os.replace(self.folder, folder)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05}.safetensors"


class NotFinite(ValueError):
    """There is NaN or infinity among what was computed."""


def journal_of(model: nn.Module) -> Journal | None:
    """The journal of a model whose pruning is kept on disk."""
    return getattr(model, "journal", None)


def _check_same(there: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    old, new = _flat(there), _flat(json.loads(json.dumps(asked)))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            raise ValueError(
                f"the unfinished run in {folder} has another {key} ({old.get(key)}, now {new.get(key)}): give the same "
                "command, or start again by --overwrite without --resume"
            )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by their own names."""
    return {
        name: value
        for key, content in values.items()
        for name, value in (content if isinstance(content, dict) else {key: content}).items()
    }


def _lock(handle: int) -> None:
    """Locks an open file until it is closed, or the process is gone.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush(folder: Path) -> None:
    """Makes sure that the files of a folder are on the disk: a name that is given them later is then of whole files."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
