r"""Repairs what removed units leave: bias compensation, least-squares restoration, reconstruction of whole blocks.

Once a method has chosen the units of all blocks, a second pass prunes and repairs. In each block it first repairs the
consumer of the attention, then that of the FFN, on the inputs that the repaired attention and earlier blocks produce.

An expert is repaired by its own tokens: those that its router sends it, at least `FEW`, and for a restoration at least
as many as it keeps channels; others stay as they are. Experts have a bias in few families; where they have none, they
are not compensated, and restored by inputs that are not centred.

A reconstruction starts from the restored consumers, and then trains the whole block (`plprune.pruning.reconstruction`).

Damping pulls restored weights toward the old ones, which matters where few tokens determine them. Inputs are centred if
a bias may be added: on the calibration text, restoration is then no worse than compensation.

Symbols: W the consumer's weight, X its inputs with mean :math:`\mu` and second moments H, M the kept columns and P the
removed ones, :math:`\lambda` the damping.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal, cast

import torch
from torch import Tensor

from plprune.architecture.blocks import Block, UnitGroup
from plprune.architecture.cutting import complement
from plprune.architecture.modules import dense_weight
from plprune.io import distributed
from plprune.pruning.calibration import Calibration
from plprune.pruning.expert_inputs import FEW, PerExpert
from plprune.pruning.forward import BlockInputs
from plprune.pruning.reconstruction import reconstruct
from plprune.pruning.statistics import Gram, HoldoutGram, Moments
from plprune.pruning.stream import observe_groups, prune_blocks
from plprune.pruning.surgery import Surgery

log = logging.getLogger(__name__)
Repair = Literal["none", "compensate", "restore", "reconstruct"]
RESTORING: tuple[Repair, ...] = ("restore", "reconstruct")  # those that give consumers restored weights
Damping = float | Literal["auto"]
Seen = Moments | Gram | HoldoutGram
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # the candidates of `auto`


@dataclass(frozen=True)
class Repairer:
    """Removes units and repairs their consumers.

    Args:
        repair: none; compensate, by a bias; restore, by new values of the consumer's kept weights; or reconstruct, by
            new values of all weights of the block.
        damping: Regularisation of a restoration; auto chooses it for each consumer on held-out windows.
        bias: Whether a bias may be added to a consumer.
        calibration: The calibration text.
        passes: Over the text, of a reconstruction.
        rate: Its learning rate, relative to the root mean square of each weight.

    Raises:
        ValueError: `damping` is auto, but there is only one window.
    """

    repair: Repair
    damping: Damping
    bias: bool
    calibration: Calibration
    passes: int
    rate: float

    def __post_init__(self) -> None:
        if self.restores and self.damping == "auto" and len(self.calibration.windows(2)) < 2:
            raise ValueError(
                "`damping` auto holds out every fourth calibration window, but there is only one: raise num_samples, "
                "or give `damping` a number"
            )

    @property
    def restores(self) -> bool:
        """Whether consumers get restored weights."""
        return self.repair in RESTORING

    @property
    def reconstructs(self) -> bool:
        """Whether blocks are trained toward those of the dense model."""
        return self.repair == "reconstruct"

    @property
    def text(self) -> Calibration:
        """The calibration text of the pass that repairs; for a reconstruction in batches of one window."""
        return replace(self.calibration, batches=self.calibration.windows()) if self.reconstructs else self.calibration

    @property
    def statistic(self) -> Callable[[], Seen]:
        """The statistic of a consumer's inputs that the repair needs."""
        if not self.restores:
            return Moments
        return partial(HoldoutGram, self.calibration.first) if self.damping == "auto" else Gram

    def carry_out(self, surgery: Surgery, chosen: Sequence[tuple[Block, UnitGroup, Tensor]], title: str) -> None:
        """Prunes the chosen groups; if consumers are to be repaired, in a second pass over the blocks.

        Args:
            surgery: Prunes the groups.
            chosen: Blocks in order with their groups and the units to keep.
            title: Title of the progress bar.
        """
        if self.repair == "none":
            for block, group, keep in chosen:
                surgery.keep(block, group, keep)
            return
        if self.repair == "compensate":
            say_uncompensated(chosen)
        rows = {index: list(own) for index, own in groupby(chosen, lambda row: row[0].index)}
        prune_blocks(
            surgery.model,
            self.text,
            title,
            lambda block, inputs: self._prune_block(surgery, block, inputs, rows.get(block.index, [])),
            self.reconstructs,
        )

    @contextlib.contextmanager
    def reconstructing(self, surgery: Surgery, block: Block, inputs: BlockInputs) -> Iterator[None]:
        """Trains a block, if it is to be reconstructed, after the context has pruned and restored it.

        A block without groups stays as it is.
        """
        if not self.reconstructs:
            yield
            return
        inputs.aim()
        done = len(surgery.journal.decisions)
        yield
        if len(surgery.journal.decisions) > done:
            before, after = reconstruct(block, inputs, self.passes, self.rate)
            log.info("%s: error of the hidden states %.4f, %.4f before it was reconstructed", block.path, after, before)
            surgery.changed(block)

    def keep(
        self,
        surgery: Surgery,
        block: Block,
        group: UnitGroup,
        keep: Tensor,  # [kept]
        seen: Seen | PerExpert,
    ) -> None:
        """Removes all other units of a group, and repairs its consumer by the statistic `seen` of its inputs."""
        if not self._repairs(block, group, keep):
            return surgery.keep(block, group, keep)
        if isinstance(seen, PerExpert):
            return surgery.keep(block, group, keep, *self._values_of_experts(block, group, keep, seen))
        consumer, columns = group.consumer, group.consumer.index[keep].flatten().sort().values
        weight = dense_weight(block.part(consumer.path))
        surgery.keep(block, group, keep, *self._values(weight, columns, seen, self.bias))

    def _repairs(self, block: Block, group: UnitGroup, keep: Tensor) -> bool:
        if group.kind == "expert":
            return False
        able = not group.experts or self.restores or bool(block.expert_bias)
        return self.repair != "none" and keep.shape[-1] < len(group) and able

    def _prune_block(
        self, surgery: Surgery, block: Block, inputs: BlockInputs, chosen: Sequence[tuple[Block, UnitGroup, Tensor]]
    ) -> None:
        with self.reconstructing(surgery, block, inputs):
            for _, group, keep in chosen:
                if not self._repairs(block, group, keep):
                    surgery.keep(block, group, keep)
                elif group.experts:
                    own = PerExpert(group.experts, len(group), self.statistic)
                    observe_groups(block, inputs, self.statistic, [], own)
                    self.keep(surgery, block, group, keep, own)
                else:
                    ((_, seen),) = observe_groups(block, inputs, self.statistic, [group])
                    self.keep(surgery, block, group, keep, seen)

    def _values_of_experts(
        self,
        block: Block,
        group: UnitGroup,
        keep: Tensor,  # [experts, kept]
        seen: PerExpert,
    ) -> tuple[Tensor | None, Tensor | None]:  # [experts, d, kept], [experts, d]
        """Like `_values`, of all experts of a block."""
        weights, biased = block.weight(group).unbind(1), self.bias and bool(block.expert_bias)
        least = max(FEW, keep.shape[1] if self.restores else 0)
        restored, gains, few = [], [], 0
        parts = cast(list[Seen], seen.parts)
        for own, columns, part, tokens in zip(weights, keep, parts, seen.tokens, strict=True):
            enough = tokens >= least and not (
                isinstance(part, HoldoutGram) and not (part.fitting.count and part.held_out.count)
            )
            few += not enough
            new, gain = self._values(own, columns, part, biased) if enough else (None, None)
            restored.append(own[:, columns.to(own.device)].double() if new is None else new.to(own.device))
            gains.append(own.new_zeros(len(own)).double() if gain is None else gain.to(own.device))
        if few:
            log.warning(
                "%s: %d of %d experts saw fewer than %d calibration tokens%s, and are not repaired",
                *(block.path, few, len(weights), least),
                " or none of the held-out ones" if self.statistic is not Moments and self.damping == "auto" else "",
            )
        return torch.stack(restored) if self.restores else None, torch.stack(gains) if biased else None

    def _values(
        self,
        weight: Tensor,  # [d_out, d_in]
        columns: Tensor,  # [kept]
        seen: Seen,
        biased: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The consumer's new weight for the kept columns and the gain of its bias; None if unchanged."""
        restored = None
        if not isinstance(seen, Moments):  # the rows of a weight are independent: each process restores some
            peers, damping = self.calibration.group, self.damping
            rows = weight[distributed.shard(range(len(weight)), peers)]
            if isinstance(seen, HoldoutGram):
                damping, seen = self._best_damping(rows, columns, seen, biased), seen.pooled()
            assert damping != "auto"
            moments = seen.covariance() if biased else seen.second_moment()
            seen.release()
            restored = distributed.gather_rows(restore(rows, moments, columns, damping), peers)
        gains = self.repair != "none" and biased
        return restored, compensation(weight, seen.mean, columns, restored) if gains else None

    def _best_damping(self, rows: Tensor, columns: Tensor, seen: HoldoutGram, biased: bool) -> float:
        """The damping with the smallest error on the held-out windows, over the rows of all processes."""
        fitting, held_out = seen.fitting, seen.held_out
        if biased:
            moments = fitting.covariance(), held_out.about(fitting.mean)
        else:
            moments = fitting.second_moment(), held_out.second_moment()
        errors = distributed.all_reduce_sum(held_out_errors(rows, *moments, columns), self.calibration.group)
        return DAMPINGS[int(errors.argmin())]


def say_uncompensated(chosen: Sequence[tuple[Block, UnitGroup, Tensor]]) -> None:
    """Warns if channels leave experts that have no bias."""
    without = [b for b, group, keep in chosen if group.experts and keep.shape[-1] < len(group) and not b.expert_bias]
    if without:
        log.warning(
            "the experts of %d blocks have no bias, so what their channels gave on average is not compensated: "
            "`repair` restore adjusts the channels that stay",
            len(without),
        )


def restore(
    weight: Tensor,  # [d_out, d_in]
    moments: Tensor,  # [d_in, d_in]
    keep: Tensor,  # [kept]
    damping: float,
) -> Tensor:  # [d_out, kept], float64
    r"""Computes least-squares weights for the kept columns that replace the removed ones (FASP).

    .. math:: W' = W_M + W_P H_{PM} \left(H_{MM} + \lambda \, \overline{\mathrm{diag}}(H_{MM}) \, I\right)^{-1}

    It minimises :math:`\lVert W X - W' X_M \rVert_F^2`, shrunk toward the kept weights rather than toward zero.

    Args:
        weight: The consumer's weight.
        moments: Second moments of its inputs; centred if the bias is compensated too.
        keep: Columns to keep.
        damping: :math:`\lambda`, relative to the mean diagonal.

    Example:
        >>> w, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> restore(w, x.T @ x, torch.tensor([0]), damping=0.0)
        tensor([[3.]], dtype=torch.float64)
    """
    gone = complement(keep, len(moments)).to(moments.device)
    keep = keep.to(moments.device)
    weight, moments = weight.double().to(moments.device), moments.double()
    kept = moments[keep[:, None], keep]  # avoid further copies: for a wide FFN each takes gigabytes
    kept.diagonal().add_(damping * kept.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(kept)
    del kept
    if info.item():
        raise ValueError(
            "the calibration inputs do not determine the restored weights: raise `damping`, or num_samples"
        )
    return weight[:, keep] + torch.cholesky_solve(moments[keep[:, None], gone] @ weight[:, gone].T, factor).T


def held_out_errors(
    weight: Tensor,  # [d_out, d_in]
    fitting: Tensor,  # [d_in, d_in]
    held_out: Tensor,  # [d_in, d_in]
    keep: Tensor,  # [kept]
    dampings: Sequence[float] = DAMPINGS,
) -> Tensor:  # [dampings], float64
    r"""The squared error of restored outputs on held-out inputs, for each damping.

    .. math:: \mathrm{tr}\bigl((W'_\lambda - W) \, H_{held} \, (W'_\lambda - W)^\top\bigr)

    where W' is zero in the removed columns.

    Args:
        weight: The consumer's weight.
        fitting: Second moments of the inputs that determine the restoration.
        held_out: Second moments of the held-out inputs; with a bias, about the mean of the fitting inputs.
        keep: Columns to keep.
        dampings: The values of :math:`\lambda` to try.

    Example:
        >>> w, keep = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
        >>> held_out_errors(w, torch.eye(2), torch.eye(2), keep, [0.01, 1.0])
        tensor([4., 4.], dtype=torch.float64)
    """
    weight, held_out, keep = weight.double().to(held_out.device), held_out.double(), keep.to(held_out.device)
    errors = []
    for damping in dampings:
        off = (-weight).index_add_(1, keep, restore(weight, fitting, keep, damping))
        errors.append((off @ held_out * off).sum())
    return torch.stack(errors)


def compensation(
    weight: Tensor,  # [d_out, d_in]
    mean: Tensor,  # [d_in]
    keep: Tensor,  # [kept]
    restored: Tensor | None = None,  # [d_out, kept]
) -> Tensor:  # [d_out], float64
    r"""The gain of the bias that preserves the consumer's mean output (FLAP's compensation; FASP's with W').

    .. math:: \Delta b = W \mu - W' \mu_M \quad (= W_P \, \mu_P \text{ when } W' = W_M)

    Example:
        >>> compensation(torch.tensor([[1.0, 2.0]]), torch.tensor([5.0, 3.0]), torch.tensor([0]))
        tensor([6.], dtype=torch.float64)
    """
    weight, mean, keep = weight.double(), mean.double().to(weight.device), keep.to(weight.device)
    restored = weight[:, keep] if restored is None else restored.to(weight.device)
    return weight @ mean - restored @ mean[keep]
