"""Collections of hidden states, in memory or in files."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from plprune.io.atomic import write_errors
from plprune.io.state import read_tensors


class MemoryStates(list[Tensor]):
    """Hidden states in memory, on one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def append(self, hidden: Tensor) -> None:
        super().append(hidden.to(self.device))

    def discard(self) -> None:
        """Does nothing: there are no files to delete."""


class DiskStates(Sequence[Tensor]):
    """Hidden states in files, one file per batch; one batch is in memory at a time.

    Args:
        folder: The folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(list(self.folder.iterdir()))

    def __getitem__(self, index: Any) -> Any:  # an integer gives a tensor; slices are not supported
        if not 0 <= index < len(self):
            raise IndexError(index)
        return read_tensors(self._file(index))["x"].clone()  # aligned like a computed tensor; a mapped one may not be

    def append(self, hidden: Tensor) -> None:
        with write_errors(self.folder):
            save_file({"x": hidden.detach().cpu().contiguous()}, self._file(len(self)))

    def discard(self) -> None:
        """Deletes the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05}.safetensors"


HiddenStates = MemoryStates | DiskStates


class Part(Sequence[Tensor]):
    """Some of the hidden states of a collection, which stay where they are.

    Args:
        states: The collection.
        places: The places of these in it.
    """

    def __init__(self, states: HiddenStates, places: range) -> None:
        self.states, self.places = states, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.states[self.places[index]]
