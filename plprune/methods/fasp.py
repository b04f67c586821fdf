r"""FASP: fast and accurate structured pruning (Hu et al., 2025, https://arxiv.org/abs/2501.09412).

A column of a consumer and the rows of its producers leave together; columns are ranked by a Wanda-like score, and the
columns that stay are changed, in closed form, to do the work of those that left. Blocks are walked in depth order, on
the inputs that the already pruned prefix produces.

Symbols: W the consumer's weight, X its inputs, M the kept columns, :math:`\mu` the mean of X, s the fraction to remove.

There is no public code. Choices where the paper is silent, and deviations:

- The fraction of what can be pruned is scaled up so that `sparsity` holds for the whole block, as Q and K stay.
- Under grouped-query attention a value channel is shared by the query heads of its kv head: its score is their sum.
- Inputs are centred and the bias takes up the difference of means (`compensate`); off, it is the paper's form.
- The damping shrinks toward the kept weights, not toward zero; its size is ours.
- `attention="kv_heads"` removes whole kv heads instead of value channels, and leaves plain, uniform shapes.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from plprune import processes
from plprune.allocation import fraction_to_remove, importance, top_k
from plprune.anatomy import Block, Group, dense_weight
from plprune.calibration import BlockInputs, Calibration, observe, stream
from plprune.methods.base import PruningMethod
from plprune.plan import PruningPlan
from plprune.repair import compensation, restore
from plprune.stats import Gram
from plprune.surgery import Surgery


@dataclasses.dataclass(frozen=True)
class FASP(PruningMethod):
    """Coupled columns and rows, a column score, least-squares restoration.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        attention: Units of attention: single value channels (the paper's; only plprune can load the result), whole kv
            heads, or none.
        restoration: Whether the kept weights are restored by least squares.
        damping: Regularisation of the restoration, relative to the mean diagonal of the inputs' second moments.
        compensate: Whether inputs are centred and the consumer's bias takes up the difference of means.
    """

    sparsity: float = 0.2
    attention: Literal["value_channels", "kv_heads", "none"] = "value_channels"
    restoration: bool = True
    damping: float = 0.01
    compensate: bool = True

    def prune(self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor]) -> PruningPlan:
        surgery, distances = Surgery(model), []
        attention, what = self.attention, "what FASP prunes"
        fraction = fraction_to_remove(self.sparsity, surgery.blocks, attention, what, biased=self.compensate)
        for block, inputs in stream(model, batches, "FASP"):
            self._prune_block(surgery, block, inputs, fraction)
            distances.append(inputs.influence.distance("angular"))
        return surgery.plan("FASP", dataclasses.asdict(self), importance(distances))

    def _prune_block(self, surgery: Surgery, block: Block, inputs: BlockInputs, fraction: float) -> None:
        observed = observe(block, inputs, Gram, self.attention)  # as large as the block: gone before the next one's
        counts = kept_counts(block, [group for group, _ in observed], fraction)
        for (group, gram), count in zip(observed, counts, strict=True):
            self._prune(surgery, block, group, gram, count, inputs.group)

    def _prune(
        self, surgery: Surgery, block: Block, group: Group, gram: Gram, count: int, peers: processes.Group
    ) -> None:
        index = group.consumer.index
        keep = top_k(column_score(block.weight(group), gram.norm[index]), count)
        if count == len(group):
            return surgery.keep(block, group, keep)
        weight, columns = dense_weight(block.part(group.consumer.path)), index[keep].flatten().sort().values
        moments = gram.covariance() if self.compensate else gram.second_moment()
        gram.release()
        restored = None
        if self.restoration:  # the rows of the weight are independent: each process restores some
            rows = processes.share(range(len(weight)), peers)
            restored = processes.joined(restore(weight[rows], moments, columns, self.damping), peers)
        gain = compensation(weight, gram.mean, columns, restored) if self.compensate else None
        surgery.keep(block, group, keep, restored, gain)


def column_score(
    weight: Tensor,  # [d_out, units, columns per unit]
    norm: Tensor,  # [units, columns per unit]
) -> Tensor:  # [units]
    r"""Wanda's score, summed over a column and over the columns of a unit (FASP, section 3.2).

    .. math:: S_u = \sum_{j \in u} \lVert W_{:,j} \rVert_1 \lVert X_{:,j} \rVert_2

    Example:
        >>> import torch
        >>> column_score(torch.tensor([[[1.0], [-2.0]], [[3.0], [0.0]]]), torch.tensor([[1.0], [5.0]]))
        tensor([ 4., 10.], dtype=torch.float64)
    """
    return (weight.double().abs().sum(0) * norm.double()).sum(1)


def kept_counts(block: Block, groups: list[Group], fraction: float) -> list[int]:
    """Units to keep in each of a block's groups: the last group, the FFN, makes up for the rounding of the others.

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
