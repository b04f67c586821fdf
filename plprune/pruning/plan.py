"""The pruning plan: the units to keep, the importance of each block, and where they come from. It holds no weights.

On disk, a plan is a safetensors file of about a megabyte, with an int32 tensor `keep.<group>` for every group and a
tensor `importance`. All other fields are JSON under the metadata key `plprune`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plprune.io.atomic import staged

FILE = "plan.safetensors"


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """The decisions of one pruning.

    Args:
        keep: For each group by name, the indices of the units that stay, ascending; empty for a dropped attention, and
            for a dropped block (the group `blocks.<index>.block`).
        sizes: The number of units of each group before pruning.
        importance: The importance of each block, positive; only ratios matter.
        before: The number of parameters of each block before pruning.
        after: The number of parameters of each block after pruning; 0 for a dropped block.
        rest: The number of parameters outside the blocks (embeddings, head, final norm); tied ones count once.
        sparsity: The requested fraction of the blocks' parameters to remove.
        method: The class name of the method.
        settings: The settings of the method.
        repaired: Names, in the pruned model, of the parameters that the method changed or added.
        config: The model's config before pruning.
        origin: Model name, weights fingerprint, calibration fingerprint, seed, versions.
        previous: The plan of the previous pruning, for a model that was pruned before.
    """

    keep: dict[str, Tensor]
    sizes: dict[str, int]
    importance: Tensor  # [B]
    before: list[int]
    after: list[int]
    rest: int
    sparsity: float
    method: str
    settings: dict[str, Any]
    repaired: list[str] = dataclasses.field(default_factory=list)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    previous: "PruningPlan | None" = None

    @property
    def reached(self) -> float:
        """The fraction of the blocks' parameters that was removed."""
        return 1 - sum(self.after) / sum(self.before)

    @property
    def reached_of_model(self) -> float:
        """The fraction of the model's parameters that was removed."""
        return (sum(self.before) - sum(self.after)) / (sum(self.before) + self.rest)

    @property
    def damage(self) -> Tensor:  # [B]
        """The fraction of each block's parameters that was removed."""
        return 1 - torch.tensor(self.after, dtype=torch.float64) / torch.tensor(self.before, dtype=torch.float64)

    @property
    def dropped(self) -> list[int]:
        """Indices of the blocks that left, ascending."""
        return [i for i in range(len(self.before)) if block_name(i) in self.keep]

    @property
    def remaining(self) -> list[int]:
        """For each block of the pruned model, its index before."""
        return [i for i in range(len(self.before)) if block_name(i) not in self.keep]

    @property
    def digest(self) -> str:
        """A hash of all fields."""
        sha = hashlib.sha256(json.dumps(self._receipt(), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            sha.update(name.encode() + tensor.numpy().tobytes())
        return sha.hexdigest()[:16]

    def chain(self) -> "list[PruningPlan]":
        """All prunings of the model up to this one, oldest first."""
        return [*(self.previous.chain() if self.previous else []), self]

    def pruned_groups(self) -> set[str]:
        """Names, in the pruned model, of the groups that lost units by this plan or its predecessors."""
        groups: set[str] = set()
        for step in self.chain():
            groups |= {name for name, keep in step.keep.items() if len(keep) < step.sizes[name]}
            new = {block_name(old): f"blocks.{i}." for i, old in enumerate(step.remaining)}
            groups = {new[block_of(name)] + name.rpartition(".")[2] for name in groups if block_of(name) in new}
        return groups

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes the plan to a safetensors file atomically."""
        with staged(path, overwrite) as temporary:
            save_file(self._tensors(), temporary, metadata={"plprune": json.dumps(self._receipt())})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningPlan":
        """Reads a plan from a file, or from the folder of a pruned model.

        Raises:
            ValueError: The file does not exist, is damaged, or is not a plan.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.exists():
            raise ValueError(f"{path} does not exist: give a plan file, or a folder that plprune has written")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls._from_parts(tensors, json.loads(file.metadata()["plprune"]))
        except (SafetensorError, AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is truncated, corrupted or not a plan ({error}): write it again") from error

    def _tensors(self, prefix: str = "") -> dict[str, Tensor]:
        tensors = {f"{prefix}keep.{name}": index.to(torch.int32) for name, index in self.keep.items()}
        tensors[f"{prefix}importance"] = self.importance
        return tensors | (self.previous._tensors(f"previous.{prefix}") if self.previous else {})

    def _receipt(self) -> dict[str, Any]:
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("keep", "importance", "previous")]
        receipt = {name: getattr(self, name) for name in names}
        return receipt | ({"previous": self.previous._receipt()} if self.previous else {})

    @classmethod
    def _from_parts(cls, tensors: dict[str, Tensor], receipt: dict[str, Any], prefix: str = "") -> "PruningPlan":
        start = f"{prefix}keep."
        keep = {name.removeprefix(start): t.long() for name, t in tensors.items() if name.startswith(start)}
        before = receipt.pop("previous", None)
        previous = cls._from_parts(tensors, before, f"previous.{prefix}") if before else None
        return cls(keep=keep, importance=tensors[f"{prefix}importance"], previous=previous, **receipt)


def block_name(index: int) -> str:
    """The name under which a plan records that a whole block left."""
    return f"blocks.{index}.block"


def block_of(group: str) -> str:
    """The name of the block that a group belongs to.

    Example:
        >>> block_of("blocks.3.ffn")
        'blocks.3.block'
    """
    return group.rpartition(".")[0] + ".block"


def composed(kept: Tensor, index: Tensor) -> Tensor:
    """The units that two cuts keep; of experts the channels of each, unless experts left in between.

    Example:
        >>> composed(torch.tensor([1, 3, 4]), torch.tensor([0, 2]))
        tensor([1, 4])
    """
    return kept[index] if kept.ndim == 1 or len(kept) != len(index) else kept.gather(1, index)


def fingerprint(tensors: Iterable[tuple[str, Tensor]], values: int = 4096) -> str:
    """A hash of the name, shape and dtype of each tensor, and of up to `values` evenly spaced values.

    Example:
        >>> fingerprint([("w", torch.zeros(2))]) == fingerprint([("w", torch.ones(2))])
        False
    """
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // values)
        sha.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
