r"""CFSP: coarse-to-fine structured pruning (Wang et al., COLING 2025, https://arxiv.org/abs/2409.13199).

The distance between a block's input and output sets its importance, which sets the width of its FFN. Activations choose
the channels. One forward pass is enough. The same importance sets the LoRA ranks of recovery (`plprune.recovery.lora`).

Symbols: :math:`S_l` the mean distance between input and output of block l, :math:`u_l` its importance, p the fraction
of the FFN channels to remove, n FFN width, d model width, :math:`W^d, W^u, W^g` the weights of down, up and gate,
:math:`x_j` the norm of down's input.

Deviations from the authors' code:

- The distance is averaged over tokens, so that the gain `a` does not depend on their number. The arc cosine is
  clamped, as it would be NaN for blocks that hardly change their input.
- Widths are rounded so that they sum to the budget exactly; the authors round down and add one.
- The authors' code normalises over the axis that it then averages over: every term becomes 1, and the weights and `b`
  cancel. Its score is thus :math:`x_j^c` (`score="activation"`). The paper's equation normalises over the channels
  (`score="relative"`).
- Families without a gate have no third term.
- `repair` compensates or restores in a second pass; the paper does neither.
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
from plprune.planning.extremes import extreme_sizes, nudged, unique_cases
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
from plprune.pruning.stream import observe, stream, values
from plprune.pruning.surgery import Surgery


@dataclasses.dataclass(frozen=True)
class CFSP(Repairing):
    """Block importance sets each FFN's width, activations choose its channels.

    Args:
        sparsity: The fraction of parameters to remove, in [0, 1).
        distance: Distance between a block's input and output: angular, cosine, mse, mae, or uniform (all equal).
        score: Score of a channel: its activation, as in the authors' code, or its relative weights times its
            activation, as in the paper's equation.
        a: Gain of the sigmoid that turns distances into importance.
        b: Exponent of the activation within the down projection's term; `relative` only.
        c: Exponent of the activation that multiplies the whole score.
        multiple_of: Widths are rounded to multiples of this number; 128 is the authors' `cuda_friendly`.
        sparsity_of: Whether `sparsity` is a fraction of the decoder blocks' parameters, or of the FFN's width as in the
            paper.
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
            for group, norms in observe(block, inputs, Norms, attention="none"):
                scores.append((block, group, self._score(block, group, values(norms, lambda n: n.pooled))))
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
        steep = alike * (torch.arange(len(blocks)) >= len(blocks) // 2)  # half of the blocks important, or all but one
        lonely = alike * (torch.arange(len(blocks)) > 0)
        importances = [alike] if self.distance == "uniform" or len(blocks) == 1 else [steep, alike, lonely]
        mixture = torch.tensor([float(block.expert_count > 0) for block in blocks], dtype=torch.float64)
        if len(importances) > 1 and 0 < mixture.sum() < len(blocks):
            importances += [mixture, 1 - mixture]
        cases = [self._widths(budget, u, p) for u in importances]
        cases += [each for case in cases for each in nudged(budget, case)]
        if constraint == FREE and self.multiple_of > 1 and len(importances) > 1:
            cases += self._rounded(budget)
        return unique_cases(budget.rows, cases)

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The cost of the repair pass."""
        return self.repair_work(model, count * length, length, "none")

    def _rounded(self, budget: Budget) -> list[list[int]]:
        """The largest and the smallest widths that rounding to a multiple can produce."""
        m, sizes, costs = self.multiple_of, budget.sizes, budget.costs
        allowed = [[*range(min(m, size), size, m), size] for size in sizes]
        target = budget.keep * budget.whole
        slack = m * sum(costs)  # rounding a width up to the first multiple adds at most m
        limits = target + slack, target - slack / 2 - m * max(costs)
        return [extreme_sizes(budget.rows, allowed, [range(len(sizes))], limit, even=False) for limit in limits]

    def _fraction(self, blocks: list[Block]) -> float:
        """The fraction of the FFN channels to remove (p)."""
        if self.sparsity_of == "ffn":
            return self.sparsity
        return fraction_to_remove(self.sparsity, blocks, "none", "the FFN", biased=self.biased)

    def _budget(self, blocks: list[Block], p: float, constraint: Constraint) -> Budget:
        if constraint != FREE or any(block.expert_count for block in blocks):
            constraint &= Constraint(width_multiple=self.multiple_of)
        budget = Budget(blocks, 1 - p, constraint, each_block=constraint.uniform)
        budget.check(self.sparsity, budget.whole if self.sparsity_of == "ffn" else None)
        return budget

    def _score(self, block: Block, group: UnitGroup, norm: Tensor) -> Tensor:  # [n], or [experts, n]
        if self.score == "activation":
            return norm**self.c
        if group.experts:
            down, rows = block.weight(group).double().unbind(1), block.rows_of_experts(group)
            into = zip(*(w.double() for w in rows), strict=True)
            each = zip(down, into, norm.to(down[0].device), strict=True)
            return torch.stack([relative_score(d, list(w), x, self.b, self.c) for d, w, x in each])
        down = block.weight(group).squeeze(-1)
        producers = [matrix(block.part(s.path))[s.index[:, 0]] for s in group.producers]
        return relative_score(down.double(), [w.detach().double() for w in producers], norm, self.b, self.c)

    def _widths(self, budget: Budget, u: Tensor, p: float) -> list[int]:
        sizes, u = budget.sizes, u[[block.index for block, _ in budget.rows]]
        exact = [n * k for n, k in zip(sizes, kept_fractions(u, p, sizes).tolist(), strict=True)]
        if budget.restricted:
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
    r"""The paper's fine-grained score: each weight relative to the sum over all channels.

    .. math:: \frac1d \sum_i \Bigl[ \frac{|W^d_{ij}| x_j^b}{\sum_k |W^d_{ik}| x_k^b} +
              \frac{|W^u_{ji}|}{\sum_k |W^u_{ki}|} + \frac{|W^g_{ji}|}{\sum_k |W^g_{ki}|} \Bigr] x_j^c

    Example:
        >>> relative_score(torch.tensor([[1.0, 1.0]]), [torch.tensor([[3.0], [1.0]])], torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
    """
    weighted = down.abs() * norm**b
    least = torch.finfo(weighted.dtype).tiny  # the shares of a row of zeros are zero
    terms = weighted / weighted.sum(1, keepdim=True).clamp(min=least)
    for weight in producers:
        terms = terms + (weight.abs() / weight.abs().sum(0).clamp(min=least)).T
    return terms.mean(0) * norm**c
