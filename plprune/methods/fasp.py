r"""FASP: fast and accurate structured pruning (Hu et al., 2025, https://arxiv.org/abs/2501.09412).

FASP removes columns of a consumer together with the matching rows of its producers. It ranks columns by a Wanda-like
score, and adjusts the kept columns in closed form to replace the removed ones. It prunes the blocks in depth order; the
inputs of a block come from the already pruned blocks.

Symbols: W the consumer's weight, X its inputs, M the kept columns, :math:`\mu` the mean of X, s the fraction to remove.

There is no public code. Additions to the paper and deviations from it:

- Q and K stay, so the fraction of the other parameters to remove is raised: `sparsity` holds for the whole block.
- Under grouped-query attention, the score of a value channel is the sum over the query heads that share it.
- Inputs are centred, and the bias corrects the mean of the output; `bias: false` is the paper's form.
- The damping shrinks toward the kept weights, not toward zero; the paper does not state its size.
- `repair` may also compensate only, or do nothing; the paper restores.
- `attention="kv_heads"` removes whole kv heads instead of value channels, which keeps shapes uniform.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.methods.base import Repairing
from plprune.planning.needs import Work
from plprune.planning.sizes import block_flops
from plprune.pruning.allocation import Budget, fraction_to_remove, importance, top_k
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.forward import BlockInputs
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import Repair
from plprune.pruning.stream import observe, prune_blocks, values
from plprune.pruning.surgery import Surgery


@dataclasses.dataclass(frozen=True)
class FASP(Repairing):
    """Removes coupled columns and rows by a column score, and restores outputs by least squares.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        attention: Units of attention to remove: single value channels (as in the paper; only plprune can load the
            result), whole kv heads, or none.
    """

    sparsity: float = 0.2
    attention: Literal["value_channels", "kv_heads", "none"] = "value_channels"
    repair: Repair = dataclasses.field(default="restore", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repair_share != 1:
            raise ValueError("FASP repairs in the pass that chooses channels, on all windows: leave out `repair_share`")

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration, (counts,) = Calibration.of(batches), self.predict_sizes(model, constraint)
        surgery, repairer = Surgery(model), self.repairer(calibration)

        def prune_block(block: Block, inputs: BlockInputs) -> None:
            with repairer.reconstructing(surgery, block, inputs):
                for group, seen in observe(block, inputs, repairer.statistic, self.attention):
                    score = self._score(block, group, values(seen, lambda n: n.norm))
                    repairer.keep(surgery, block, group, top_k(score, counts[group.name]), seen)

        influences = prune_blocks(model, repairer.text, "FASP", prune_block, repairer.reconstructs)
        distances = [influence.distance("angular") for influence in influences]
        return surgery.plan("FASP", dataclasses.asdict(self), importance(distances))

    def _score(self, block: Block, group: UnitGroup, norm: Tensor) -> Tensor:  # [units], or [experts, channels]
        weight = block.weight(group)
        if not group.experts:
            return column_score(weight, norm[group.consumer.index])
        pairs = zip(weight.unbind(1), norm, strict=True)
        return torch.stack([column_score(w[..., None], x[:, None]) for w, x in pairs])

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        reasons = []
        if constraint.whole_heads and self.attention == "value_channels":
            reasons.append("heads must stay whole: set `attention` to kv_heads")
        if constraint.dense_heads and self.attention != "none":
            reasons.append("no head may leave: set `attention` to none")
        return reasons + super().conflicts(constraint, blocks)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks = blocks_of(model)
        fraction = fraction_to_remove(self.sparsity, blocks, self.attention, "what FASP prunes", biased=self.biased)
        budget = Budget(blocks, 1 - fraction, constraint, self.attention, each_block=True)
        budget.check(self.sparsity)
        if not budget.restricted:
            counts = [n for block in blocks for n in kept_counts(block, block.groups(self.attention), fraction)]
        else:
            counts = budget.fit(budget.alike)
        return [{group.name: count for (_, group), count in zip(budget.rows, counts, strict=True)}]

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The cost of a second pass and of the repair."""
        tokens = count * length
        again = tokens * sum(block_flops(block, length) for block in blocks_of(model))
        flops = again + self.training_flops(model, tokens, length)
        return dataclasses.replace(self.repair_work(model, tokens, length, self.attention), flops=flops)


def column_score(
    weight: Tensor,  # [d_out, units, columns per unit]
    norm: Tensor,  # [units, columns per unit]
) -> Tensor:  # [units]
    r"""Wanda's score, summed over the rows and over the columns of a unit (FASP, section 3.2).

    .. math:: S_u = \sum_{j \in u} \lVert W_{:,j} \rVert_1 \lVert X_{:,j} \rVert_2

    Example:
        >>> import torch
        >>> column_score(torch.tensor([[[1.0], [-2.0]], [[3.0], [0.0]]]), torch.tensor([[1.0], [5.0]]))
        tensor([ 4., 10.], dtype=torch.float64)
    """
    return (weight.double().abs().sum(0) * norm.double()).sum(1)


def kept_counts(block: Block, groups: list[UnitGroup], fraction: float) -> list[int]:
    """The number of units to keep in each group of a block; the last, the FFN, offsets the rounding of the others.

    Raises:
        ValueError: A group would lose its last unit.
    """
    left = fraction * sum(len(g) * block.cost(g) for g in groups)
    counts = []
    for group in groups:
        cost = block.cost(group)
        most = len(group) - 1
        remove = (
            round(left / cost) if group is groups[-1] else min(round(fraction * len(group)), int(left / cost), most)
        )
        if remove > most:
            raise ValueError(f"{group.name} cannot lose {remove} of {len(group)} units: ask for a lower sparsity")
        counts.append(len(group) - remove)
        left -= remove * cost
    return counts
