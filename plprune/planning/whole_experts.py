"""Whole experts in one ranking with all other units: how many of them every block keeps.

A config holds one number of experts for all blocks, and a router that chooses among groups of experts needs as many in
each. So a unit of the ranking is a rank: of every such group in all blocks the expert that is the r-th best there. Its
score is the mean of the experts' saliencies, as REAP has them, each standardised within its block.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from plprune.architecture.blocks import Block, UnitGroup
from plprune.planning.structures import standardised
from plprune.pruning.allocation import Budget, Rows, best_experts, global_ranking, ranked

Decided = tuple[Block, UnitGroup, Tensor]  # a group of a block, and the units that stay


def mixtures(blocks: Sequence[Block], method: str) -> list[Block]:
    """The blocks with experts.

    Raises:
        ValueError: There are none, or they have different numbers of experts.
    """
    found = [block for block in blocks if block.expert_count]
    if not found:
        why = next((f" ({w})" for b in blocks if (w := b.anatomy.whole.get("expert"))), "")
        raise ValueError(f"{method} prunes experts, and the model has none that can leave{why}: use another method")
    sizes = {block.expert_count for block in found}
    if len(sizes) > 1:
        raise ValueError(
            f"{method} needs as many experts in each block, and the model has {min(sizes)} to {max(sizes)}"
        )
    return found


def step(blocks: Sequence[Block]) -> int:
    """How many experts leave a block of some mixtures at once."""
    return math.lcm(*(block.experts.groups for block in blocks))


def least(blocks: Sequence[Block]) -> int:
    """The least number of experts that every block of some mixtures can keep."""
    return step(blocks) * math.ceil(max(block.experts.least for block in blocks) / step(blocks))


def possible(blocks: Sequence[Block], sparsity: float, method: str) -> list[int]:
    """Numbers of experts that the blocks of a model may keep: a typical one, the least and the most."""
    own = mixtures(blocks, method)
    each, count = step(own), own[0].expert_count
    return [each * round(count * (1 - sparsity) / each), least(own), count] if sparsity else [count]


def nearest(
    blocks: Sequence[Block], wanted: int | None, settle: Callable[[int], tuple[float, Budget]], method: str
) -> tuple[float, Budget]:
    """What else must leave with the number of experts nearest to the wanted one, by default all.

    Args:
        blocks: Of the model.
        wanted: The wanted number of experts of every block.
        settle: Returns the fraction of all other units to remove, and their budget, if so many experts stay.
        method: Name of the method.

    Raises:
        ValueError: `settle` refuses any number of experts.
    """
    own = mixtures(blocks, method)
    count = own[0].expert_count
    wanted, fault = count if wanted is None else wanted, ValueError()
    for left in sorted(range(least(own), count + 1, step(own)), key=lambda left: abs(left - wanted)):
        try:
            p, budget = settle(left)
            if p >= 0:
                return p, budget
        except ValueError as error:
            fault = error
    raise fault


def sizes(budget: Budget) -> dict[str, int]:
    """The number of experts that stay in each block, by group; empty if they are no units."""
    return {b.expert_units().name: budget.left for b in budget.blocks if b.expert_count and budget.left is not None}


def to_keep(blocks: Sequence[Block], scores: Sequence[Tensor], budget: Budget) -> dict[int, Tensor]:
    """The best experts of some mixtures by index of their block, as many as the budget has; nothing if all stay.

    Args:
        blocks: The mixtures.
        scores: Of their experts, [experts] each.
        budget: Of the other units.
    """
    left = budget.left
    if left is None or left == blocks[0].expert_count:
        return {}
    return {b.index: best_experts(own, left, b.experts.groups) for b, own in zip(blocks, scores, strict=False)}


def with_leaving(decided: Sequence[Decided], leaving: Mapping[int, Tensor]) -> list[Decided]:
    """Decisions on groups with those on whole experts, each before that on the channels of the experts that stay.

    Args:
        decided: On the other groups.
        leaving: The experts that stay, by index of their block.
    """
    found = []
    for block, group, keep in decided:
        if group.experts and leaving:
            found.append((block, block.expert_units(), leaving[block.index]))
        found.append((block, group, keep))
    return found


def experts_to_keep(
    rows: Rows, scores: Sequence[Tensor], blocks: Sequence[Block], saliencies: Sequence[Tensor], remove: int
) -> int:
    """Ranks experts together with other units, and returns how many every block keeps.

    Args:
        rows: The groups of the other units.
        scores: Of these units, [units] each.
        blocks: The mixtures.
        saliencies: Of the experts of each, [experts].
        remove: The number of parameters to remove.
    """
    each, first = step(blocks), least(blocks) // step(blocks) - 1  # ranks before the first stay
    by_rank = []
    for block, saliency in zip(blocks, saliencies, strict=True):
        own = ranked(standardised(saliency[:, None]).view(block.experts.groups, -1))
        by_rank.append(own.flatten().view(-1, each).mean(1))
    units = torch.stack(by_rank).mean(0)[first:]
    costs = [block.cost(group) for block, group in rows]
    costs.append(each * sum(block.cost(block.expert_units()) for block in blocks))
    every = [*scores, units]
    total = sum(cost * len(own) for cost, own in zip(costs, every, strict=True))
    return each * (first + len(global_ranking(every, costs, remove / total)[-1]))
