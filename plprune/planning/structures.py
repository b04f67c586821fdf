"""The structures of FLAP: which units one ranking covers, and how many of them each group keeps.

======  ==================================================================================================
AL-AM   all heads and channels of all blocks, in one ranking of standardised scores
AL-MM   all heads in one ranking and all channels in another, for a given number of heads
UL-MM   a ranking of heads and a ranking of channels in each block, for a given number of heads
UL-UM   the same rankings; every block keeps the same fraction of heads and of channels
======  ==================================================================================================

Symbols: p the fraction of the prunable parameters to remove.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plprune.architecture.blocks import Block, UnitGroup
from plprune.planning.extremes import extreme_sizes, orders, unique_cases
from plprune.pruning.allocation import Budget, Rows, check_best, fit_counts, global_ranking, largest_remainder, top_k

Structure = Literal["AL-AM", "AL-MM", "UL-MM", "UL-UM"]
Scores = list[tuple[Block, UnitGroup, Tensor]]  # of each group [units, columns per unit]


@dataclass(frozen=True)
class Competition:
    """Chooses units by their scores, and predicts how many each group will keep.

    Args:
        structure: Which units one ranking covers.
        remove_heads: kv heads to remove in all blocks together, for AL-MM and UL-MM; UL-MM removes the same number in
            each block, rounded down.
    """

    structure: Structure
    remove_heads: int = 0

    def choose(self, scores: Scores, p: float) -> list[Tensor]:
        """Chooses the units of each group to keep; ignores constraints."""
        if self.structure == "AL-AM":
            costs = [block.cost(group) for block, group, _ in scores]
            return global_ranking([standardised(s) for *_, s in scores], costs, p)
        if self.structure == "UL-UM":
            return [top_k(s.sum(1), len(s) - removed_alike(p, len(s))) for *_, s in scores]
        return self._mixed(scores, p)

    def counts(self, budget: Budget, wanted: Sequence[float]) -> list[int]:
        """The number of units to keep in each group; MM structures first fit heads, then channels to the rest."""
        rows, costs = budget.rows, budget.costs
        kinds = {
            kind: [i for i, (_, g) in enumerate(rows) if (g.kind == "attention") == (kind == "attention")]
            for kind in ("attention", "ffn")
        }
        if not self.structure.endswith("MM") or not kinds["attention"]:
            return budget.fit(wanted)
        left, counts = budget.keep * budget.whole, {}
        for kind, own in kinds.items():
            share = sum(costs[i] * wanted[i] for i in own) if kind == "attention" else left
            keep = share / sum(costs[i] * budget.sizes[i] for i in own)
            every = [rows[i] for i in own], [wanted[i] for i in own]
            found = fit_counts(*every, keep, budget.constraint, budget.each_block)
            counts |= dict(zip(own, found, strict=True))
            left -= sum(costs[i] * counts[i] for i in own)
        return [counts[i] for i in range(len(rows))]

    def even_counts(self, budget: Budget) -> list[float]:
        """The number of units that each group would keep if all scores were equal."""
        rows, wanted = budget.rows, budget.alike
        if not self.structure.endswith("MM"):
            return wanted
        gone = self.remove_heads / max(1, sum(group.kind == "attention" for _, group in rows))
        gone = int(gone) if self.structure == "UL-MM" else gone
        return [len(g) - gone if g.kind == "attention" else w for (_, g), w in zip(rows, wanted, strict=True)]

    def _mixed(self, scores: Scores, p: float) -> list[Tensor]:
        """UL-MM and AL-MM: removes `remove_heads` heads, then channels until the budget is met."""
        rows = [(block, group) for block, group, _ in scores]
        choose = _within_blocks if self.structure == "UL-MM" else _among_themselves
        heads = [row for row in scores if row[1].kind == "attention"]
        channels = [row for row in scores if row[1].kind == "ffn"]
        kept = {g.name: k for (_, g, _), k in zip(heads, choose(heads, self._heads_to_remove(rows)), strict=True)}
        counts = [len(kept[group.name]) if group.name in kept else len(group) for _, group in rows]
        others = choose(channels, self._channels_to_remove(rows, counts, p))
        kept |= {g.name: k for (_, g, _), k in zip(channels, others, strict=True)}
        return [kept[group.name] for _, group in rows]

    def _heads_to_remove(self, rows: Rows) -> int:
        """The number of kv heads to remove in all blocks together; under UL-MM in each block."""
        blocks = sum(group.kind == "attention" for _, group in rows)
        return self.remove_heads // max(1, blocks) if self.structure == "UL-MM" else self.remove_heads

    def _channels_to_remove(self, rows: Rows, counts: Sequence[int], p: float) -> int:
        """The number of FFN channels to remove to meet the budget with the given counts; under UL-MM in each block."""
        costs = [block.cost(group) for block, group in rows]
        left = sum(cost * (count - (1 - p) * len(g)) for cost, count, (_, g) in zip(costs, counts, rows, strict=True))
        own = [cost for cost, (_, group) in zip(costs, rows, strict=True) if group.kind == "ffn"]
        return int(left / (sum(own) if self.structure == "UL-MM" else own[0]) + 1e-9)

    def predict(self, budget: Budget, heads: list[int], p: float, biased: bool) -> list[dict[str, int]]:
        """Predicts the sizes of the groups, by name: a typical case first, then the extremes.

        Args:
            budget: The groups, and the fraction to keep.
            heads: Indices of the groups of heads; those that attend to the most tokens come first.
            p: The fraction to remove.
            biased: Whether a repair gives every consumer a bias.
        """
        if self.structure == "AL-AM":
            return unique_cases(budget.rows, self._contests(budget, heads, p, biased))
        if self.structure == "UL-UM":
            cases = [[size - removed_alike(p, size) for size in budget.sizes]]
        else:
            cases = self._mixes(budget.rows, heads, p)
        if budget.restricted:
            cases = [self.counts(budget, case) for case in cases]
        return unique_cases(budget.rows, cases)

    def _contests(self, budget: Budget, heads: list[int], p: float, biased: bool) -> list[list[int]]:
        """The possible results of one ranking: a typical case, and the extremes that remove heads or channels first.

        The cost of the kept units is within half a unit of the budget, which includes a bias for every group.
        """
        rows, costs, free = budget.rows, budget.costs, not budget.restricted
        check_best(costs, budget.sizes, p)
        allowed, steps = budget.allowed, budget.steps
        channels = [i for i in range(len(rows)) if i not in set(heads)]
        slack = (max(steps) if free else max(steps[i] for i in channels)) / 2
        target = budget.keep * budget.whole
        biases = sum(block.absent_bias(group) for block, group in rows) if biased else 0
        most, least = target + slack + biases, target - slack - biases - max(steps[i] for i in channels)
        room = sum(costs[i] * (allowed[i][-1] - allowed[i][0]) for i in channels)
        every = sum(costs[i] * allowed[i][-1] for i in range(len(rows)))
        cases = [self._typical(budget, heads, channels, p) if free else self.counts(budget, self.even_counts(budget))]
        for limit, even in ((most, True), (least, False)):
            heads_too = [heads] if room < every - limit else []
            for own in orders(rows, channels):
                for phases in ([*own, *heads_too], [heads[::-1], *own]):
                    cases.append(extreme_sizes(rows, allowed, phases, limit, even))
        return cases

    def _typical(self, budget: Budget, heads: list[int], channels: list[int], p: float) -> list[int]:
        """Keeps the same fraction of heads and of channels in every block, as near to the budget as possible."""
        costs, counts = budget.costs, list(budget.sizes)
        left = (1 - p) * budget.whole
        for own in filter(None, (heads, channels)):
            every = sum(counts[i] for i in own)
            total = round((1 - p) * every if own is heads else left / costs[own[0]])
            kept = largest_remainder([counts[i] for i in own], min(every, max(len(own), total)))
            for i, count in zip(own, kept, strict=True):
                counts[i] = count
            left -= sum(costs[i] * counts[i] for i in own)
        return counts

    def _mixes(self, rows: Rows, heads: list[int], p: float) -> list[list[int]]:
        """The possible results for a given number of heads: heads and channels may leave from any block."""
        channels = [i for i in range(len(rows)) if i not in set(heads)]
        sizes, cases = [len(group) for _, group in rows], []
        for order in (heads, heads[::-1]):
            for even in (True, False):
                counts = list(sizes)
                self._take(counts, order, self._heads_to_remove(rows), even)
                self._take(counts, channels, self._channels_to_remove(rows, counts, p), even)
                cases.append(counts)
        return cases

    def _take(self, counts: list[int], own: list[int], remove: int, even: bool) -> None:
        """Removes units of one kind: `remove` per block (UL-MM), or in all, evenly or from the first block on."""
        if self.structure == "UL-MM":
            _check_removal(remove, min((counts[i] for i in own), default=1), "in each block")
            for i in own:
                counts[i] -= remove
            return
        every = sum(counts[i] for i in own)
        _check_removal(remove, every - len(own) + 1, "in all blocks")
        if even and own:
            kept = largest_remainder([counts[i] for i in own], every - remove)
            for i, count in zip(own, kept, strict=True):
                counts[i] = count
            return
        for i in own:
            gone = min(counts[i] - 1, remove)
            counts[i], remove = counts[i] - gone, remove - gone


def standardised(score: Tensor) -> Tensor:  # [units, channels per unit] -> [units]
    r"""Standardises the scores of a group, so that groups are comparable: per unit, the mean over channels of

    .. math:: z_j = (S_j - \bar S) / \mathrm{std}(S)

    Example:
        >>> standardised(torch.tensor([[1.0], [2.0], [3.0]]))
        tensor([-1.,  0.,  1.])
    """
    if score.numel() < 2 or not score.std():
        return torch.zeros(len(score), dtype=score.dtype)
    return ((score - score.mean()) / score.std()).mean(1)


def removed_alike(p: float, size: int) -> int:
    """The number of units that UL-UM removes from a group."""
    return int(p * size + 1e-9)


def _within_blocks(rows: Scores, remove: int) -> list[Tensor]:
    """UL-MM: ranks the units of one kind in each block, and removes `remove` per block."""
    _check_removal(remove, min((len(g) for _, g, _ in rows), default=1), "in each block")
    return [top_k(score.sum(1), len(score) - remove) for *_, score in rows]


def _among_themselves(rows: Scores, remove: int) -> list[Tensor]:
    """AL-MM: ranks the units of one kind in all blocks together, and removes `remove` in total."""
    units = sum(len(g) for _, g, _ in rows)
    _check_removal(remove, units - len(rows) + 1, "in all blocks")
    if not rows:
        return []
    return global_ranking([standardised(s) for *_, s in rows], [1] * len(rows), remove / units)


def _check_removal(remove: int, there: int, where: str) -> None:
    if not 0 <= remove < there:
        raise ValueError(
            f"FLAP would have to remove {remove} units {where} where at most {there - 1} can go: "
            "change `sparsity` or `remove_heads`"
        )
