"""Parameters, memory and operations of a model by its shapes alone; its weights may be on the meta device.

There are two counts of a pruned model. :class:`Ledger` adds up the costs of units and takes no time; targets are solved
by it. :func:`pruned_skeleton` prunes a copy of the skeleton by the code that prunes. The tests hold them together.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import matrix
from plprune.pruning.surgery import Surgery

Counts = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a model is like, by its shapes alone.

    Args:
        parameters: All, tied ones once.
        block_parameters: Those in the decoder blocks.
        weight_bytes: What they take.
        cache_bytes: What keys and values of one sequence of the context's length take.
        reading_flops: Operations for a token of a prompt of that length, on average, the output head included.
        generating_flops: Operations for a token that is generated after it.
    """

    parameters: int
    block_parameters: int
    weight_bytes: int
    cache_bytes: int
    reading_flops: int
    generating_flops: int


def attention_spans(model: PreTrainedModel) -> list[float]:
    """How many tokens back each block attends to at most; infinite where there is no sliding window."""
    layers, blocks = DynamicCache(config=model.config).layers, blocks_of(model)
    found = [getattr(layer, "sliding_window", None) for layer in layers]
    return [float(size) if size else math.inf for size in (found or [None] * len(blocks))]


class Ledger:
    """Adds up what a model would be if its groups kept some of their units only.

    Args:
        model: Its weights may be on meta.
        biased: Whether consumers that lose units are given a bias.
    """

    def __init__(self, model: PreTrainedModel, biased: bool = False) -> None:
        blocks = blocks_of(model)
        rows = [(b, g) for b in blocks for g in (*b.groups("kv_heads"), *b.groups("value_channels")[:-1])]
        self.costs = {g.name: b.cost(g) for b, g in rows}
        self.sizes = {g.name: len(g) for _, g in rows}
        self.biases = {g.name: b.absent_bias(g) if biased else 0 for b, g in rows}
        self.attention = {f"blocks.{b.index}.attention": b.parameters(b.family.attention) for b in blocks}
        self.dense = sum(p.numel() for p in model.parameters())
        self.width = model.dtype.itemsize
        self._heads = {
            f"blocks.{b.index}.attention": (b.kv_heads, 2 * b.head_dim, window)
            for b, window in zip(blocks, attention_spans(model), strict=True)
            if b.has_attention
        }

    def parameters(self, counts: Counts) -> int:
        """All parameters that would be left."""
        return self.dense - sum(self._gone(name, count) for name, count in counts.items())

    def memory(self, counts: Counts, batch: int, context: int) -> int:
        """Bytes of the weights that would be left, and of the cache of `batch` sequences of `context` tokens."""
        cached = sum(
            counts.get(name, kv_heads) * each * min(context, window)
            for name, (kv_heads, each, window) in self._heads.items()
        )
        return self.width * (self.parameters(counts) + round(batch * cached))

    def _gone(self, name: str, count: int) -> int:
        if count == self.sizes[name]:
            return 0
        if not count and name in self.attention:
            return self.attention[name]
        return (self.sizes[name] - count) * self.costs[name] - self.biases[name]


def pruned_skeleton(
    model: PreTrainedModel, counts: Counts, biased: bool = False, method: str = "", sparsity: float = 0.0
) -> PreTrainedModel:
    """A copy of a skeleton that has been pruned, by the code that prunes, to so many units in each group.

    Args:
        model: Its weights are on meta.
        counts: Units that each group keeps; all of those that are not named.
        biased: Whether consumers that lose units are given a bias.
        method: For the plan that the copy carries.
        sparsity: Likewise.
    """
    pruned = copy.deepcopy(model)
    surgery = Surgery(pruned)
    for block in surgery.blocks:
        for group in (*block.groups("value_channels")[:-1], *block.groups("kv_heads")):
            count = counts.get(group.name, len(group))
            gain = torch.zeros(len(matrix(block.part(group.consumer.path)))) if biased and count else None
            if count < len(group):
                surgery.keep(block, group, torch.arange(count), bias_gain=gain)
    surgery.plan(method, {"sparsity": sparsity}, torch.ones(len(surgery.blocks)))
    return pruned


def structure(model: PreTrainedModel, context: int) -> Structure:
    r"""Measures a model by its shapes.

    A token takes two operations for each weight of a linear layer, and :math:`4 H \, hd` in each block for each token
    that it attends to; norms, activation functions and rotary embeddings are not counted.

    Args:
        model: Its weights may be on meta.
        context: Tokens of a sequence.
    """
    blocks, parameters = blocks_of(model), list(model.parameters())
    linear = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    cache, reading, generating = 0, 0.0, 0.0
    for block, window in zip(blocks, attention_spans(model), strict=True):
        if block.has_attention:
            width = block.kv_heads * block.head_dim
            cache += round(2 * width * model.dtype.itemsize * min(context, window))
            reading += 4 * width * block.queries_per_head * mean_span(context, window)
            generating += 4 * width * block.queries_per_head * min(context, window)
    return Structure(
        parameters=sum(p.numel() for p in parameters),
        block_parameters=sum(block.parameters() for block in blocks),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        cache_bytes=cache,
        reading_flops=round(linear + reading),
        generating_flops=round(linear + generating),
    )


def mean_span(context: int, window: float = math.inf) -> float:
    """How many tokens those of a sequence attend to, on average, themselves included.

    Example:
        >>> mean_span(4), mean_span(4, 2)
        (2.5, 1.75)
    """
    full = int(min(context, window))
    return (full * (full + 1) / 2 + (context - full) * full) / context


def block_flops(block: Block, length: int, window: float = math.inf) -> float:
    """Operations of a block for a token of a sequence, on average."""
    linear = 2 * sum(m.weight.numel() for m in linear_layers(block.module))
    if not block.has_attention:
        return linear
    return linear + 4 * block.kv_heads * block.queries_per_head * block.head_dim * mean_span(length, window)


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """All linear layers of a module."""
    return [cast(nn.Linear, m) for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]
