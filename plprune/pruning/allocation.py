r"""How many units each block may keep: budgets, top-k, exact rounding, and block importance.

Symbols: B blocks, s sparsity, :math:`S_l` how far block l moves its hidden states, :math:`u_l` its importance.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from plprune.architecture.blocks import AttentionUnit, Block, UnitGroup
from plprune.pruning.constraints import FREE, Constraint

Rows = Sequence[tuple[Block, UnitGroup]]
NEAR = 0.05  # how far from the sparsity that is asked for a constraint may lead


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
    attention: AttentionUnit,
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


def complement(keep: Tensor, size: int) -> Tensor:
    """The indices below `size` that are not in `keep`, ascending.

    Example:
        >>> complement(torch.tensor([1, 3]), 4)
        tensor([0, 2])
    """
    return torch.ones(size, dtype=torch.bool).index_fill_(0, keep.cpu(), False).nonzero().flatten()


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


def next_sparsity(sparsity: float, left: float, number: int, rounds: int) -> float:
    r"""What one of several rounds has to remove of what is left, so that the last one ends at `sparsity` of all.

    .. math:: s_i = 1 - (1 - s)^{i / n} \, / \, l

    Args:
        sparsity: s.
        left: The fraction of all parameters that is left before the round (l).
        number: Of the round, from 1 (i).
        rounds: How many there are (n).

    Example:
        >>> next_sparsity(0.75, 1.0, 1, 2), next_sparsity(0.75, 0.4, 2, 2)
        (0.5, 0.375)
    """
    check_sparsity(sparsity)
    return max(0.0, 1 - (1 - sparsity) ** (number / rounds) / left)


def nearest_counts(
    wanted: Sequence[float], counts: Sequence[Sequence[int]], costs: Sequence[int], target: float
) -> list[int]:
    """Numbers of units that may be kept, near the `wanted` ones, whose cost together is as near to `target` as steps of
    single groups get it.

    Args:
        wanted: Units to keep in each group.
        counts: Those that each group may keep, ascending.
        costs: The cost of one unit of each group.
        target: What all kept units should cost.

    Example:
        >>> nearest_counts([40.0, 50.0, 90.0], [range(32, 97, 32)] * 3, [1] * 3, 180)
        [32, 64, 96]
        >>> nearest_counts([40.0, 50.0, 90.0], [range(32, 97, 32)] * 3, [1] * 3, 165)
        [32, 32, 96]
    """
    at = [min(range(len(c)), key=lambda i, w=w, c=c: (abs(c[i] - w), -i)) for w, c in zip(wanted, counts, strict=True)]
    while True:
        excess = sum(c[i] * cost for c, i, cost in zip(counts, at, costs, strict=True)) - target
        way, best = -1 if excess > 0 else 1, None
        for k, (c, i, cost) in enumerate(zip(counts, at, costs, strict=True)):
            if not 0 <= i + way < len(c) or (change := abs(c[i + way] - c[i]) * cost) >= 2 * abs(excess):
                continue  # it would lead no nearer
            farther = ((c[i + way] - wanted[k]) ** 2 - (c[i] - wanted[k]) ** 2) * cost**2 / change
            if best is None or farther < best[0]:
                best = farther, k
        if best is None:
            return [c[i] for c, i in zip(counts, at, strict=True)]
        at[best[1]] += way


def fit_counts(
    rows: Rows,
    wanted: Sequence[float],
    keep: float,
    asked: Constraint,
    each_block: bool = False,
) -> list[int]:
    """Units to keep in each group, of the numbers that a constraint allows: near the `wanted` ones, and to the budget.

    Args:
        rows: Blocks with their groups, in the order of the blocks.
        wanted: Units to keep in each group.
        keep: The fraction of the groups' parameters to keep.
        asked: What allows only some numbers.
        each_block: Whether each block has to keep its fraction, and not only all together.

    Raises:
        ValueError: A group can keep no number of units.
    """
    scopes = list(dict.fromkeys(block.index for block, _ in rows)) if each_block else [None]
    chosen = [0] * len(rows)
    for scope in scopes:
        own = [i for i, (block, _) in enumerate(rows) if scope in (None, block.index)]
        costs = [rows[i][0].cost(rows[i][1]) for i in own]
        target = keep * sum(cost * len(rows[i][1]) for i, cost in zip(own, costs, strict=True))
        found = nearest_counts([wanted[i] for i in own], [asked.counts(*rows[i]) for i in own], costs, target)
        for i, count in zip(own, found, strict=True):
            chosen[i] = count
    return chosen


def check_near(sparsity: float, rows: Rows, chosen: Sequence[int], keep: float, of: int) -> None:
    """Makes sure that a constraint leads near enough to a budget: within 0.05, and at least half of the way.

    Args:
        sparsity: What is asked for.
        rows: Blocks with their groups.
        chosen: Units that each group keeps.
        keep: The fraction of the groups' parameters to keep for that.
        of: The parameters of which `sparsity` is a fraction.

    Raises:
        ValueError: It does not.
    """
    costs = [block.cost(group) for block, group in rows]
    kept = sum(cost * count for cost, count in zip(costs, chosen, strict=True))
    off = (kept - keep * sum(cost * len(group) for cost, (_, group) in zip(costs, rows, strict=True))) / of
    if abs(off) > min(NEAR, sparsity / 2) + 1e-9:
        raise ValueError(
            f"sparsity {sparsity} is out of reach where `serve_on` and `tensor_parallel` say what sizes there can be: "
            f"the nearest is {max(0.0, sparsity - off):.3f}; ask for that, for another place or for fewer devices"
        )


@dataclasses.dataclass(frozen=True)
class Budget:
    """What blocks may keep of their groups, and the numbers of units that a constraint allows.

    Args:
        blocks: All blocks.
        keep: The fraction of the groups' parameters to keep.
        constraint: What allows only some numbers.
        attention: The unit of attention that can leave, beside the FFN channels.
        each_block: Whether each block has to keep its fraction under a constraint, and not only all together.
    """

    blocks: Sequence[Block]
    keep: float
    constraint: Constraint = FREE
    attention: AttentionUnit = "none"
    each_block: bool = False

    @functools.cached_property
    def rows(self) -> Rows:
        """The blocks with their groups."""
        return [(block, group) for block in self.blocks for group in block.groups(self.attention)]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The units that each group has."""
        return [len(group) for _, group in self.rows]

    @functools.cached_property
    def costs(self) -> list[int]:
        """The parameters of one unit of each group."""
        return [block.cost(group) for block, group in self.rows]

    @property
    def whole(self) -> int:
        """The parameters of all groups."""
        return sum(cost * size for cost, size in zip(self.costs, self.sizes, strict=True))

    @property
    def alike(self) -> list[float]:
        """The same fraction of each group."""
        return [size * self.keep for size in self.sizes]

    def fit(self, wanted: Sequence[float]) -> list[int]:
        """Units to keep in each group, as by :func:`fit_counts`."""
        return fit_counts(self.rows, wanted, self.keep, self.constraint, self.each_block)

    def check(self, sparsity: float, of: int | None = None, chosen: Sequence[int] | None = None) -> None:
        """Makes sure that the constraint can be met, near enough to the sparsity that is asked for.

        Args:
            sparsity: That.
            of: The parameters of which it is a fraction; all of the blocks' if not given.
            chosen: Units that each group keeps if nothing is known of the data; if not given, the same fraction.

        Raises:
            ValueError: It cannot.
        """
        if self.constraint == FREE:
            return
        if self.attention == "none":
            self.constraint.check_heads(self.blocks)
        chosen = self.fit(self.alike) if chosen is None else chosen
        of = sum(block.parameters() for block in self.blocks) if of is None else of
        check_near(sparsity, self.rows, chosen, self.keep, of)


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


def kept_fractions(u: Tensor, p: float, sizes: Sequence[int] | None = None) -> Tensor:  # [B] -> [B]
    r"""The fraction of each block's channels to keep (CFSP, equation for the layer-wise ratio).

    .. math:: k_l = \frac{u_l}{\bar u} (1 - p)

    where importance is drawn toward its mean first if a block would otherwise keep more than it has. The mean is
    weighted by the blocks' `sizes`, should they differ: p is of all channels together.

    Example:
        >>> kept_fractions(torch.tensor([0.4, 0.6]), 0.2)
        tensor([0.6400, 0.9600])
    """
    size = torch.tensor(sizes or [1] * len(u), dtype=u.dtype)
    mean = (u * size).sum() / size.sum()
    if u.max() / mean * (1 - p) >= 1 and u.max() > mean:
        u = mean + (u - mean) * (mean * (1 / (1 - p) - 1) / (u.max() - mean) / 1.05)
    return u / mean * (1 - p)


def global_ranking(scores: list[Tensor], costs: list[int], p: float) -> list[Tensor]:
    """One ranking of all units: the best are kept while their cost stays nearest to (1 - p) of the total.

    The best unit of each group is kept whatever its rank.

    Args:
        scores: Scores of each group's units, comparable with all others', [units] each.
        costs: Parameters of one unit of each group.
        p: The fraction of all cost to remove.

    Raises:
        ValueError: The best unit of each group is already more than what may stay.

    Example:
        >>> global_ranking([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])], [1, 1], 0.5)
        [tensor([0]), tensor([0])]
    """
    flat = torch.cat([s.cpu().double() for s in scores])
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    cost = torch.tensor(costs, dtype=torch.float64)[owner]
    first = torch.cumsum(torch.tensor([0] + [len(s) for s in scores[:-1]]), 0)
    best = first + torch.tensor([int(s.argmax()) for s in scores])
    flat[best] = torch.inf
    order = flat.argsort(descending=True, stable=True)
    spent = cost[order].cumsum(0)
    check_best(costs, [len(s) for s in scores], p)
    count = int((spent - (1 - p) * cost.sum()).abs().argmin()) + 1
    kept = torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, order[:count], True)
    return [kept[owner == i].nonzero().flatten() for i in range(len(scores))]


def check_best(costs: Sequence[int], sizes: Sequence[int], p: float) -> None:
    """Raises ValueError if the best units of all groups are already more than what may stay."""
    if len(costs) > 1 and sum(costs) - costs[-1] / 2 >= (1 - p) * sum(
        cost * size for cost, size in zip(costs, sizes, strict=True)
    ):
        raise ValueError(
            f"{p:.1%} of what can be pruned is too much, as every block keeps its best head and its best channel: ask "
            "for a lower sparsity"
        )
