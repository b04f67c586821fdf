r"""The decoder blocks of a model, and the groups of prunable units in each.

A :class:`UnitGroup` holds all units of one kind in one block. Removing unit `u` removes the rows `index[u]` of every
producer and the columns `index[u]` of the consumer. Groups store indices, so fused projections need no extra code: a
family names the path of a fused projection once for each part, in the order of the parts.

Rows are outputs and columns are inputs, also for a `Conv1D`, which stores its weight transposed: :func:`matrix` returns
every weight as [d_out, d_in].

=============  =======================  ===========================  ==================================
kind           unit                     producers                    consumer
=============  =======================  ===========================  ==================================
``attention``  kv head, with its query  rows of Q, K and V, and of   columns of the output projection
               heads                    norms over all heads
``value``      value channel            rows of V                    the same channel of each query head
``ffn``        FFN channel              rows of gate and up, or fc1  columns of down, or fc2
=============  =======================  ===========================  ==================================

Symbols: B blocks, d model width, n FFN width, H query heads, hd head dimension, g query heads per kv head.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.attached import attached
from plprune.architecture.families import Family, family_of
from plprune.architecture.modules import dense_weight, innermost, kept_rows, matrix, on_device, width


@dataclass(frozen=True)
class Decision:
    """The units of one group that stay, and the parameters that were repaired."""

    group: str  # its name
    keep: Tensor  # indices of the units that stay
    size: int  # the number of units before
    repaired: list[str] = field(default_factory=list)  # names of the parameters that were changed or added

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and self._parts() == other._parts()

    def _parts(self) -> dict[str, Any]:
        return asdict(self) | {"keep": self.keep.tolist()}


Kind = Literal["attention", "value", "ffn"]
UNITS = {"attention": "kv heads", "value": "value channels", "ffn": "FFN channels"}
AttentionUnit = Literal["kv_heads", "value_channels", "none"]  # what a method removes from attention


@dataclass(frozen=True)
class Slice:
    """The part of one projection that belongs to a group: `index[u]` are the rows or columns of unit `u`."""

    path: str
    index: Tensor  # [units, rows or columns per unit], int64


@dataclass(frozen=True)
class UnitGroup:
    """All units of one kind in one block, and the rows and columns that each unit consists of."""

    block: int
    kind: Kind
    producers: tuple[Slice, ...]
    consumer: Slice

    @property
    def name(self) -> str:
        return f"blocks.{self.block}.{self.kind}"

    def __len__(self) -> int:
        return len(self.consumer.index)


class Home(ABC):
    """Stores the weights of a block outside memory. It is attached to the block's module."""

    version: int  # how many times the block was written

    @abstractmethod
    def present(self, device: torch.device | None) -> contextlib.AbstractContextManager[None]:
        """Loads the weights for the duration of the context, and stores changes."""

    @abstractmethod
    def note(self, decision: Decision) -> None:
        """Records a decision that was applied to the block while it is loaded."""


@dataclass(frozen=True)
class Block:
    """One decoder block: its index, its module and the names of its parts."""

    index: int
    module: nn.Module
    family: Family

    @property
    def home(self) -> Home | None:
        """The storage of the weights, if they are not in memory."""
        return attached(self.module, Home)

    def present(self, device: torch.device | None = None) -> contextlib.AbstractContextManager[None]:
        """Loads the block, and moves it to `device` if given, for the duration of the context; changes are kept."""
        if self.home is not None:
            return self.home.present(device)
        return contextlib.nullcontext() if device is None else on_device(self.module, device)

    def part(self, path: str) -> nn.Module:
        """The module at `path`; a projection may be an `nn.Linear`, or the gather or scatter around one."""
        return self.module.get_submodule(path)

    def weight(self, group: UnitGroup) -> Tensor:  # [d, units, columns per unit]
        """The columns of the consumer's weight, grouped by unit."""
        with self.present():
            weight, index = dense_weight(self.part(group.consumer.path)), group.consumer.index
            return weight[:, index.to(weight.device)]

    def cost(self, group: UnitGroup) -> int:
        """Parameters of one unit."""
        rows = sum(s.index.shape[1] * _per_row(self.part(s.path)) for s in group.producers)
        return rows + group.consumer.index.shape[1] * len(matrix(self.part(group.consumer.path)))

    def absent_bias(self, group: UnitGroup) -> int:
        """Parameters that a bias would add to the consumer; 0 if it has one."""
        consumer = self.part(group.consumer.path)
        return len(matrix(consumer)) if innermost(consumer).bias is None else 0

    def parameters(self, path: str = "") -> int:
        """Parameters of the block, or of its part at `path`."""
        return sum(p.numel() for p in self.part(path).parameters())

    @property
    def has_attention(self) -> bool:
        return hasattr(self.part(self.family.attention), self.family.head_dim)

    @property
    def channels(self) -> int:
        """Width of the FFN."""
        return width(self.part(self.family.ffn_out), "in_features")

    @property
    def attention_paths(self) -> list[str]:
        """Paths of the attention's projections, without duplicates; empty if the attention was dropped."""
        return list(dict.fromkeys((*self.family.qkv, self.family.output))) if self.has_attention else []

    @property
    def projections(self) -> list[str]:
        """Paths of all projections, without duplicates."""
        return list(dict.fromkeys((*self.attention_paths, *self.family.ffn_in, self.family.ffn_out)))

    def groups(self, attention: AttentionUnit = "kv_heads") -> list[UnitGroup]:
        """The block's groups: the attention's with the given unit, if any, and the FFN's."""
        make = {"kv_heads": self._kv_heads, "value_channels": self._value_channels}.get(attention)
        return [make(), self._channels()] if make and self.has_attention else [self._channels()]

    @property
    def kv_heads(self) -> int:
        return width(self.part(self.family.output), "in_features") // (self.queries_per_head * self.head_dim)

    @property
    def queries_per_head(self) -> int:
        """Query heads per kv head (g)."""
        return cast(int, getattr(self.part(self.family.attention), "num_key_value_groups", 1))

    @property
    def head_dim(self) -> int:
        return cast(int, getattr(self.part(self.family.attention), self.family.head_dim))

    def _kv_heads(self) -> UnitGroup:
        columns = torch.arange(width(self.part(self.family.output), "in_features")).view(self.kv_heads, -1)
        producers = (*self._norms(), *self._projected())
        return UnitGroup(self.index, "attention", producers, Slice(self.family.output, columns))

    def _value_channels(self) -> UnitGroup:
        kv, g, hd = self.kv_heads, self.queries_per_head, self.head_dim
        values = self._projected()[2]
        rows = values.index.flatten()
        present = torch.isin(rows, kept_rows(self.part(values.path)))  # an earlier pruning may have removed some
        columns = torch.arange(kv * g * hd).view(kv, g, hd).transpose(1, 2).reshape(kv * hd, g)
        consumer = Slice(self.family.output, columns[present])
        return UnitGroup(self.index, "value", (Slice(values.path, rows[present, None]),), consumer)

    def _projected(self) -> list[Slice]:
        """The rows of queries, keys and values, by kv head."""
        kv, sizes = self.kv_heads, self._per_kv_head()
        if self.family.interleaved:
            parts = torch.arange(kv * sum(sizes)).view(kv, -1).split(sizes, dim=1)
            return [Slice(path, rows) for path, rows in zip(self.family.qkv, parts, strict=True)]
        stacked = _stacked(self.family.qkv, tuple(kv * size for size in sizes))
        return [Slice(path, rows.view(kv, -1)) for path, rows in stacked]

    def _norms(self) -> list[Slice]:
        """The values of norms over all heads, by kv head."""
        sizes = self._per_kv_head()
        return [
            Slice(path, torch.arange(self.kv_heads * size).view(-1, size))
            for path, size in zip(self.family.qk_norms, sizes, strict=False)
        ]

    def _per_kv_head(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values that belong to one kv head."""
        return self.queries_per_head * self.head_dim, self.head_dim, self.head_dim

    def _channels(self) -> UnitGroup:
        channels = self.channels
        parts = _stacked(self.family.ffn_in, (channels,) * len(self.family.ffn_in))
        producers = tuple(Slice(path, rows[:, None]) for path, rows in parts)
        return UnitGroup(self.index, "ffn", producers, Slice(self.family.ffn_out, torch.arange(channels)[:, None]))


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of a model, in depth order."""
    family = family_of(model.config)
    modules = cast(Iterable[nn.Module], model.get_submodule(family.blocks))
    return [Block(i, module, family) for i, module in enumerate(modules)]


def _per_row(module: nn.Module) -> int:
    weight = matrix(module)
    return weight[0].numel() + (getattr(innermost(module), "bias", None) is not None)


def _stacked(paths: tuple[str, ...], sizes: tuple[int, ...]) -> list[tuple[str, Tensor]]:
    """Row indices of each part. Parts with the same path follow each other."""
    start = dict.fromkeys(paths, 0)
    parts = []
    for path, size in zip(paths, sizes, strict=True):
        parts.append((path, torch.arange(start[path], start[path] + size)))
        start[path] += size
    return parts
