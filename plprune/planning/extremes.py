"""The extremes of the sizes that data could decide on, without the data: a target of memory holds for the worst."""

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
    """Units that groups keep if some give before others: an extreme of what data could decide.

    Args:
        rows: Blocks with their groups.
        allowed: The numbers of units that each group may keep, ascending; from the last one it gives.
        phases: Which groups give first, which next.
        limit: Together they cost no less than this in the end, and hardly more if that can be.
        even: Whether those of a phase give alike, or one after another all they can.
    """
    costs, counts = [block.cost(group) for block, group in rows], [numbers[-1] for numbers in allowed]
    need = sum(map(operator.mul, costs, counts)) - limit
    for own in phases:
        room = sum(costs[i] * (allowed[i][-1] - allowed[i][0]) for i in own)
        share = min(1.0, need / room) if even and room and need > 0 else 0.0
        gives = [(i, share * costs[i] * (allowed[i][-1] - allowed[i][0])) for i in own if share]
        for i, most in [*gives, *((i, math.inf) for i in own)]:
            lowest = counts[i] - max(0.0, min(most, need)) / costs[i] - 1e-9
            count = allowed[i][min(bisect.bisect_left(allowed[i], lowest), len(allowed[i]) - 1)]
            need -= (counts[i] - count) * costs[i]
            counts[i] = count
    return counts


def attention_by_span(model: PreTrainedModel, rows: Rows) -> list[int]:
    """Which of the groups are of attention, in ascending order of how much of the sequence they see."""
    size = attention_spans(model)
    own = [i for i, (_, group) in enumerate(rows) if group.kind == "attention"]
    return sorted(own, key=lambda i: size[rows[i][0].index])


def unique_cases(rows: Rows, cases: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Cases of sizes by the groups' names, each once."""
    names = [group.name for _, group in rows]
    return [dict(zip(names, case, strict=True)) for case in dict.fromkeys(map(tuple, cases))]
