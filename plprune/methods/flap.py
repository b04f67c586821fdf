r"""FLAP: fluctuation-based adaptive structured pruning (An et al., AAAI 2024, https://arxiv.org/abs/2312.11983).

Inputs that hardly fluctuate can be replaced by their mean: heads and FFN channels are ranked by how much their
removal would make the consumer's output fluctuate, and what they contributed on average goes into its bias.

Symbols: X the consumer's inputs with mean and variance per channel j, W its weight [d_out, d_in], p the fraction of
the linear layers' parameters to remove, c the cost of a kv head in channels.

Deviations from the authors' code:

- Under grouped-query attention the unit is a kv head with all its query heads.
- `variance="running"` is the authors' estimate, which leaves out the first sample and weighs the early ones less;
  `"unbiased"` is the paper's equation. At 16 windows the two keep 97.8% the same channels, and neither is better.
- The cost of a head is what it is, not 512/3; the mean is not halved at batch size 2.
- A block never loses its last head or channel; theirs can.
- `AL-AM` keeps the number of units whose cost is nearest to the target; theirs keeps one fewer.
- `repair: restore` changes the kept weights too, in a second walk; the paper only compensates, by dense means.
- Attention scores are squared before anything else, as in the code and not in the paper: `square_attention`.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.methods.base import Repairing
from plprune.planning.extremes import attention_by_span, extreme_sizes, unique_cases
from plprune.planning.needs import Work
from plprune.pruning.allocation import (
    Budget,
    Rows,
    check_best,
    fit_counts,
    fraction_to_remove,
    global_ranking,
    importance,
    largest_remainder,
    rescale,
    top_k,
)
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import Repair, compensation
from plprune.pruning.statistics import Moments
from plprune.pruning.stream import observe, stream
from plprune.pruning.surgery import Surgery

Metric = Literal["WIFV", "IFV", "WIFN"]
Structure = Literal["AL-AM", "AL-MM", "UL-MM", "UL-UM"]


@dataclasses.dataclass(frozen=True)
class FLAP(Repairing):
    """Fluctuation of inputs, one standardised ranking of everything, bias compensation.

    Args:
        sparsity: The fraction of parameters to remove, in [0, 1).
        metric: Score of a channel: weighted input variance (WIFV), input variance (IFV), weighted input norm (WIFN).
        variance: Estimate of the variance: the authors' running one, or the unbiased one of the paper's equation.
        structure: Who competes with whom. AL-AM: all heads and channels of all blocks. AL-MM: all heads among
            themselves, all channels among themselves. UL-MM: within each block, with a given number of heads.
            UL-UM: within each block, the same fraction of heads and of channels, rounded down.
        remove_heads: kv heads to remove in all blocks together, for AL-MM and UL-MM only: the channels give the rest.
            UL-MM removes the same number in each block, rounded down.
        square_attention: Whether the scores of attention channels are squared first, as in the authors' code.
        sparsity_of: What `sparsity` is a fraction of: the decoder blocks' parameters, or their linear layers' only,
            as the paper counts.
    """

    sparsity: float = 0.2
    metric: Metric = "WIFV"
    variance: Literal["running", "unbiased"] = "running"
    structure: Structure = "AL-AM"
    remove_heads: int = 0
    square_attention: bool = True
    sparsity_of: Literal["blocks", "linears"] = "blocks"
    repair: Repair = dataclasses.field(default="compensate", kw_only=True)

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration, blocks = Calibration.of(batches), blocks_of(model)
        p = self._fraction(blocks, constraint)
        budget, repairer = self._budget(blocks, p, constraint), self.repairer(calibration)
        means: dict[str, Tensor] = {}
        scores: list[tuple[Block, UnitGroup, Tensor]] = []
        distances = []
        for block, inputs in stream(model, calibration, "FLAP"):
            for group, moments in observe(block, inputs, Moments, budget.attention):
                means[group.name] = moments.mean
                scores.append((block, group, self._score(block, group, moments)))
            distances.append(inputs.influence.distance("angular"))
        surgery, chosen = Surgery(model), self._choose(scores, p)
        if constraint != FREE:  # the best units of each group, as many as it allows: near the number that was chosen
            counts = self._counts(budget, [len(keep) for keep in chosen])
            chosen = [top_k(score.sum(1), count) for (*_, score), count in zip(scores, counts, strict=True)]
        decided = [(block, group, keep) for (block, group, _), keep in zip(scores, chosen, strict=True)]
        if self.repair == "compensate":
            _compensate(surgery, decided, means)
        else:
            repairer.carry_out(surgery, decided, "FLAP repair")
        return surgery.plan("FLAP", dataclasses.asdict(self), importance(distances))

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        reasons = []
        if constraint.uniform and self.structure.startswith("AL"):
            reasons.append("all blocks must have the same sizes: set `structure` to UL-UM")
        if constraint.dense_heads and self.remove_heads:
            reasons.append("no head may leave: set `remove_heads` to 0")
        return reasons + super().conflicts(constraint, blocks)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks = blocks_of(model)
        p = self._fraction(blocks, constraint)
        budget = self._budget(blocks, p, constraint)
        heads = attention_by_span(model, budget.rows)
        if self.structure == "AL-AM":
            return unique_cases(budget.rows, self._contests(budget, heads, p))
        if self.structure == "UL-UM":
            cases = [[size - removed_alike(p, size) for size in budget.sizes]]
        else:
            cases = self._mixes(budget.rows, heads, p)
        if constraint != FREE:
            cases = [self._counts(budget, case) for case in cases]
        return unique_cases(budget.rows, cases)

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The second pass, which restores; compensation needs none."""
        if self.repair != "restore":
            return Work()
        return self.repair_work(model, count * length, length, unit(constraint))

    def _contests(self, budget: Budget, heads: list[int], p: float) -> list[list[int]]:
        """What can come of one ranking: a typical case, and the extremes in which heads or channels go first.

        The ranking ends within half a unit of the budget, which counts a bias for every group.
        """
        rows, costs, free = budget.rows, budget.costs, budget.constraint == FREE
        check_best(costs, budget.sizes, p)
        allowed = [
            range(1, len(group) + 1) if free else budget.constraint.counts(block, group) for block, group in rows
        ]
        channels = [i for i in range(len(rows)) if i not in set(heads)]
        steps = [costs[i] * (allowed[i][-1] - allowed[i][-2] if len(allowed[i]) > 1 else 1) for i in range(len(rows))]
        slack = (max(steps) if free else max(steps[i] for i in channels)) / 2
        target = budget.keep * budget.whole
        biases = sum(block.absent_bias(group) for block, group in rows) if self.biased else 0
        most, least = target + slack + biases, target - slack - biases - max(steps[i] for i in channels)
        room = sum(costs[i] * (allowed[i][-1] - allowed[i][0]) for i in channels)
        every = sum(costs[i] * allowed[i][-1] for i in range(len(rows)))
        cases = [self._typical(rows, heads, channels, p) if free else self._counts(budget, self._rehearsed(budget))]
        for limit, even in ((most, True), (least, False)):
            channels_first = [channels] if room >= every - limit else [channels, heads]
            for phases in (channels_first, [heads[::-1], channels]):
                cases.append(extreme_sizes(rows, allowed, phases, limit, even))
        return cases

    def _typical(self, rows: Rows, heads: list[int], channels: list[int], p: float) -> list[int]:
        """The same share of heads and of channels, in every block, as near to the budget as channels get it."""
        costs, counts = [block.cost(group) for block, group in rows], [len(group) for _, group in rows]
        left = (1 - p) * sum(map(operator.mul, costs, counts))
        for own in filter(None, (heads, channels)):
            every = sum(counts[i] for i in own)
            total = round((1 - p) * every if own is heads else left / costs[own[0]])
            kept = largest_remainder([counts[i] for i in own], min(every, max(len(own), total)))
            for i, count in zip(own, kept, strict=True):
                counts[i] = count
            left -= sum(costs[i] * counts[i] for i in own)
        return counts

    def _mixes(self, rows: Rows, heads: list[int], p: float) -> list[list[int]]:
        """What comes of a given number of heads, which data may take from any block, as they may the channels."""
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
        """Takes units of one kind: as many in each block under UL-MM, or in all together, evenly or from the first."""
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

    def _whole(self, blocks: list[Block]) -> int:
        """The parameters of which `sparsity` is a fraction."""
        if self.sparsity_of == "linears":
            return sum(len(group) * block.cost(group) for block in blocks for group in block.groups())
        return sum(block.parameters() for block in blocks)

    def _fraction(self, blocks: list[Block], constraint: Constraint) -> float:
        """The fraction of prunable parameters to remove (p)."""
        attention, what = unit(constraint), "what FLAP prunes"
        if self.sparsity_of == "linears":
            return rescale(self.sparsity, self._whole(blocks), Budget(blocks, 1.0, attention=attention).whole, what)
        return fraction_to_remove(self.sparsity, blocks, attention, what, biased=self.biased)

    def _budget(self, blocks: list[Block], p: float, constraint: Constraint) -> Budget:
        each_block = self.structure.startswith("UL")
        budget = Budget(blocks, 1 - p, constraint, unit(constraint), each_block)
        if constraint != FREE:
            budget.check(self.sparsity, self._whole(blocks), self._counts(budget, self._rehearsed(budget)))
        return budget

    def _score(self, block: Block, group: UnitGroup, moments: Moments) -> Tensor:  # [units, columns per unit]
        weight = block.weight(group).double()
        index = group.consumer.index
        variance = moments.running_variance if self.variance == "running" else moments.variance
        score = METRICS[self.metric](weight, variance[index], moments.norm[index])
        return score.square() if group.kind == "attention" and self.square_attention else score

    def _choose(self, scores: list[tuple[Block, UnitGroup, Tensor]], p: float) -> list[Tensor]:
        if self.structure == "AL-AM":
            costs = [block.cost(group) for block, group, _ in scores]
            return global_ranking([standardised(s) for *_, s in scores], costs, p)
        if self.structure == "UL-UM":
            return [top_k(s.sum(1), len(s) - removed_alike(p, len(s))) for *_, s in scores]
        return self._mixed(scores, p)

    def _counts(self, budget: Budget, wanted: Sequence[float]) -> list[int]:
        """Units to keep in each group; under the MM structures heads are fitted first, then channels to the rest."""
        rows, costs = budget.rows, budget.costs
        kinds = {kind: [i for i, (_, g) in enumerate(rows) if g.kind == kind] for kind in ("attention", "ffn")}
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

    def _rehearsed(self, budget: Budget) -> list[float]:
        """How many units each group would keep if all scores were alike."""
        rows, wanted = budget.rows, budget.alike
        if not self.structure.endswith("MM"):
            return wanted
        gone = self.remove_heads / max(1, sum(group.kind == "attention" for _, group in rows))
        gone = int(gone) if self.structure == "UL-MM" else gone
        return [len(g) - gone if g.kind == "attention" else w for (_, g), w in zip(rows, wanted, strict=True)]

    def _mixed(self, scores: list[tuple[Block, UnitGroup, Tensor]], p: float) -> list[Tensor]:
        """UL-MM and AL-MM: `remove_heads` heads go, and channels for the rest of the budget."""
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
        """kv heads to remove in all blocks together; under UL-MM in each block."""
        blocks = sum(group.kind == "attention" for _, group in rows)
        return self.remove_heads // max(1, blocks) if self.structure == "UL-MM" else self.remove_heads

    def _channels_to_remove(self, rows: Rows, counts: Sequence[int], p: float) -> int:
        """FFN channels to remove so that the budget is met with the given counts; under UL-MM in each block."""
        costs = [block.cost(group) for block, group in rows]
        left = sum(cost * (count - (1 - p) * len(g)) for cost, count, (_, g) in zip(costs, counts, rows, strict=True))
        own = [cost for cost, (_, group) in zip(costs, rows, strict=True) if group.kind == "ffn"]
        return int(left / (sum(own) if self.structure == "UL-MM" else own[0]) + 1e-9)


def unit(asked: Constraint) -> Literal["kv_heads", "none"]:
    """The unit of attention that can leave."""
    return "none" if asked.dense_heads else "kv_heads"


METRICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "WIFV": lambda weight, variance, norm: fluctuation(weight, variance),
    "IFV": lambda weight, variance, norm: variance,
    "WIFN": lambda weight, variance, norm: weighted_norm(weight, norm),
}


def fluctuation(
    weight: Tensor,  # [d_out, ...]
    variance: Tensor,  # [...]
) -> Tensor:  # [...]
    r"""Weighted input feature variance (FLAP, "WIFV").

    .. math:: S_j = \frac{1}{n - 1} \sum_t (X_{tj} - \bar X_j)^2 \; \lVert W_{:,j} \rVert_2^2

    Example:
        >>> fluctuation(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1.0, 5.0]))
        tensor([10., 20.])
    """
    return variance * weight.square().sum(0)


def weighted_norm(
    weight: Tensor,  # [d_out, ...]
    norm: Tensor,  # [...]
) -> Tensor:  # [...]
    r"""Weighted input feature norm (FLAP, "WIFN").

    .. math:: S_j = \frac{1}{d_{out}} \sum_i |W_{ij}| \; \lVert X_{:,j} \rVert_2

    Example:
        >>> weighted_norm(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([1.0, 5.0]))
        tensor([2., 5.])
    """
    return weight.abs().mean(0) * norm


def standardised(score: Tensor) -> Tensor:  # [units, channels per unit] -> [units]
    r"""Scores of one kind in one block as comparable with any other's: the mean over a unit's channels of

    .. math:: z_j = (S_j - \bar S) / \mathrm{std}(S)

    Example:
        >>> standardised(torch.tensor([[1.0], [2.0], [3.0]]))
        tensor([-1.,  0.,  1.])
    """
    if score.numel() < 2 or not score.std():
        return torch.zeros(len(score), dtype=score.dtype)
    return ((score - score.mean()) / score.std()).mean(1)


def removed_alike(p: float, size: int) -> int:
    """Units that leave a group under UL-UM."""
    return int(p * size + 1e-9)


def _within_blocks(rows: list[tuple[Block, UnitGroup, Tensor]], remove: int) -> list[Tensor]:
    """UL-MM: a ranking of one kind's units in each block, which loses `remove` of them."""
    _check_removal(remove, min((len(g) for _, g, _ in rows), default=1), "in each block")
    return [top_k(score.sum(1), len(score) - remove) for *_, score in rows]


def _among_themselves(rows: list[tuple[Block, UnitGroup, Tensor]], remove: int) -> list[Tensor]:
    """AL-MM: one ranking of all units of one kind."""
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


def _compensate(surgery: Surgery, decided: list[tuple[Block, UnitGroup, Tensor]], means: dict[str, Tensor]) -> None:
    """Prunes, and adds what the removed inputs contributed on average in the dense model to the biases."""
    for block, rows in itertools.groupby(decided, lambda row: row[0]):
        with block.present():
            for _, group, keep in rows:
                gain = compensation(_consumer(block, group), means[group.name], _columns(group, keep))
                surgery.keep(block, group, keep, bias_gain=gain)


def _consumer(block: Block, group: UnitGroup) -> Tensor:  # [d_out, columns of the group]
    return block.weight(group).flatten(1)


def _columns(group: UnitGroup, keep: Tensor) -> Tensor:
    return group.consumer.index[keep].flatten()
