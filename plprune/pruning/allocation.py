r"""Decides how many units each block keeps: budgets, rankings, exact rounding, and block importance.

Symbols: B blocks, s sparsity, :math:`S_l` distance between input and output of block l, :math:`u_l` its importance.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from plprune.architecture.blocks import AttentionUnit, Block, UnitGroup
from plprune.pruning.constraints import FREE, Constraint

Rows = Sequence[tuple[Block, UnitGroup]]
TOLERANCE = 0.05  # a constraint may change the requested sparsity by this much


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError unless `sparsity` is in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is {sparsity}, but it is a fraction in [0, 1): 0.25 removes a quarter of the blocks"
        )


def rescale(sparsity: float, total: int, prunable: int, what: str, added: int = 0) -> float:
    r"""Converts a sparsity of all parameters to one of the prunable parameters.

    .. math:: s' = (s \, P + P_{added}) / P_{prunable}

    Args:
        sparsity: The fraction of `total` to remove (s).
        total: The number of all parameters (P).
        prunable: The number of prunable parameters.
        what: Names the prunable parameters in the error message.
        added: The number of parameters that pruning adds, such as biases.

    Example:
        >>> rescale(0.25, 100, 50, "the FFN")
        0.5

    Raises:
        ValueError: Removing all prunable parameters would not be enough.
    """
    check_sparsity(sparsity)
    fraction = (sparsity * total + added) / prunable if sparsity else 0.0
    if fraction >= 1:
        raise ValueError(
            f"sparsity {sparsity} is out of reach: {what} is {prunable / total:.1%} of the blocks' parameters and "
            f"cannot be removed entirely; ask for less than {prunable / total:.3f}"
        )
    return fraction


def fraction_to_remove(
    sparsity: float,
    blocks: Sequence[Block],
    attention: AttentionUnit,
    what: str,
    biased: bool = False,
    left: int | None = None,
    of: int | None = None,
) -> float:
    """The fraction of the blocks' prunable parameters to remove, so that `sparsity` of all their parameters is removed.

    Args:
        sparsity: The fraction of the blocks' parameters to remove.
        blocks: All blocks of the model.
        attention: The attention units that are prunable besides the FFN channels.
        what: Names the prunable parameters in the error message.
        biased: Whether pruning adds a bias to every consumer without one; more parameters are removed to offset it.
        left: The number of experts that stay in each block, whose channels are prunable; all by default.
        of: The number of parameters that `sparsity` refers to; by default all parameters of the blocks.

    Raises:
        ValueError: Removing all prunable parameters would not be enough, or nothing is prunable.
    """
    budget = Budget(blocks, 1.0, attention=attention, left=left)
    if not budget.rows:
        raise ValueError(f"the model has nothing of {what}, so this method cannot prune it: use another")
    added = sum(block.absent_bias(group) for block, group in budget.rows) if biased else 0
    if left is not None:
        added -= sum((b.expert_count - left) * b.cost(b.expert_units()) for b in blocks if b.expert_count)
    total = sum(block.parameters() for block in blocks) if of is None else of
    return rescale(sparsity, total, budget.whole, what, added)


def top_k(score: Tensor, k: int) -> Tensor:  # [..., units] -> [..., k]
    """Indices of the `k` units with the highest scores, ascending. Ties go to the lower index.

    Example:
        >>> top_k(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2)
        tensor([1, 3])
    """
    return score.argsort(descending=True, stable=True)[..., :k].sort().values.cpu()


def best_experts(score: Tensor, count: int, groups: int = 1) -> Tensor:  # [experts] -> [count]
    """Indices of the experts with the highest scores, ascending; of each group of neighbours as many.

    Example:
        >>> best_experts(torch.tensor([4.0, 3.0, 1.0, 2.0]), 2, groups=2)
        tensor([0, 3])
    """
    size = len(score) // groups
    return torch.cat([g * size + top_k(own, count // groups) for g, own in enumerate(score.split(size))])


def ranked(score: Tensor) -> Tensor:  # [experts, channels] -> [channels, experts]
    """The scores of each expert's channels, the highest first: what leaves together where all keep as many.

    Example:
        >>> ranked(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
        tensor([[3., 2.],
                [1., 0.]])
    """
    return score.sort(dim=1, descending=True).values.T


def largest_remainder(shares: Sequence[float], total: int, least: int = 1) -> list[int]:
    """Rounds shares to integers of at least `least` that sum to `total` exactly (Hamilton's method).

    Shares need not sum to `total`. If all are zero, they count as equal.

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
    while (excess := sum(exact) - total) > 1e-9 * total:  # raising shares to `least` reduces the others
        free = sum(x - least for x in exact)
        exact = [least + (x - least) * (1 - excess / free) for x in exact]
    floors = [int(x + 1e-9) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors


def next_sparsity(sparsity: float, left: float, number: int, rounds: int) -> float:
    r"""The sparsity of one of several rounds, relative to its input model; the last round reaches `sparsity`.

    .. math:: s_i = 1 - (1 - s)^{i / n} \, / \, l

    Args:
        sparsity: The final sparsity (s).
        left: The fraction of all parameters that the earlier rounds kept (l).
        number: The number of the round, from 1 (i).
        rounds: The number of rounds (n).

    Example:
        >>> next_sparsity(0.75, 1.0, 1, 2), next_sparsity(0.75, 0.4, 2, 2)
        (0.5, 0.375)
    """
    check_sparsity(sparsity)
    return max(0.0, 1 - (1 - sparsity) ** (number / rounds) / left)


def nearest_counts(
    wanted: Sequence[float], counts: Sequence[Sequence[int]], costs: Sequence[int], target: float
) -> list[int]:
    """Chooses an allowed count for each group, near the wanted one, so that the total cost is near the target.

    Starts at the nearest allowed counts, and moves one group by one step as long as this brings the cost nearer.

    Args:
        wanted: The wanted number of units of each group.
        counts: The allowed numbers of units of each group, ascending.
        costs: The cost of one unit of each group.
        target: The wanted total cost.

    Example:
        >>> nearest_counts([40.0, 50.0, 90.0], [range(32, 97, 32)] * 3, [1] * 3, 180)
        [32, 64, 96]
        >>> nearest_counts([40.0, 50.0, 90.0], [range(32, 97, 32)] * 3, [1] * 3, 165)
        [32, 32, 96]
    """
    at = [min(range(len(c)), key=lambda i, w=w, c=c: (abs(c[i] - w), -i)) for w, c in zip(wanted, counts, strict=True)]
    while True:
        excess = _total([c[i] for c, i in zip(counts, at, strict=True)], costs) - target
        way, best = -1 if excess > 0 else 1, None
        for k, (c, i, cost) in enumerate(zip(counts, at, costs, strict=True)):
            if not 0 <= i + way < len(c) or (change := abs(c[i + way] - c[i]) * cost) >= 2 * abs(excess):
                continue  # the step would not reduce the distance
            farther = ((c[i + way] - wanted[k]) ** 2 - (c[i] - wanted[k]) ** 2) * cost**2 / change
            if best is None or farther < best[0]:
                best = farther, k
        if best is None:
            return [c[i] for c, i in zip(counts, at, strict=True)]
        at[best[1]] += way


def fit_counts(
    rows: Rows, wanted: Sequence[float], keep: float, constraint: Constraint, each_block: bool = False
) -> list[int]:
    """Chooses allowed numbers of units near the wanted ones, so that the groups keep the fraction `keep` of parameters.

    With `each_block`, each block keeps this fraction; else all blocks together do. Blocks must be in order.

    Raises:
        ValueError: The constraint allows no number of units for some group.
    """
    scopes = list(dict.fromkeys(block.index for block, _ in rows)) if each_block else [None]
    chosen = [0] * len(rows)
    for scope in scopes:
        members = [i for i, (block, _) in enumerate(rows) if scope in (None, block.index)]
        costs = [rows[i][0].cost(rows[i][1]) for i in members]
        target = keep * _total([len(rows[i][1]) for i in members], costs)
        allowed = [constraint.counts(*rows[i]) for i in members]
        counts = nearest_counts([wanted[i] for i in members], allowed, costs, target)
        for i, count in zip(members, counts, strict=True):
            chosen[i] = count
    return chosen


@dataclasses.dataclass(frozen=True)
class Budget:
    """The fraction of parameters that blocks may keep, and the constraint on their sizes.

    Args:
        blocks: All blocks of the model.
        keep: The fraction of the groups' parameters to keep.
        constraint: The numbers of units that are allowed.
        attention: The attention units that are prunable besides the FFN channels.
        each_block: Whether, under a constraint, each block must meet the budget, and not only all together.
        left: The number of experts that stay in each block; all by default.
    """

    blocks: Sequence[Block]
    keep: float
    constraint: Constraint = FREE
    attention: AttentionUnit = "none"
    each_block: bool = False
    left: int | None = None

    @functools.cached_property
    def rows(self) -> Rows:
        """Each group with its block."""
        rows = [(block, group) for block in self.blocks for group in block.groups(self.attention)]
        if self.left is None:
            return rows
        return [(b, dataclasses.replace(g, experts=self.left) if g.experts else g) for b, g in rows]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The number of units of each group."""
        return [len(group) for _, group in self.rows]

    @functools.cached_property
    def costs(self) -> list[int]:
        """The parameters of one unit of each group."""
        return [block.cost(group) for block, group in self.rows]

    @functools.cached_property
    def restricted(self) -> bool:
        """Whether only some numbers of units are allowed, by a constraint or as experts have channels in steps."""
        return self.constraint != FREE or any(group.experts for _, group in self.rows)

    @property
    def whole(self) -> int:
        """The parameters of all groups."""
        return _total(self.sizes, self.costs)

    @property
    def alike(self) -> list[float]:
        """The number of units of each group if all keep the same fraction."""
        return [size * self.keep for size in self.sizes]

    @functools.cached_property
    def allowed(self) -> list[Sequence[int]]:
        """The allowed numbers of units of each group, ascending; from 1 without a constraint."""
        if not self.restricted:
            return [range(1, size + 1) for size in self.sizes]
        return [self.constraint.counts(block, group) for block, group in self.rows]

    @property
    def steps(self) -> list[int]:
        """The parameters of the step from all units of each group to the next smaller allowed number."""
        pairs = zip(self.allowed, self.costs, strict=True)
        return [cost * (counts[-1] - counts[-2] if len(counts) > 1 else 1) for counts, cost in pairs]

    def fit(self, wanted: Sequence[float]) -> list[int]:
        """Chooses allowed numbers of units near the wanted ones, by :func:`fit_counts`."""
        return fit_counts(self.rows, wanted, self.keep, self.constraint, self.each_block)

    def check(self, sparsity: float, of: int | None = None, chosen: Sequence[int] | None = None) -> None:
        """Checks that the constraint allows a sparsity within 0.05, and within half, of the requested one.

        Args:
            sparsity: The requested sparsity.
            of: The number of parameters that `sparsity` refers to; by default all parameters of the blocks.
            chosen: The number of units that each group keeps; by default :attr:`alike`, fitted to the constraint.

        Raises:
            ValueError: No such sparsity is possible.
        """
        if not self.restricted:
            return
        if self.attention == "none" and self.constraint != FREE:
            self.constraint.check_heads(self.blocks)
        chosen = self.fit(self.alike) if chosen is None else chosen
        of = sum(block.parameters() for block in self.blocks) if of is None else of
        excess = (_total(chosen, self.costs) - self.keep * self.whole) / of
        if abs(excess) > min(TOLERANCE, sparsity / 2) + 1e-9:
            allow, change = "`serve_on` and `tensor_parallel` allow", ", or change `serve_on` or `tensor_parallel`"
            if self.constraint == FREE:
                allow, change = "experts can have, as their channels leave in steps of 8", ""
            raise ValueError(
                f"sparsity {sparsity} is out of reach with the sizes that {allow}: the nearest is "
                f"{max(0.0, sparsity - excess):.3f}; ask for that{change}"
            )


def importance(distances: Sequence[float], gain: float = 1.0) -> Tensor:  # [B]
    r"""Importance of each block from the distances between block inputs and outputs (CFSP, coarse-grained).

    .. math:: u_l = \sigma\bigl(13.1072 \, a \, (S_l - \bar S)\bigr)

    The authors divide a sum over 128 x 1024 tokens by 1e4, which is 13.1072 times the mean over tokens.

    Example:
        >>> importance([0.1, 0.1])
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    s = torch.tensor(distances, dtype=torch.float64)
    return torch.sigmoid(13.1072 * gain * (s - s.mean()))


def kept_fractions(u: Tensor, p: float, sizes: Sequence[int] | None = None) -> Tensor:  # [B] -> [B]
    r"""The fraction of each block's channels to keep (CFSP, equation for the layer-wise ratio).

    .. math:: k_l = \frac{u_l}{\bar u} (1 - p)

    If a block would keep more channels than it has, all importances first move toward their mean. `sizes`, the widths
    of the blocks, weight this mean, so that p refers to all channels together.

    Example:
        >>> kept_fractions(torch.tensor([0.4, 0.6]), 0.2)
        tensor([0.6400, 0.9600])
    """
    size = torch.tensor(sizes or [1] * len(u), dtype=u.dtype)
    mean = (u * size).sum() / size.sum()
    if u.max() / mean * (1 - p) >= 1 and u.max() > mean:
        u = mean + (u - mean) * (mean * (1 / (1 - p) - 1) / (u.max() - mean) / 1.05)
    return u / mean * (1 - p)


def global_ranking(scores: list[Tensor], costs: list[int], p: float, exact: bool = False) -> list[Tensor]:
    """Ranks the units of all groups together and keeps the best, so that their cost is nearest to (1 - p) of the total.

    Each group keeps at least its best unit. The cost can miss the budget by half the dearest unit.

    Args:
        scores: Scores of each group's units, [units] each, comparable between groups.
        costs: Parameters of one unit of each group.
        p: The fraction of the total cost to remove.
        exact: Whether the cheapest units then make up for what is missing, or too much, by their rank.

    Returns:
        The indices of the units to keep in each group, ascending.

    Raises:
        ValueError: The best unit of each group alone exceeds the budget.

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
    budget = (1 - p) * cost.sum()
    count = int((spent - budget).abs().argmin()) + 1
    kept = torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, order[:count], True)
    if exact:
        cheapest = order[(cost[order] == cost.min()) & flat[order].isfinite()]
        excess = int(((spent[count - 1] - budget) / cost.min()).round())
        if excess > 0:
            kept[cheapest[kept[cheapest]][-excess:]] = False
        else:
            kept[cheapest[~kept[cheapest]][:-excess]] = True
    return [kept[owner == i].nonzero().flatten() for i in range(len(scores))]


def check_best(costs: Sequence[int], sizes: Sequence[int], p: float) -> None:
    """Raises ValueError if the best unit of each group alone exceeds the budget of :func:`global_ranking`."""
    if len(costs) > 1 and sum(costs) - costs[-1] / 2 >= (1 - p) * _total(sizes, costs):
        raise ValueError(
            f"cannot remove {p:.1%} of the heads and channels, as every block keeps its best head and channel: ask for "
            "a lower sparsity"
        )


def _total(counts: Sequence[int], costs: Sequence[int]) -> int:
    """The cost of `counts[i]` units of group i for all groups together."""
    return sum(map(operator.mul, counts, costs))
