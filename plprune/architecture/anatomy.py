"""The prunable units of a decoder block, as rows and columns of its projections.

An :class:`Anatomy` describes one kind of block in its dense size. As all units are alike, a block that has lost some
has the first of these units, with the rows and columns that remain counted anew (:meth:`Part.of_size`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """The part of one projection that belongs to a group: `index[u]` are the rows or columns of unit `u`.

    The path may also be that of a norm, a convolution, or a parameter, whose `axis` then holds the rows.
    """

    path: str
    index: Tensor  # [units, rows or columns per unit], int64
    axis: int = 0


@dataclass(frozen=True)
class Part:
    """All units of one kind in a dense block.

    Args:
        producers: Rows that compute the units.
        consumer: Columns that read them.
        counts: Attributes that the forward pass reads instead of shapes, and what each unit has of their values. A
            `config` in a path becomes a view of the config for that block alone.
        tied: Whether norms over all units tie them together; pruning then treats the norm's statistic as constant.
    """

    producers: tuple[Slice, ...]
    consumer: Slice
    counts: Mapping[str, int] = field(default_factory=dict)
    tied: bool = False

    def __len__(self) -> int:
        return len(self.consumer.index)

    @property
    def columns(self) -> int:
        """Columns per unit."""
        return self.consumer.index.shape[1]

    def of_size(self, units: int) -> tuple[tuple[Slice, ...], Slice]:
        """Producers and consumer of a block with fewer of these units, or of one padded to more channels."""
        if units == len(self):
            return self.producers, self.consumer
        if units > len(self):
            return self.stacked(units), Slice(self.consumer.path, torch.arange(units)[:, None])
        gone = {key: index[units:].flatten() for key, index in by_producer(self.producers).items()}
        producers = tuple(
            Slice(p.path, _renumbered(p.index[:units], gone[p.path, p.axis]), p.axis) for p in self.producers
        )
        columns = self.consumer.index
        kept = _renumbered(columns[:units], columns[units:].flatten())
        return producers, Slice(self.consumer.path, kept, self.consumer.axis)

    def stacked(self, units: int) -> tuple[Slice, ...]:
        """The rows of channels in producers that hold one part after another, as gate and up."""
        seen: dict[str, int] = {}
        parts = []
        for part in self.producers:
            start = seen.get(part.path, 0)
            parts.append(Slice(part.path, torch.arange(start, start + units)[:, None], part.axis))
            seen[part.path] = start + units
        return tuple(parts)


@dataclass(frozen=True)
class Experts:
    """The experts of a dense block, whose weights are stacked: the first axis of each tensor is the expert.

    Args:
        path: The module with the stacked weights, which `transformers.integrations.moe` runs.
        units: The experts: an entry of every tensor that has one for each of them, router and buffers included.
        channels: The channels between the two layers of each expert.
        active: Experts per token.
        groups: Groups of neighbouring experts, of which a router may choose first; all keep as many.
        key: The config's key for the number of experts.
        least: The least number of experts with which the router runs.
        outside: Attributes outside of the blocks that hold the number of experts, for the loss of unequal loads.
    """

    path: str
    units: Part
    channels: Part
    active: int
    groups: int = 1
    key: str = ""
    least: int = 1
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class SubBlock:
    """A sub-block in whose place zeros do what zeros from its last projections do.

    Args:
        path: Of its module in the block.
        returned: Length of the tuple that it returns; 0 if it returns hidden states alone.
    """

    path: str
    returned: int


@dataclass(frozen=True)
class Anatomy:
    """The units of one kind of block."""

    attention: Part | None = None
    values: Part | None = None  # single value channels of the attention
    ffn: Part | None = None
    mixer: str = ""  # path of the sub-block with the attention's projections
    returned: int = 0  # length of the tuple that the block returns; 0 if it returns hidden states alone
    droppable: bool = False  # whether zeros in the place of that sub-block's output remove it
    whole: Mapping[str, str] = field(default_factory=dict)  # kind of units that the block has none of -> why
    refused: Mapping[str, str] = field(default_factory=dict)  # kind of units that failed their proof -> how
    experts: Experts | None = None
    whole_ffn: SubBlock | None = None  # with the FFN, or with the experts and what is beside them, if it can leave

    @property
    def head_dim(self) -> int:
        """Value channels per head; columns per head if single channels cannot leave."""
        assert self.attention is not None
        return len(self.values) // len(self.attention) if self.values else self.attention.columns

    def refusing(self, kind: str, how: str) -> "Anatomy":
        """The anatomy without units that failed their proof."""
        return replace(self._without(kind), refused={**self.refused, kind: how})

    def keeping(self, kind: str, why: str) -> "Anatomy":
        """The anatomy without units that cannot leave."""
        return replace(self._without(kind), whole={**self.whole, kind: why})

    def _without(self, kind: str) -> "Anatomy":
        gone: dict[str, Any] = {kind: None}
        if kind == "attention":
            gone |= {"values": None, "droppable": False}
        return replace(self, **gone)


@dataclass(frozen=True)
class ModelAnatomy:
    """Where a model has its decoder blocks, and the anatomy of each."""

    blocks: str
    anatomies: tuple[Anatomy, ...]


def by_producer(slices: Sequence[Slice]) -> dict[tuple[str, int], Tensor]:
    """The rows of each producer, [units, rows per unit], by path and axis."""
    joined: dict[tuple[str, int], Tensor] = {}
    for each in slices:
        key = each.path, each.axis
        joined[key] = torch.cat([joined[key], each.index], 1) if key in joined else each.index
    return joined


def _renumbered(index: Tensor, gone: Tensor) -> Tensor:
    """Indices after others are gone."""
    return index - torch.searchsorted(gone.sort().values, index.flatten()).view_as(index)
