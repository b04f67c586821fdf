r"""CFSP: coarse-to-fine structured pruning (Wang et al., COLING 2025, https://arxiv.org/abs/2409.13199).

How far a block moves its hidden states sets the width of its FFN; within it, activations choose the channels. One
forward pass is enough. The same importance sets the LoRA ranks of recovery (`plprune.recovery.lora`).

Symbols: :math:`S_l` the mean distance between input and output of block l, :math:`u_l` its importance, p the fraction
of the FFN channels to remove, n FFN width, d model width, :math:`W^d, W^u, W^g` the weights of down, up and gate,
:math:`x_j` the norm of down's input.

Deviations from the authors' code:

- The distance is averaged over tokens, so that the gain `a` does not depend on their number; the arc cosine is
  clamped, without which it is NaN for blocks that hardly change their input.
- Widths are rounded so that they sum to the budget exactly; theirs are rounded down, plus one.
- Their normaliser runs over the axis over which the score is then averaged, so that every bracket is 1 and the
  weights and `b` cancel: the official score is :math:`x_j^c` (`score="activation"`). The paper's equation normalises
  across channels (`score="relative"`).
- A family without a gate has no third term.
- `repair` compensates or restores, in a second walk; the paper does neither.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.architecture.modules import matrix
from plprune.methods.base import Repairing
from plprune.planning.extremes import extreme_sizes, unique_cases
from plprune.planning.needs import Work
from plprune.pruning.allocation import (
    Budget,
    fraction_to_remove,
    importance,
    kept_fractions,
    largest_remainder,
    top_k,
)
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import Repair
from plprune.pruning.statistics import Distance, Norms
from plprune.pruning.stream import observe, stream
from plprune.pruning.surgery import Surgery


@dataclasses.dataclass(frozen=True)
class CFSP(Repairing):
    """Block importance sets each FFN's width, activations choose its channels.

    Args:
        sparsity: The fraction of parameters to remove, in [0, 1).
        distance: How far a block moves its hidden states: angular, cosine, mse, mae, or uniform (all the same).
        score: Score of a channel: its activation, as in the authors' code, or relative weights times activation, as
            in the paper's equation.
        a: Gain of the sigmoid that turns distances into importance.
        b: Exponent of the activation within the down projection's term; `relative` only.
        c: Exponent of the activation outside.
        multiple_of: Widths are rounded to multiples of this; 128 is the authors' `cuda_friendly`.
        sparsity_of: What `sparsity` is a fraction of: the decoder blocks' parameters, or the FFN's width, as the
            paper counts.
    """

    sparsity: float = 0.2
    distance: Distance = "angular"
    score: Literal["activation", "relative"] = "activation"
    a: float = 1.0
    b: float = 1.0
    c: float = 1.0
    multiple_of: int = 1
    sparsity_of: Literal["blocks", "ffn"] = "blocks"
    repair: Repair = dataclasses.field(default="none", kw_only=True)

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration, blocks = Calibration.of(batches), blocks_of(model)
        p = self._fraction(blocks)
        budget, repairer = self._budget(blocks, p, constraint), self.repairer(calibration)
        scores, distances = [], []
        for block, inputs in stream(model, calibration, "CFSP"):
            ((group, norms),) = observe(block, inputs, Norms, attention="none")
            scores.append((block, group, self._score(block, group, norms.pooled)))
            distances.append(inputs.influence.distance(self.distance))
        surgery, u = Surgery(model), importance(distances, self.a)
        widths = self._widths(budget, u, p)
        chosen = [(block, group, top_k(score, n)) for (block, group, score), n in zip(scores, widths, strict=True)]
        repairer.carry_out(surgery, chosen, "CFSP repair")
        return surgery.plan("CFSP", dataclasses.asdict(self), u)

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        reasons = []
        if constraint.uniform and self.distance != "uniform":
            reasons.append("all blocks must have one width: set `distance` to uniform")
        return reasons + super().conflicts(constraint, blocks)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks = blocks_of(model)
        p = self._fraction(blocks)
        budget = self._budget(blocks, p, constraint)
        alike = torch.ones(len(blocks), dtype=torch.float64)
        steep = alike * (torch.arange(len(blocks)) >= len(blocks) // 2)  # half of the blocks matter, or all but one
        lonely = alike * (torch.arange(len(blocks)) > 0)
        importances = [alike] if self.distance == "uniform" or len(blocks) == 1 else [steep, alike, lonely]
        cases = [self._widths(budget, u, p) for u in importances]
        if constraint == FREE and self.multiple_of > 1 and len(importances) > 1:
            cases += self._rounded(budget)
        return unique_cases(budget.rows, cases)

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The walk that repairs."""
        return self.repair_work(model, count * length, length, "none")

    def _rounded(self, budget: Budget) -> list[list[int]]:
        """The most and the least that rounding each width to a multiple could leave."""
        m, sizes, costs = self.multiple_of, budget.sizes, budget.costs
        allowed = [[*range(min(m, size), size, m), size] for size in sizes]
        target = budget.keep * budget.whole
        slack = m * sum(costs)  # a width that is rounded up to the least multiple gains all of it
        limits = target + slack, target - slack / 2 - m * max(costs)
        return [extreme_sizes(budget.rows, allowed, [range(len(sizes))], limit, even=False) for limit in limits]

    def _fraction(self, blocks: list[Block]) -> float:
        """The fraction of the FFN channels to remove (p)."""
        if self.sparsity_of == "ffn":
            return self.sparsity
        return fraction_to_remove(self.sparsity, blocks, "none", "the FFN", biased=self.biased)

    def _budget(self, blocks: list[Block], p: float, constraint: Constraint) -> Budget:
        if constraint != FREE:
            constraint &= Constraint(width_multiple=self.multiple_of)
        budget = Budget(blocks, 1 - p, constraint, each_block=constraint.uniform)
        budget.check(self.sparsity, budget.whole if self.sparsity_of == "ffn" else None)
        return budget

    def _score(self, block: Block, group: UnitGroup, norm: Tensor) -> Tensor:  # [n]
        if self.score == "activation":
            return norm**self.c
        down = block.weight(group).squeeze(-1)
        producers = [matrix(block.part(s.path))[s.index[:, 0]] for s in group.producers]
        return relative_score(down.double(), [w.detach().double() for w in producers], norm, self.b, self.c)

    def _widths(self, budget: Budget, u: Tensor, p: float) -> list[int]:
        sizes = budget.sizes
        exact = [n * k for n, k in zip(sizes, kept_fractions(u, p, sizes).tolist(), strict=True)]
        if budget.constraint != FREE:
            return budget.fit(exact)
        if self.multiple_of > 1:
            m = self.multiple_of
            return [min(n, max(m, int((w + m / 2) / m) * m)) for n, w in zip(sizes, exact, strict=True)]
        total = round(sum(sizes) * (1 - p))
        if total < len(sizes):
            raise ValueError(f"CFSP would keep {total} FFN channels in {len(sizes)} blocks: ask for a lower sparsity")
        return largest_remainder(exact, total)


def relative_score(
    down: Tensor,  # [d, n]
    producers: list[Tensor],  # up and gate, [n, d] each
    norm: Tensor,  # [n]
    b: float = 1.0,
    c: float = 1.0,
) -> Tensor:  # [n]
    r"""The paper's fine-grained score: each weight relative to its row's sum over all channels.

    .. math:: \frac1d \sum_i \Bigl[ \frac{|W^d_{ij}| x_j^b}{\sum_k |W^d_{ik}| x_k^b} +
              \frac{|W^u_{ji}|}{\sum_k |W^u_{ki}|} + \frac{|W^g_{ji}|}{\sum_k |W^g_{ki}|} \Bigr] x_j^c

    Example:
        >>> relative_score(torch.tensor([[1.0, 1.0]]), [torch.tensor([[3.0], [1.0]])], torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
    """
    weighted = down.abs() * norm**b
    least = torch.finfo(weighted.dtype).tiny  # of a row of zeros every share is zero
    terms = weighted / weighted.sum(1, keepdim=True).clamp(min=least)
    for weight in producers:
        terms = terms + (weight.abs() / weight.abs().sum(0).clamp(min=least)).T
    return terms.mean(0) * norm**c
