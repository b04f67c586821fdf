r"""Measures the perplexity of a model with one FFN or one attention pruned, and everything else dense.

The units to remove are those with the smallest outputs on calibration text,

.. math:: S_u = \Bigl( \sum_{j \in u} \lVert X_{:,j} \rVert_2^2 \, \lVert W_{:,j} \rVert_2^2 \Bigr)^{1/2}

(Wanda's score, https://arxiv.org/abs/2306.11695, for whole units instead of single weights). Nothing is
repaired. Removing all units removes the sub-block.

Symbols: X the consumer's inputs over all tokens, W its weight, u a unit with its columns j.

A candidate is a copy of one block, pruned by the same surgery as any model. Its inputs are those that the block has in
the dense model, which are computed once; only the blocks after it run again. Each result is cached under its content,
so that a stopped run continues where it stopped, and processes that share a cache share the candidates.
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
class SubBlockResult:
    """The perplexity with one sub-block pruned and everything else dense.

    Args:
        block: Index of the block.
        kind: attention or ffn.
        fraction: Requested share of the units (kv heads or channels) to remove.
        removed: Number of units removed, at least one.
        units: Number of units before pruning.
        perplexity: None if it is not finite.
    """

    block: int
    kind: str
    fraction: float
    removed: int
    units: int
    perplexity: float | None


@dataclass(frozen=True)
class Sensitivity:
    """The perplexities of the dense model, and with each sub-block pruned alone."""

    dense: float
    cells: list[SubBlockResult]


@dataclass(frozen=True)
class _Candidate:
    """A sub-block to prune by a fraction."""

    block: Block
    group: UnitGroup
    fraction: float

    @property
    def removed(self) -> int:
        return max(1, round(self.fraction * len(self.group)))

    def result(self, value: float | None) -> SubBlockResult:
        return SubBlockResult(self.block.index, self.group.kind, self.fraction, self.removed, len(self.group), value)


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
        calibration: Text that decides which units go.
        cache: Holds the results, one by one.
        fractions: Of the units, in (0, 1]; 1 removes the whole sub-block.

    Raises:
        ValueError: A fraction is not in (0, 1].
    """
    check_fractions(fractions)
    common: dict[str, Any] = {
        "weights": fingerprint(model.named_parameters()),
        "text": Calibration(list(windows)).fingerprint,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "source": source_digest("plprune.evaluation.sensitivity"),
    }
    common |= {name: version(name) for name in ("torch", "transformers")}
    keys = [(each, _key(each, common, calibration)) for each in _candidates(blocks_of(model), fractions)]
    of_dense = common | {"of": "the dense model"}
    with cache.lock(of_dense, wait=True):
        dense = cache.get(of_dense, lambda: perplexity(model, windows))
    for wait in (False, True):  # waits at the end for candidates that other processes compute
        missing = [(each, key) for each, key in keys if not cache.has(key)]
        if missing:
            _measure(model, windows, calibration, cache, missing, wait)
    return Sensitivity(dense, [each.result(cache.get(key, _missing)) for each, key in keys])


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises ValueError for fractions that are not in (0, 1], or if there are none."""
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong or not fractions:
        raise ValueError(f"fractions must be above 0 and at most 1, not {wrong or 'none at all'}: 1 is all of a part")


class BlockInputs:
    """The inputs of one block of the dense model, for every window; it moves from block to block.

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
        """Moves to the inputs of a block that is not before the present one."""
        assert self.index <= block.index
        for passed in self.blocks[self.index : block.index]:
            pairs = zip(self.hidden, self.calls, strict=True)
            self.hidden = [run_block(passed, x, calls[passed.index]) for x, calls in pairs]
        self.index = block.index

    @torch.no_grad()
    def perplexity(self, block: Block) -> float | None:
        """The perplexity with another block in the place of the present one; None if it is not finite."""
        total, count = 0.0, 0
        for ids, x, calls in zip(self.windows, self.hidden, self.calls, strict=True):
            for each in (block, *self.blocks[self.index + 1 :]):
                x = run_block(each, x, calls[each.index])
            total += next_token_loss(logits_from(self.model, ids, x), ids, "sum").double().item()
            count += ids[:, 1:].numel()
        value = float(torch.tensor(total / count, dtype=torch.float64).exp())
        return value if math.isfinite(value) else None


def as_record(result: Sensitivity, model: str, fractions: Sequence[float], protocol: dict[str, Any]) -> dict[str, Any]:
    """The record of a report.

    Args:
        result: The results.
        model: Name of the model.
        fractions: Those that were asked for.
        protocol: How it was measured, in JSON's types.
    """
    head = {"version": 1, "kind": "sensitivity", "title": f"Sensitivity of {model}", "model": model}
    return head | {"protocol": protocol, "fractions": list(fractions)} | dataclasses.asdict(result)


def sensitivity_table(result: Sensitivity) -> str:
    """The sub-blocks whose pruning by the largest fraction costs most and least.

    Example:
        >>> cells = [SubBlockResult(0, "ffn", 0.5, 2, 4, 9.0), SubBlockResult(0, "ffn", 1.0, 4, 4, 90.0)]
        >>> print(sensitivity_table(Sensitivity(8.0, cells)))
        part                       50%      100%
        block 0   ffn             9.00     90.00
        dense                     8.00      8.00
    """
    rows: dict[tuple[int, str], dict[float, float]] = {}
    for cell in result.cells:
        value = math.inf if cell.perplexity is None else cell.perplexity
        rows.setdefault((cell.block, cell.kind), {})[cell.fraction] = value
    fractions = sorted({cell.fraction for cell in result.cells})
    order = sorted(rows, key=lambda part: -rows[part][fractions[-1]])
    lines = [
        [f"{f'block {block}':<10}{kind}", *(f"{rows[block, kind][fraction]:.2f}" for fraction in fractions)]
        for block, kind in order
    ]
    if (left_out := len(lines) - 2 * SHOWN) > 0:
        lines[SHOWN:-SHOWN] = [[f"... {left_out} more ..."]]
    heads = ["part", *(f"{100 * fraction:.3g}%" for fraction in fractions)]
    dense = ["dense", *[f"{result.dense:.2f}"] * len(fractions)]
    return text_table([heads, *lines, dense], [20, *[10] * len(fractions)])


def _measure(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    calibration: Calibration,
    cache: Cache,
    missing: list[tuple[_Candidate, dict[str, Any]]],
    wait: bool,
) -> None:
    """Computes and caches missing results in depth order; skips those that other processes compute, or waits."""
    scores = functools.cache(lambda: _scores(model, calibration))
    inputs = functools.cache(lambda: BlockInputs(model, windows))
    runs = [len(blocks_of(model)) - each.block.index for each, _ in missing]
    with evaluating(model), Progress(sum(runs), "sensitivity", "block run") as bar:
        for (each, key), count in zip(missing, runs, strict=True):
            with cache.lock(key, wait) as own:
                if own and not cache.has(key):
                    block = _pruned(each, scores)
                    inputs().advance(each.block)
                    cache.get(key, functools.partial(inputs().perplexity, block))
            bar.update(count)


def _candidates(blocks: list[Block], fractions: Sequence[float]) -> list[_Candidate]:
    """Everything to measure, in depth order."""
    groups = [(block, group) for block in blocks for group in block.groups("kv_heads", experts=False) if len(group)]
    return [_Candidate(block, group, fraction) for block, group in groups for fraction in fractions]


def _key(each: _Candidate, common: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """Everything that a result depends on, which is the calibration text only if some units stay."""
    chosen_by = calibration.fingerprint if each.removed < len(each.group) else None
    return common | {"group": each.group.name, "removed": each.removed, "chosen by": chosen_by}


def _scores(model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:  # [units] each
    """The score of every unit, by group."""
    scores = {}
    for block, inputs in stream(model, calibration, "calibrating"):
        for group, norms in observe(block, inputs, Norms, "kv_heads", experts=False):
            columns = block.weight(group).double().norm(dim=0).cpu()  # [units, columns]
            scores[group.name] = (norms.pooled.cpu()[group.consumer.index] * columns).norm(dim=1)
    return scores


def _pruned(each: _Candidate, scores: Callable[[], dict[str, Tensor]]) -> Block:
    """A copy of a candidate's block without the units that go."""
    block = dataclasses.replace(each.block, module=copy.deepcopy(each.block.module))
    stay = len(each.group) - each.removed
    if stay:
        shrink(block, each.group, top_k(scores()[each.group.name], stay))
    elif each.group.kind == "attention":
        drop_attention(block)
    else:
        matrix(block.part(each.group.consumer.path)).data.zero_()  # GPT-2's projections cannot have width 0
    return block


def _missing() -> float:
    raise AssertionError("every result is in the cache by now")
