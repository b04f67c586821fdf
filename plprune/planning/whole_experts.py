"""Whole experts in one ranking with all other units: how many of them every block keeps.

A config holds one number of experts for all blocks, and a router that chooses among groups of experts needs as many in
each. So a unit of the ranking is a rank: of every such group in all blocks the expert that is the r-th best there. Its
score is the mean of the experts' saliencies, as REAP has them, each standardised within its block.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plprune.architecture.blocks import Block
from plprune.planning.structures import standardised
from plprune.pruning.allocation import Rows, global_ranking, ranked


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
