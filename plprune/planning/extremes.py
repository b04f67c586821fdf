"""Finds the extreme sizes that a method could choose for any data, so that memory targets hold in the worst case."""

import bisect
import math
import operator
from collections.abc import Sequence
from typing import TypeVar

from transformers import PreTrainedModel

from plprune.planning.sizes import attention_spans
from plprune.pruning.allocation import Budget, Rows, fit_counts

T = TypeVar("T")


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


def orders(rows: Rows, channels: list[int]) -> list[list[list[int]]]:
    """The phases in which channels can leave: all at once; of a mixture also those of experts first, or last."""
    experts = [i for i in channels if rows[i][1].experts]
    others = [i for i in channels if not rows[i][1].experts]
    return [[channels], *([[experts, others], [others, experts]] if experts and others else [])]


def nudged(budget: Budget, counts: Sequence[int]) -> list[list[int]]:
    """Sizes with one step fewer or more of the channels of experts, for which the other groups make up."""
    rows, experts = budget.rows, [i for i, (_, group) in enumerate(budget.rows) if group.experts]
    others = [i for i in range(len(rows)) if i not in experts]
    if not experts or not others:
        return []
    cases, whole = [], sum(budget.costs[i] * budget.sizes[i] for i in others)
    for way in (-1, 1):
        case = list(counts)
        for i in experts:
            at = bisect.bisect_left(budget.allowed[i], counts[i]) + way
            case[i] = budget.allowed[i][min(max(at, 0), len(budget.allowed[i]) - 1)]
        left = budget.keep * budget.whole - sum(budget.costs[i] * case[i] for i in experts)
        wanted = [counts[i] * left / whole for i in others]
        made = fit_counts([rows[i] for i in others], wanted, left / whole, budget.constraint, budget.each_block)
        for i, count in zip(others, made, strict=True):
            case[i] = count
        cases.append(case)
    return cases


def attention_by_span(model: PreTrainedModel, rows: Rows) -> list[int]:
    """Indices of the attention groups, sorted by how many tokens back they attend to."""
    spans = attention_spans(model)
    heads = [i for i, (_, group) in enumerate(rows) if group.kind == "attention"]
    return sorted(heads, key=lambda i: spans[rows[i][0].index])


def distinct(cases: Sequence[T]) -> list[T]:
    """The cases without those that came before, also where they cannot be hashed."""
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def unique_cases(rows: Rows, cases: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Removes duplicate cases, and returns each as the number of units by group name."""
    names = [group.name for _, group in rows]
    return [dict(zip(names, case, strict=True)) for case in dict.fromkeys(map(tuple, cases))]
