r"""FLAP: fluctuation-based adaptive structured pruning (An et al., AAAI 2024, https://arxiv.org/abs/2312.11983).

Inputs that hardly fluctuate can be replaced by their mean. FLAP ranks heads and FFN channels by how much they make the
consumer's output fluctuate, and adds the mean contribution of the removed ones to the consumer's bias.

Symbols: X the consumer's inputs with mean and variance per channel j, W its weight [d_out, d_in], p the fraction of
the linear layers' parameters to remove, c the cost of a kv head in channels.

Deviations from the authors' code:

- Under grouped-query attention the unit is a kv head with all its query heads.
- `variance="running"` is the authors' estimate, which omits the first sample and gives the early ones less weight;
  `"unbiased"` is the paper's equation. At 16 windows both keep 97.8% the same channels, and neither is better.
- A head costs its true number of parameters, not 512/3 channels. The mean is not halved at batch size 2.
- A block never loses its last head or channel; in the authors' code it can.
- `AL-AM` keeps the number of units whose cost is nearest to the target; the authors' code keeps one fewer.
- `repair: restore` also changes the kept weights, in a second pass. The paper only compensates, by dense means.
- `experts` ranks whole experts of a mixture with the other units, by REAP's saliency. What an expert gave on average is
  not compensated. Heads and channels then leave until the sparsity is met.
- Attention scores are squared before they are standardised, as in the code but not the paper: `square_attention`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.methods.base import Repairing
from plprune.planning import whole_experts
from plprune.planning.extremes import attention_by_span, distinct
from plprune.planning.needs import Work
from plprune.planning.structures import Competition, Structure, standardised
from plprune.pruning.allocation import (
    Budget,
    fraction_to_remove,
    importance,
    ranked,
    top_k,
)
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.expert_inputs import PerExpert
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import RESTORING, Repair, compensation, say_uncompensated
from plprune.pruning.statistics import Moments
from plprune.pruning.stream import observe, stream, values
from plprune.pruning.surgery import Surgery

Metric = Literal["WIFV", "IFV", "WIFN"]


@dataclasses.dataclass(frozen=True)
class FLAP(Repairing):
    """Ranks heads and channels by the fluctuation of their values, and compensates removed ones by a bias.

    Args:
        sparsity: The fraction of parameters to remove, in [0, 1).
        metric: Score of a channel: weighted input variance (WIFV), input variance (IFV), weighted input norm (WIFN).
        variance: Estimate of the variance: the authors' running one, or the unbiased one of the paper's equation.
        structure: Which units one ranking covers. AL-AM: all heads and channels of all blocks. AL-MM: all heads; all
            channels. UL-MM: the heads of a block; its channels. UL-UM: as UL-MM, and each block loses the same fraction
            of heads and of channels, rounded down.
        remove_heads: kv heads to remove in all blocks together, for AL-MM and UL-MM only; channels cover the rest of
            the sparsity. UL-MM removes the same number in each block, rounded down.
        square_attention: Whether the scores of attention channels are squared first, as in the authors' code.
        sparsity_of: Whether `sparsity` is a fraction of all parameters of the decoder blocks, or of their linear layers
            only, as in the paper.
        experts: Whether whole experts of a mixture are ranked with the other units, for AL-AM only; every block keeps
            as many.
    """

    sparsity: float = 0.2
    metric: Metric = "WIFV"
    variance: Literal["running", "unbiased"] = "running"
    structure: Structure = "AL-AM"
    remove_heads: int = 0
    square_attention: bool = True
    sparsity_of: Literal["blocks", "linears"] = "blocks"
    experts: bool = False
    repair: Repair = dataclasses.field(default="compensate", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts and self.structure != "AL-AM":
            raise ValueError("`experts` ranks experts with all other units: set `structure` to AL-AM")

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration, blocks = Calibration.of(batches), blocks_of(model)
        p, budget = self._settled(blocks, constraint)
        repairer = self.repairer(calibration)
        means: dict[str, Tensor] = {}
        scores: list[tuple[Block, UnitGroup, Tensor]] = []
        of_experts: dict[str, Tensor] = {}  # [experts, channels] each
        saliencies: list[Tensor] = []
        distances = []
        for block, inputs in stream(model, calibration, "FLAP"):
            for group, moments in observe(block, inputs, Moments, budget.attention):
                score = self._score(block, group, moments)
                means[group.name] = values(moments, lambda m: m.mean)
                if isinstance(moments, PerExpert):
                    means[group.name][moments.few] = 0  # these are not compensated
                    of_experts[group.name], score = score, ranked(score)
                    saliencies.append(moments.saliency.mean)
                scores.append((block, group, score))
            distances.append(inputs.influence.distance("angular"))
        leaving: dict[int, Tensor] = {}
        if self.experts:
            p, budget, leaving = self._experts(blocks, constraint, scores, saliencies)
            for name, keep in [(g.name, leaving[b.index]) for b, g, _ in scores if g.experts and leaving]:
                of_experts[name], means[name] = of_experts[name][keep], means[name][keep]
            scores = [
                (block, group, ranked(of_experts[group.name]) if group.experts else score)
                for (block, group), (*_, score) in zip(budget.rows, scores, strict=True)
            ]
        surgery, chosen = Surgery(model), self._competition.choose(scores, p)
        if budget.restricted:  # the best units of each group, in the allowed number nearest to the chosen one
            counts = self._competition.counts(budget, [len(keep) for keep in chosen])
            chosen = [top_k(score.sum(1), count) for (*_, score), count in zip(scores, counts, strict=True)]
        decided = [(block, group, keep) for (block, group, _), keep in zip(scores, chosen, strict=True)]
        decided = [  # each expert keeps channels of its own
            (b, group, top_k(of_experts[group.name], len(keep)) if group.experts else keep)
            for b, group, keep in decided
        ]
        decided = whole_experts.with_leaving(decided, leaving)
        if self.repair == "compensate":
            _compensate(surgery, decided, means)
        else:
            repairer.carry_out(surgery, decided, "FLAP repair")
        return surgery.plan("FLAP", dataclasses.asdict(self), importance(distances))

    @property
    def ranks_experts(self) -> bool:
        return self.experts

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        reasons = []
        if constraint.uniform and self.structure.startswith("AL"):
            reasons.append("all blocks must have the same sizes: set `structure` to UL-UM")
        if constraint.dense_heads and self.remove_heads:
            reasons.append("no head may leave: set `remove_heads` to 0")
        return reasons + super().conflicts(constraint, blocks)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks, cases = blocks_of(model), []
        for wanted in whole_experts.possible(blocks, self.sparsity, "FLAP") if self.experts else [None]:
            p, budget = self._settled(blocks, constraint, wanted)
            found = self._competition.predict(budget, attention_by_span(model, budget.rows), p, self.biased)
            cases += [case | whole_experts.sizes(budget) for case in found]
        return distinct(cases)

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The cost of the second pass, which only restoration needs."""
        if self.repair not in RESTORING:
            return Work()
        return self.repair_work(model, count * length, length, unit(constraint))

    @property
    def _competition(self) -> Competition:
        return Competition(self.structure, self.remove_heads)

    def _whole(self, blocks: list[Block]) -> int:
        """The number of parameters that `sparsity` refers to."""
        if self.sparsity_of == "linears":
            return sum(len(group) * block.cost(group) for block in blocks for group in block.groups())
        return sum(block.parameters() for block in blocks)

    def _settled(self, blocks: list[Block], constraint: Constraint, wanted: int | None = None) -> tuple[float, Budget]:
        """The fraction to remove of what is ranked, and the budget, with the number of experts nearest to `wanted`."""

        def settle(left: int | None) -> tuple[float, Budget]:
            p = self._fraction(blocks, constraint, left)
            return p, self._budget(blocks, p, constraint, left)

        return whole_experts.nearest(blocks, wanted, settle, "FLAP") if self.experts else settle(None)

    def _experts(
        self,
        blocks: list[Block],
        constraint: Constraint,
        scores: list[tuple[Block, UnitGroup, Tensor]],
        saliencies: list[Tensor],
    ) -> tuple[float, Budget, dict[int, Tensor]]:
        """Like `_settled`, with as many experts as the ranking keeps, and which these are by index of their block."""
        own, rows = whole_experts.mixtures(blocks, "FLAP"), [(block, group) for block, group, _ in scores]
        biases = sum(block.absent_bias(group) for block, group in rows) if self.biased and self.sparsity else 0
        remove = round(self.sparsity * self._whole(blocks)) + biases
        others = [standardised(score) for *_, score in scores]
        p, budget = self._settled(
            blocks, constraint, whole_experts.experts_to_keep(rows, others, own, saliencies, remove)
        )
        return p, budget, whole_experts.to_keep(own, saliencies, budget)

    def _fraction(self, blocks: list[Block], constraint: Constraint, left: int | None = None) -> float:
        """The fraction of prunable parameters to remove (p)."""
        biased, of = self.biased and self.sparsity_of == "blocks", self._whole(blocks)
        return fraction_to_remove(self.sparsity, blocks, unit(constraint), "what FLAP prunes", biased, left, of)

    def _budget(self, blocks: list[Block], p: float, constraint: Constraint, left: int | None = None) -> Budget:
        each_block = self.structure.startswith("UL")
        if self.structure.endswith("MM") and any(block.expert_count for block in blocks):
            raise ValueError(
                f"{self.structure} counts all channels alike, and one of experts weighs more: set `structure` to AL-AM "
                "or UL-UM"
            )
        budget = Budget(blocks, 1 - p, constraint, unit(constraint), each_block, left)
        if budget.restricted:
            budget.check(
                self.sparsity,
                self._whole(blocks),
                self._competition.counts(budget, self._competition.even_counts(budget)),
            )
        return budget

    def _score(self, block: Block, group: UnitGroup, moments: Moments) -> Tensor:
        """The scores of units, [units, columns per unit]; of channels of experts [experts, channels]."""
        weight = block.weight(group).double()
        index = group.consumer.index
        running = self.variance == "running"
        variance = values(moments, lambda m: m.running_variance if running else m.variance)
        norm = values(moments, lambda m: m.norm)
        if group.experts:
            return METRICS[self.metric](weight, variance.to(weight.device), norm.to(weight.device))
        score = METRICS[self.metric](weight, variance[index], norm[index])
        return score.square() if group.kind == "attention" and self.square_attention else score


def unit(asked: Constraint) -> Literal["kv_heads", "none"]:
    """The attention units that may be removed."""
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
        >>> import torch
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
        >>> import torch
        >>> weighted_norm(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([1.0, 5.0]))
        tensor([2., 5.])
    """
    return weight.abs().mean(0) * norm


def _compensate(surgery: Surgery, decided: list[tuple[Block, UnitGroup, Tensor]], means: dict[str, Tensor]) -> None:
    """Prunes, and adds the mean contribution of the removed inputs in the dense model to the biases."""
    say_uncompensated(decided)
    for block, own in itertools.groupby(decided, lambda row: row[0]):
        with block.present():
            for _, group, keep in own:
                if group.kind == "expert":
                    surgery.keep(block, group, keep)
                    continue
                if group.experts:
                    rows = zip(block.weight(group).unbind(1), means[group.name], keep, strict=True)
                    gains = torch.stack([compensation(*row) for row in rows]) if block.expert_bias else None
                    surgery.keep(block, group, keep, bias_gain=gains)
                    continue
                gain = compensation(_consumer(block, group), means[group.name], _columns(group, keep))
                surgery.keep(block, group, keep, bias_gain=gain)


def _consumer(block: Block, group: UnitGroup) -> Tensor:  # [d_out, columns of the group]
    return block.weight(group).flatten(1)


def _columns(group: UnitGroup, keep: Tensor) -> Tensor:
    return group.consumer.index[keep].flatten()
