r"""How many units each block may keep: budgets, top-k, exact rounding, and block importance.

Symbols: B blocks, s sparsity, :math:`S_l` how far block l moves its hidden states, :math:`u_l` its importance.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from plprune.anatomy import Block


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError unless `sparsity` is in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is {sparsity}, but it is a fraction in [0, 1): 0.25 removes a quarter of the blocks"
        )


def rescale(sparsity: float, total: int, prunable: int, what: str, added: int = 0) -> float:
    r"""The fraction of `prunable` parameters to remove so that `sparsity` of `total` is removed.

    .. math:: s' = (s \, P + P_{added}) / P_{prunable}

    Args:
        sparsity: s.
        total: All parameters that count (P).
        prunable: Those that can leave.
        what: What those are, for the error.
        added: Parameters that the pruning itself will add.

    Example:
        >>> rescale(0.25, 100, 50, "the FFN")
        0.5

    Raises:
        ValueError: Not even all of `prunable` would be enough.
    """
    check_sparsity(sparsity)
    fraction = (sparsity * total + added) / prunable if sparsity else 0.0
    if fraction >= 1:
        raise ValueError(
            f"sparsity {sparsity} is out of reach: {what} is {prunable / total:.1%} of the blocks' parameters and "
            f"cannot be removed whole; ask for less than {prunable / total:.3f}"
        )
    return fraction


def fraction_to_remove(
    sparsity: float,
    blocks: Sequence[Block],
    attention: Literal["kv_heads", "value_channels", "none"],
    what: str,
    biased: bool = False,
) -> float:
    """The fraction of the blocks' prunable parameters to remove, so that `sparsity` of all their parameters leaves.

    Args:
        sparsity: The fraction of the blocks' parameters to remove.
        blocks: All blocks.
        attention: The unit of attention that can leave, beside the FFN channels.
        what: What can leave, for the error.
        biased: Whether every consumer will be given a bias, which the budget then pays for.

    Raises:
        ValueError: Not even all that can leave would be enough.
    """
    groups = [(block, group) for block in blocks for group in block.groups(attention)]
    prunable = sum(len(group) * block.cost(group) for block, group in groups)
    biases = sum(block.absent_bias(group) for block, group in groups) if biased else 0
    return rescale(sparsity, sum(block.parameters() for block in blocks), prunable, what, biases)


def top_k(score: Tensor, k: int) -> Tensor:  # [units] -> [k]
    """Indices of the `k` best units, ascending; of equals the first.

    Example:
        >>> top_k(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2)
        tensor([1, 3])
    """
    return score.argsort(descending=True, stable=True)[:k].sort().values.cpu()


def largest_remainder(shares: Sequence[float], total: int, least: int = 1) -> list[int]:
    """Whole numbers near `shares`, scaled to sum to `total` exactly, none below `least` (Hamilton's method).

    Shares that are all zero count as equal.

    Example:
        >>> largest_remainder([2.6, 1.3, 0.1], 4)
        [2, 1, 1]
        >>> largest_remainder([1.0, 1.0, 1.0], 8)
        [3, 3, 2]
    """
    assert total >= least * len(shares), "the total cannot give everyone the least"
    shares = shares if any(shares) else [1.0] * len(shares)
    scale = total / sum(shares)
    exact = [max(share * scale, float(least)) for share in shares]
    while (excess := sum(exact) - total) > 1e-9 * total:  # those lifted to the least are paid for by the others
        free = sum(x - least for x in exact)
        exact = [least + (x - least) * (1 - excess / free) for x in exact]
    floors = [int(x + 1e-9) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors


def importance(distances: Sequence[float], gain: float = 1.0) -> Tensor:  # [B]
    r"""Importance of each block from how far it moves its hidden states (CFSP, coarse-grained).

    .. math:: u_l = \sigma\bigl(13.1072 \, a \, (S_l - \bar S)\bigr)

    13.1072 is the authors' division by 1e4 of a sum over 128 x 1024 tokens, here independent of their number.

    Example:
        >>> importance([0.1, 0.1])
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    s = torch.tensor(distances, dtype=torch.float64)
    return torch.sigmoid(13.1072 * gain * (s - s.mean()))
