r"""How much each sub-block matters: the perplexity when units of one FFN or one attention are pruned, and nothing else.

The units that go are those whose outputs are the smallest on calibration text,

.. math:: S_u = \Bigl( \sum_{j \in u} \lVert X_{:,j} \rVert_2^2 \, \lVert W_{:,j} \rVert_2^2 \Bigr)^{1/2}

(Wanda's product, https://arxiv.org/abs/2306.11695, of whole columns and over all columns of a unit), and nothing is
repaired. All of a sub-block's units are the sub-block.

Symbols: X the consumer's inputs over all tokens, W its weight, u a unit with its columns j.

A candidate is a copy of one block, pruned by the same surgery as any model, so that what a family does with its norms
and biases is as it will be. It is run on what enters that block in the dense model, which is computed once, and only
the blocks after it are run again. Results are cached by content: a run that was stopped goes on where it was, and of
several that use one cache each takes candidates that nobody is at.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.architecture.modules import matrix
from plprune.evaluation.perplexity import perplexity
from plprune.io.cache import Cache, source_digest
from plprune.io.progress import Progress
from plprune.io.tables import text_table
from plprune.pruning.allocation import top_k
from plprune.pruning.calibration import Calibration
from plprune.pruning.forward import evaluating, logits_from, record_inputs, run_block
from plprune.pruning.losses import next_token_loss
from plprune.pruning.plan import fingerprint
from plprune.pruning.statistics import Norms
from plprune.pruning.stream import observe, stream
from plprune.pruning.surgery import drop_attention, shrink

FRACTIONS = (0.25, 0.5, 1.0)
SHOWN = 5  # sub-blocks at each end of the table


@dataclass(frozen=True)
class Cell:
    """One sub-block pruned by one fraction, everything else dense.

    Args:
        block: Index of the block.
        kind: attention or ffn.
        fraction: Of its units, kv heads or channels, that was asked to go.
        removed: Units that went: at least one.
        units: Of how many.
        perplexity: Of the text then; None if it is not finite.
    """

    block: int
    kind: str
    fraction: float
    removed: int
    units: int
    perplexity: float | None


@dataclass(frozen=True)
class Sensitivity:
    """What was found: the perplexity of the dense model, and of every sub-block pruned alone."""

    dense: float
    cells: list[Cell]


@dataclass(frozen=True)
class _Candidate:
    block: Block
    group: UnitGroup
    fraction: float

    @property
    def removed(self) -> int:
        return max(1, round(self.fraction * len(self.group)))


def sensitivity(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    calibration: Calibration,
    cache: Cache,
    fractions: Sequence[float] = FRACTIONS,
) -> Sensitivity:
    """Prunes every FFN and every attention alone, by every fraction, and measures the perplexity.

    Args:
        model: A dense or pruned model, which stays as it is.
        windows: Token ids to measure on, [b, s] each.
        calibration: Text by which the units are chosen.
        cache: Where results are kept, one by one.
        fractions: Of the units, in (0, 1]; 1 removes the whole sub-block.

    Raises:
        ValueError: A fraction is not in (0, 1].
    """
    check_fractions(fractions)
    blocks = blocks_of(model)
    text = Calibration(list(windows)).fingerprint
    same: dict[str, Any] = {"weights": fingerprint(model.named_parameters()), "text": text}
    same |= {
        "dtype": str(model.dtype),
        "device": model.device.type,
        "source": source_digest("plprune.evaluation.sensitivity"),
    }
    same |= {name: version(name) for name in ("torch", "transformers")}
    chosen_by = calibration.fingerprint
    keys = [(each, _key(each, same, chosen_by)) for each in _candidates(blocks, fractions)]
    of_dense = same | {"of": "the dense model"}
    with cache.lock(of_dense, wait=True):
        dense = cache.get(of_dense, lambda: perplexity(model, windows))
    for wait in (False, True):  # in the end for what others are at
        missing = [(each, key) for each, key in keys if not cache.has(key)]
        if missing:
            _measure(model, windows, calibration, cache, missing, wait)
    return Sensitivity(dense, [_cell(each, cache.get(key, _not_there)) for each, key in keys])


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises ValueError for fractions of a sub-block that cannot be removed."""
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong or not fractions:
        raise ValueError(f"fractions must be above 0 and at most 1, not {wrong or 'none at all'}: 1 is all of a part")


class Frontier:
    """What enters one block after another of the dense model, of every window.

    Args:
        model: The model.
        windows: Token ids, [b, s] each.
    """

    def __init__(self, model: PreTrainedModel, windows: Sequence[Tensor]) -> None:
        self.model, self.windows, self.blocks, self.index = model, windows, blocks_of(model), 0
        records = [record_inputs(model, ids) for ids in windows]
        self.hidden, self.calls = [first for first, _ in records], [calls for _, calls in records]

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Goes on to what enters a block; it does not go back."""
        assert self.index <= block.index
        for passed in self.blocks[self.index : block.index]:
            pairs = zip(self.hidden, self.calls, strict=True)
            self.hidden = [run_block(passed, x, calls[passed.index]) for x, calls in pairs]
        self.index = block.index

    @torch.no_grad()
    def perplexity(self, block: Block) -> float | None:
        """Of the windows, with another block in the place of the one they enter; None if it is not finite."""
        total, count = 0.0, 0
        for ids, x, calls in zip(self.windows, self.hidden, self.calls, strict=True):
            for each in (block, *self.blocks[self.index + 1 :]):
                x = run_block(each, x, calls[each.index])
            total += next_token_loss(logits_from(self.model, ids, x), ids, "sum").double().item()
            count += ids[:, 1:].numel()
        value = float(torch.tensor(total / count, dtype=torch.float64).exp())
        return value if math.isfinite(value) else None


def as_record(found: Sensitivity, model: str, fractions: Sequence[float], protocol: dict[str, Any]) -> dict[str, Any]:
    """What a report is made from.

    Args:
        found: The results.
        model: Name of the model.
        fractions: That were asked for.
        protocol: How it was measured, in JSON's types.
    """
    cells = [dataclasses.asdict(cell) for cell in found.cells]
    head = {"version": 1, "kind": "sensitivity", "title": f"Sensitivity of {model}", "model": model}
    return head | {"protocol": protocol, "dense": found.dense, "fractions": list(fractions), "cells": cells}


def sensitivity_table(found: Sensitivity) -> str:
    """The sub-blocks that matter most and least, by what the largest fraction costs.

    Example:
        >>> cells = [Cell(0, "ffn", 0.5, 2, 4, 9.0), Cell(0, "ffn", 1.0, 4, 4, 90.0)]
        >>> print(sensitivity_table(Sensitivity(8.0, cells)))
        part                       50%      100%
        block 0   ffn             9.00     90.00
        dense                     8.00      8.00
    """
    rows: dict[tuple[int, str], dict[float, float | None]] = {}
    for cell in found.cells:
        rows.setdefault((cell.block, cell.kind), {})[cell.fraction] = cell.perplexity
    fractions = sorted({cell.fraction for cell in found.cells})
    order = sorted(rows, key=lambda part: -_or_infinite(rows[part][fractions[-1]]))
    left_out = len(order) - 2 * SHOWN
    heads = [f"{100 * fraction:.3g}%" for fraction in fractions]
    lines = [["part", *heads]]
    for i, (block, kind) in enumerate(order):
        if left_out <= 0 or i < SHOWN or i >= SHOWN + left_out:
            values = [_or_infinite(rows[block, kind][fraction]) for fraction in fractions]
            lines.append([f"{f'block {block}':<10}{kind}", *(f"{value:.2f}" for value in values)])
        elif i == SHOWN:
            lines.append([f"... {left_out} more ..."])
    lines.append(["dense", *[f"{found.dense:.2f}"] * len(fractions)])
    return text_table(lines, [20, *[10] * len(fractions)])


def _measure(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    calibration: Calibration,
    cache: Cache,
    missing: list[tuple[_Candidate, dict[str, Any]]],
    wait: bool,
) -> None:
    """Computes what is missing, in depth order, and keeps each result at once; leaves what others are at, or waits."""
    scores = functools.cache(lambda: _scores(model, calibration))
    front = functools.cache(lambda: Frontier(model, windows))
    runs = [len(blocks_of(model)) - each.block.index for each, _ in missing]
    with evaluating(model), Progress(sum(runs), "sensitivity", "block run") as bar:
        for (each, key), count in zip(missing, runs, strict=True):
            with cache.lock(key, wait) as own:
                if own and not cache.has(key):
                    block = _pruned(each, scores)
                    front().advance(each.block)
                    cache.get(key, functools.partial(front().perplexity, block))
            bar.update(count)


def _candidates(blocks: list[Block], fractions: Sequence[float]) -> list[_Candidate]:
    """Everything to measure, in depth order."""
    return [
        _Candidate(block, group, fraction)
        for block in blocks
        for group in block.groups("kv_heads")
        if len(group)
        for fraction in fractions
    ]


def _key(each: _Candidate, same: dict[str, Any], chosen_by: str) -> dict[str, Any]:
    """All that a result depends on; which units matter most does not, once all go."""
    by = chosen_by if each.removed < len(each.group) else None
    return same | {"group": each.group.name, "removed": each.removed, "chosen by": by}


def _scores(model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:  # [units] each
    """What every unit puts out, by group."""
    scores = {}
    for block, inputs in stream(model, calibration, "calibrating"):
        for group, norms in observe(block, inputs, Norms, "kv_heads"):
            columns = block.weight(group).double().norm(dim=0).cpu()  # [units, columns]
            scores[group.name] = (norms.pooled.cpu()[group.consumer.index] * columns).norm(dim=1)
    return scores


def _pruned(each: _Candidate, scores: Callable[[], dict[str, Tensor]]) -> Block:
    """A copy of a candidate's block without the units that go."""
    block = Block(each.block.index, copy.deepcopy(each.block.module), each.block.family)
    stay = len(each.group) - each.removed
    if stay:
        shrink(block, each.group, top_k(scores()[each.group.name], stay))
    elif each.group.kind == "attention":
        drop_attention(block)
    else:
        matrix(block.part(each.group.consumer.path)).data.zero_()  # GPT-2's projections cannot be of width 0
    return block


def _cell(each: _Candidate, value: float | None) -> Cell:
    return Cell(each.block.index, each.group.kind, each.fraction, each.removed, len(each.group), value)


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _not_there() -> float:
    raise AssertionError("it was just computed")
