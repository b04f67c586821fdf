"""Counts the parameters, memory and operations of a model, dense or pruned. All weights may be on the meta device.

A pruned model can be counted in two ways. :class:`Ledger` adds up the costs of units, which is fast enough to search
for a target. :func:`pruned_skeleton` runs the real pruning code on a copy. Tests make sure that both agree.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from plprune.architecture.blocks import IN_FFN, Block, UnitGroup, anatomy_of, blocks_of
from plprune.architecture.cutting import held
from plprune.architecture.modules import is_projection, matrix
from plprune.architecture.wrappers import text_parts
from plprune.pruning.plan import block_name, block_of
from plprune.pruning.surgery import Surgery

Counts = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Structure:
    """The size of a model, and of its KV cache and operations for sequences of a given length."""

    parameters: int  # tied ones once
    active_parameters: int  # of them, those that one token reaches: of the experts only as many as run for it
    block_parameters: int
    weight_bytes: int
    cache_bytes: int  # KV cache of one sequence
    reading_flops: int  # mean operations per token of a prompt, including the output head
    generating_flops: int  # operations per token generated after the prompt


def attention_spans(model: PreTrainedModel) -> list[float]:
    """The sliding window of each block in tokens; infinite without one."""
    layers: list[Any] = DynamicCache(config=model.config).layers or [None] * len(blocks_of(model))
    return [float(getattr(layer, "sliding_window", None) or math.inf) for layer in layers]


class Ledger:
    """Computes the size of a model whose groups keep given numbers of units.

    Args:
        model: The model before pruning.
        biased: Whether consumers that lose units gain a bias.
    """

    def __init__(self, model: PreTrainedModel, biased: bool = False) -> None:
        blocks = blocks_of(model)
        rows = [(b, g) for b in blocks for g in b.all_groups]
        self.costs = {g.name: b.cost(g) for b, g in rows}
        self.sizes = {g.name: len(g) for _, g in rows}
        self.biases = {g.name: b.absent_bias(g) if biased else 0 for b, g in rows}
        self.blocks = {block_name(b.index): b.parameters() for b in blocks}
        self.attention = {f"blocks.{b.index}.attention": b.parameters(b.anatomy.mixer) for b in blocks}
        wholes = [(b, group) for b in blocks if (group := b.whole_ffn)]
        self._wholes = {group.name: b.parameters(group.consumer.path) for b, group in wholes}
        self.sizes |= dict.fromkeys(self._wholes, 1)
        self.dense = sum(p.numel() for p in model.parameters())
        self.width = model.dtype.itemsize
        self._heads = {
            f"blocks.{b.index}.attention": (b.kv_heads, 2 * b.head_dim, span)
            for b, span in zip(blocks, attention_spans(model), strict=True)
            if b.has_kv_cache
        }
        self._mixtures = [_Mixture.of(b) for b in blocks if b.expert_count]

    def parameters(self, counts: Counts) -> int:
        """The number of parameters."""
        whole = {name for name in counts if name in self.blocks and not counts[name]}
        cut = {name: count for name, count in counts.items() if block_of(name) not in whole}
        bare = {name.rpartition(".")[0] for name, count in cut.items() if name in self._wholes and not count}
        cut = {
            name: count
            for name, count in cut.items()
            if not (name.rpartition(".")[2] in IN_FFN and name.rpartition(".")[0] in bare)
        }
        removed = sum(map(self.blocks.__getitem__, whole)) + sum(self._removed(*each) for each in cut.items())
        return self.dense - removed + sum(mixture.counted_twice(cut) for mixture in self._mixtures)

    def active_parameters(self, counts: Counts) -> int:
        """The parameters that one token reaches."""
        return self.parameters(counts) - sum(
            own.idle(counts)
            for own in self._mixtures
            if counts.get(block_of(own.experts), 1) and counts.get(own.experts.replace(".expert", ".whole_ffn"), 1)
        )

    def memory(self, counts: Counts, batch: int, context: int) -> int:
        """Bytes of the weights, and of the KV cache of `batch` sequences of `context` tokens."""
        cached = sum(
            counts.get(name, kv_heads) * per_head * min(context, span)
            for name, (kv_heads, per_head, span) in self._heads.items()
            if counts.get(block_of(name), 1)
        )
        return self.width * (self.parameters(counts) + round(batch * cached))

    def _removed(self, name: str, count: int) -> int:
        if count == self.sizes[name]:
            return 0
        if not count and name in (whole := self.attention | self._wholes):
            return whole[name]
        return (self.sizes[name] - count) * self.costs[name] - self.biases[name]


@dataclasses.dataclass(frozen=True)
class _Mixture:
    """The experts of a block.

    Args:
        experts: Name of their group.
        channels: Name of the group of their channels.
        sizes: The numbers of both.
        parameters: Of the module that holds the experts.
        each: Of these, those of one expert.
        per_channel: Of these, those of one channel of one expert.
        active: Experts per token.
    """

    experts: str
    channels: str
    sizes: tuple[int, int]
    parameters: int
    each: int
    per_channel: int
    active: int

    @classmethod
    def of(cls, block: Block) -> "_Mixture":
        channels, experts, path = (
            next(g for g in block.all_groups if g.experts),
            block.expert_units(),
            block.experts.path,
        )
        stacked = [held(block.module, s.path) for s in (*experts.producers, experts.consumer) if f"{path}." in s.path]
        n = len(experts)
        own = block.parameters(path), sum(t.numel() for t in stacked if t is not None) // n, block.cost(channels) // n
        return cls(experts.name, channels.name, (n, len(channels)), *own, block.experts.active)

    def _gone(self, counts: Counts) -> tuple[int, int]:
        """How many experts leave, and how many channels of each other."""
        names = self.experts, self.channels
        gone = [size - counts.get(name, size) for name, size in zip(names, self.sizes, strict=True)]
        return gone[0], gone[1]

    def counted_twice(self, counts: Counts) -> int:
        """Parameters of channels of experts that leave."""
        experts, channels = self._gone(counts)
        return experts * channels * self.per_channel

    def idle(self, counts: Counts) -> int:
        """Parameters of the experts that a token does not reach."""
        experts, channels = self._gone(counts)
        stay = self.sizes[0] - experts
        left = self.parameters - experts * self.each - stay * channels * self.per_channel
        return left - left * self.active // stay


def pruned_skeleton(
    model: PreTrainedModel, counts: Counts, biased: bool = False, method: str = "", sparsity: float = 0.0
) -> PreTrainedModel:
    """Prunes a copy of a model on the meta device.

    Args:
        model: The model before pruning.
        counts: The number of units that each group keeps, by name; other groups stay whole.
        biased: Whether consumers that lose units gain a bias.
        method: The name of the method, stored in the copy's plan.
        sparsity: The sparsity, stored in the copy's plan.
    """
    pruned = copy.deepcopy(model)
    surgery = Surgery(pruned)
    gone = [block.index for block in surgery.blocks if not counts.get(block_name(block.index), 1)]
    for block in surgery.blocks:
        for name in [group.name for group in block.recorded_groups] if block.index not in gone else []:
            group = next(group for group in block.recorded_groups if group.name == name)  # as those before have left
            count = counts.get(group.name, len(group))
            gains = biased and count and not group.kind.startswith(("expert", "whole"))
            gain = torch.zeros(len(matrix(block.part(group.consumer.path)))) if gains else None
            if count < len(group):
                surgery.keep(block, group, _first_units(group, count), bias_gain=gain)
    if gone:
        surgery.drop_blocks(gone)
    surgery.plan(method, {"sparsity": sparsity}, torch.ones(len(surgery.blocks)))
    return pruned


def _first_units(group: UnitGroup, count: int) -> Tensor:
    first = torch.arange(count)
    return first.expand(group.experts, -1) if group.experts else first


def structure(model: PreTrainedModel, context: int) -> Structure:
    r"""Counts the size of a model, for sequences of `context` tokens.

    A token takes two operations per weight of a linear layer, and :math:`4 H \, hd` operations per block and attended
    token, with H query heads of dimension hd. Norms, activation functions and rotary embeddings are not counted.
    """
    blocks, parameters = blocks_of(model), list(model.parameters())
    parts = text_parts(model, anatomy_of(model).blocks)
    linear = 2 * sum(m.weight.numel() for part in parts for m in linear_layers(part)) + sum(map(_expert_flops, blocks))
    cache, reading, generating = 0, 0.0, 0.0
    for block, span in zip(blocks, attention_spans(model), strict=True):
        if block.has_kv_cache:
            width = block.kv_heads * block.head_dim
            cache += round(2 * width * model.dtype.itemsize * min(context, span))
            reading += 4 * width * block.queries_per_head * mean_span(context, span)
            generating += 4 * width * block.queries_per_head * min(context, span)
    return Structure(
        parameters=sum(p.numel() for p in parameters),
        active_parameters=sum(p.numel() for p in parameters) - sum(block.idle_parameters for block in blocks),
        block_parameters=sum(block.parameters() for block in blocks),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        cache_bytes=cache,
        reading_flops=round(linear + reading),
        generating_flops=round(linear + generating),
    )


def mean_span(context: int, window: float = math.inf) -> float:
    """The mean number of tokens that a token of a sequence attends to, including itself.

    Example:
        >>> mean_span(4), mean_span(4, 2)
        (2.5, 1.75)
    """
    full = int(min(context, window))
    return (full * (full + 1) / 2 + (context - full) * full) / context


def block_flops(block: Block, length: int, window: float = math.inf) -> float:
    """Mean operations of a block per token of a sequence of `length` tokens."""
    linear = 2 * sum(m.weight.numel() for m in linear_layers(block.module)) + _expert_flops(block)
    if not block.has_kv_cache:
        return linear
    return linear + 4 * block.kv_heads * block.queries_per_head * block.head_dim * mean_span(length, window)


def _expert_flops(block: Block) -> int:
    """Operations per token of the experts that run for it, and of a router that is no linear layer."""
    if not block.expert_count:
        return 0
    found = block.experts
    stacked = sum(p.numel() for p in block.part(found.path).parameters(recurse=False))
    others = [held(block.module, part.path) for part in found.units.producers]
    inside = {id(each) for m in (block.part(found.path), *linear_layers(block.module)) for each in m.parameters()}
    router = sum(t.numel() for t in others if t is not None and t.ndim == 2 and id(t) not in inside)
    return 2 * (stacked * found.active // block.expert_count + router)


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """All linear layers of a module, including `Conv1D`."""
    return [cast(nn.Linear, m) for m in module.modules() if is_projection(m)]
