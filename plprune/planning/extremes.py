"""Finds the extreme sizes that a method could choose for any data, so that memory targets hold in the worst case."""

import bisect
import math
import operator
from collections.abc import Sequence

from transformers import PreTrainedModel

from plprune.planning.sizes import attention_spans
from plprune.pruning.allocation import Rows


def extreme_sizes(
    rows: Rows, allowed: Sequence[Sequence[int]], phases: Sequence[Sequence[int]], limit: float, even: bool
) -> list[int]:
    """Removes units in a given order of groups until the cost is near a limit.

    Args:
        rows: Blocks with their groups.
        allowed: The numbers of units that each group may keep, ascending. It starts with the last one.
        phases: Indices of the groups that lose units first, then of those that lose units next, and so on.
        limit: The cost of the units that stay is at least this, and as little more as possible.
        even: Whether all groups of a phase lose the same fraction, instead of one group after another all it can.

    Returns:
        The number of units that each group keeps.
    """
    costs, counts = [block.cost(group) for block, group in rows], [numbers[-1] for numbers in allowed]
    room = [cost * (numbers[-1] - numbers[0]) for cost, numbers in zip(costs, allowed, strict=True)]
    need = sum(map(operator.mul, costs, counts)) - limit
    for phase in phases:
        total = sum(room[i] for i in phase)
        share = min(1.0, need / total) if even and total and need > 0 else 0.0
        evenly = [(i, share * room[i]) for i in phase if share]
        for i, most in [*evenly, *((i, math.inf) for i in phase)]:
            lowest = counts[i] - max(0.0, min(most, need)) / costs[i] - 1e-9
            count = allowed[i][min(bisect.bisect_left(allowed[i], lowest), len(allowed[i]) - 1)]
            need -= (counts[i] - count) * costs[i]
            counts[i] = count
    return counts


def attention_by_span(model: PreTrainedModel, rows: Rows) -> list[int]:
    """Indices of the attention groups, sorted by how many tokens back they attend to."""
    spans = attention_spans(model)
    heads = [i for i, (_, group) in enumerate(rows) if group.kind == "attention"]
    return sorted(heads, key=lambda i: spans[rows[i][0].index])


def unique_cases(rows: Rows, cases: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Removes duplicate cases, and returns each as the number of units by group name."""
    names = [group.name for _, group in rows]
    return [dict(zip(names, case, strict=True)) for case in dict.fromkeys(map(tuple, cases))]
