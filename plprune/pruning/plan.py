"""The pruning plan: which units stay, how much each block matters, and where all of it came from.

A plan is structure and receipt, not weights. On disk it is a safetensors file of about a megabyte: an int32 tensor
`keep.<group>` for every group, `importance`, and everything else as JSON under the metadata key `plprune`.
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
    """What a pruning decided.

    Args:
        keep: Indices that stay, ascending, for each group by name; empty for a dropped attention sub-block.
        sizes: Units of each group before.
        importance: Importance of each block, positive; only ratios matter.
        before: Parameters of each block before.
        after: Parameters of each block after.
        rest: Parameters outside the blocks (embeddings, head, final norm), tied ones once.
        sparsity: The fraction of the blocks' parameters that was asked for.
        method: Class name of the method.
        settings: The method's settings.
        repaired: Names of the parameters whose values the method changed or added.
        config: The model's configuration before.
        origin: Model name, weights fingerprint, calibration fingerprint, seed, versions.
        previous: The plan by which the model had been pruned before.
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
        """The fraction of the blocks' parameters that left."""
        return 1 - sum(self.after) / sum(self.before)

    @property
    def reached_of_model(self) -> float:
        """The fraction of all the model's parameters that left."""
        return (sum(self.before) - sum(self.after)) / (sum(self.before) + self.rest)

    @property
    def damage(self) -> Tensor:  # [B]
        """The fraction of each block's parameters that left."""
        return 1 - torch.tensor(self.after, dtype=torch.float64) / torch.tensor(self.before, dtype=torch.float64)

    @property
    def digest(self) -> str:
        """A hash of the decisions and of what they were taken from, the same for the same plan."""
        sha = hashlib.sha256(json.dumps(self._receipt(), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            sha.update(name.encode() + tensor.numpy().tobytes())
        return sha.hexdigest()[:16]

    def chain(self) -> "list[PruningPlan]":
        """All the plans that led here, the oldest first."""
        return [*(self.previous.chain() if self.previous else []), self]

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes the plan to one safetensors file, whole or not at all."""
        with staged(path, overwrite) as temporary:
            save_file(self._tensors(), temporary, metadata={"plprune": json.dumps(self._receipt())})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningPlan":
        """Reads a plan from its file, or from the folder that holds it.

        Raises:
            ValueError: The file is truncated, or no plan.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.exists():
            raise ValueError(f"{path} does not exist: name a plan file, or a folder that plprune has written")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls._from_parts(tensors, json.loads(file.metadata()["plprune"]))
        except (SafetensorError, AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is truncated, corrupted or no pruning plan ({error}): write it again") from error

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


def fingerprint(tensors: Iterable[tuple[str, Tensor]], values: int = 4096) -> str:
    """A hash of names, shapes and up to `values` evenly spaced values of each tensor: enough to tell models apart.

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
