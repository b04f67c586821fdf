r"""Learned gates: training decides which FFN channels stay, for all blocks at once, by the dense model's outputs.

Every channel gets a gate between 0 and 1. The gates of the whole model are trained under one budget, while a falling
temperature opens or closes them (`plprune.pruning.gate_training`). The scores thus measure what channels do together,
and no measure of a block's importance is needed. This is plprune's own method. It needs gradients, hence the whole
model in memory, and for each calibration window about six times the work of a forward pass.

The loss is the divergence from the dense model's distributions of each next token, as in
`plprune.recovery.distillation`. Gates that are trained on the next tokens of the text overfit to it.

Two repairs follow. First least squares, toward the outputs of the dense FFNs (`plprune.pruning.repair`). Then every
input of every projection in the blocks gets a gain. Gains start at 1, are trained by that divergence and the loss on
next tokens in equal parts, and end in the columns of the weights. They are a thousandth of all parameters, few enough
to be learned from few tokens. The order matters: least squares would undo trained gains.

Symbols: :math:`\theta_j` the score of channel j, :math:`z_j` its gate, T the temperature, :math:`c_j` the parameters of
the channel, K those that may stay, :math:`g_j` the gradient of the loss with respect to the gate.

.. math:: z_j = \sigma\bigl((\theta_j - \tau) / T\bigr), \quad \tau \text{ such that } \sum_j c_j z_j = K

As :math:`\tau` follows the scores, the gradient of a score is that of its gate less the price of its parameters,

.. math:: \frac{\partial L}{\partial \theta_j} \propto z_j (1 - z_j) (g_j - \pi c_j), \quad
          \pi = \frac{\sum_i z_i (1 - z_i) g_i}{\sum_i z_i (1 - z_i) c_i}

The scores start as in CFSP: widths by block importance, channels by activation norm. L0 regularisation
(https://arxiv.org/abs/1712.01312) and Sheared LLaMA (https://arxiv.org/abs/2310.06694) train gates under a budget
together with the weights; here they are annealed alone, in one short pass. IA3 (https://arxiv.org/abs/2205.05638)
trains nothing but gains.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import lacks_weights, on_device
from plprune.io import distributed
from plprune.io.progress import Progress
from plprune.methods.base import Repairing
from plprune.planning.extremes import extreme_sizes, unique_cases
from plprune.planning.needs import Work
from plprune.planning.sizes import block_flops
from plprune.pruning.allocation import (
    Budget,
    Rows,
    fraction_to_remove,
    global_ranking,
    importance,
    kept_fractions,
    largest_remainder,
    top_k,
)
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.forward import evaluating
from plprune.pruning.gate_training import (
    LIKELIEST,
    TeacherSample,
    teacher_sample,
    train_gains,
    train_gates,
    trainable,
    unit_gains,
)
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import Damping, Repair
from plprune.pruning.statistics import Norms
from plprune.pruning.stream import observe, stream
from plprune.pruning.surgery import Surgery

SPREAD = 6.0  # of the scores of a block, from its best channel to its worst, at the start


@dataclasses.dataclass(frozen=True)
class LearnedGates(Repairing):
    """FFN channels by gates that are trained under one budget for all blocks; least squares and trained gains repair.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        passes: How often the calibration windows are gone through, for gates and again for gains; each is a step. Gates
            that see a text often learn it by heart: more windows do better than more passes.
        learning_rate: Of the scores, whose best and worst are 6 apart in every block at first.
        gain_rate: Learning rate of the gains, one for each input of each projection, which are 1 at first; at 0 they
            are left out.
        repair: What is done for consumers that lose inputs, before the gains. none; compensate: their bias takes up
            what those gave on average; restore: what they keep does the work of those too, by least squares.
    """

    sparsity: float = 0.25
    passes: int = 1
    learning_rate: float = 0.1
    gain_rate: float = 0.01
    repair: Repair = dataclasses.field(default="restore", kw_only=True)
    damping: Damping = dataclasses.field(default=0.1, kw_only=True)
    bias: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.passes < 2**31 or not 0 < self.learning_rate < math.inf or not 0 <= self.gain_rate < math.inf:
            raise ValueError(
                "gates are trained in at least one of `passes`, with a positive `learning_rate`, and gains with a "
                "`gain_rate` that is not negative"
            )

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration, blocks = Calibration.of(batches), blocks_of(model)
        p = self._fraction(blocks)
        budget, repairer = self._budget(blocks, p, constraint), self.repairer(calibration)
        if lacks_weights(model):
            raise ValueError(
                "gates are trained by gradients through the whole model: leave out --stream, or take CFSP, FASP, FLAP "
                "or TwoSSP"
            )
        rows, norms, distances = [], [], []
        for block, inputs in stream(model, calibration, "LearnedGates"):
            ((group, seen),) = observe(block, inputs, Norms, attention="none")
            rows.append((block, group))
            norms.append(seen.pooled.cpu())
            distances.append(inputs.influence.distance("angular"))
        u, surgery = importance(distances), Surgery(model)
        fractions = kept_fractions(u, p, [len(group) for _, group in rows]).tolist()
        scores = [initial_scores(norm, k) for norm, k in zip(norms, fractions, strict=True)]
        samples = self._teacher_samples(model, calibration) if p else []
        if samples:
            scores = self._learn_gates(model, rows, scores, p, samples, calibration)
        chosen = self._choose(budget, scores, p)
        decided = [(block, group, keep) for (block, group), keep in zip(rows, chosen, strict=True)]
        repairer.carry_out(surgery, decided, "LearnedGates repair")
        if samples and self.gain_rate:
            self._learn_gains(surgery, samples)
        return surgery.plan("LearnedGates", dataclasses.asdict(self), u)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks = blocks_of(model)
        p = self._fraction(blocks)
        budget = self._budget(blocks, p, constraint)
        sizes, costs = budget.sizes, budget.costs
        if constraint == FREE:
            alike = largest_remainder(sizes, max(len(sizes), round(sum(sizes) * (1 - p))))
        else:
            alike = budget.fit(budget.alike)
        if constraint.uniform or len(blocks) == 1 or not p:
            return unique_cases(budget.rows, [alike])
        allowed = [range(1, len(g) + 1) if constraint == FREE else constraint.counts(b, g) for b, g in budget.rows]
        step = max(c * (a[-1] - a[-2] if len(a) > 1 else 1) for c, a in zip(costs, allowed, strict=True))
        target, forth = budget.keep * budget.whole, list(range(len(blocks)))
        cases = [
            extreme_sizes(budget.rows, allowed, [order], limit, even)
            for limit in (target + step / 2, target - 1.5 * step)
            for order, even in ((forth, True), (forth, False), (forth[::-1], False))
        ]
        return unique_cases(budget.rows, [alike, *cases])

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """A forward pass that asks the dense model; for every step of gates and of gains one and a backward pass, which
        keeps what it reads; and the walk that repairs.
        """
        blocks, size = blocks_of(model), next(model.parameters()).element_size()
        once = count * length * sum(block_flops(block, length) for block in blocks)
        kept = length * size * sum(8 * model.config.hidden_size + 4 * block.channels for block in blocks)
        repairs = self.repair_work(model, count * length, length, "none")
        passes = self.passes * (2 if self.gain_rate else 1)
        teacher = count * length * LIKELIEST * 8
        return Work((1 + 3 * passes) * once + repairs.flops, repairs.single, teacher + max(kept, repairs.bytes))

    def _fraction(self, blocks: Sequence[Block]) -> float:
        """The fraction of the FFN channels to remove (p)."""
        return fraction_to_remove(self.sparsity, blocks, "none", "the FFN", biased=self.biased)

    def _budget(self, blocks: Sequence[Block], p: float, constraint: Constraint) -> Budget:
        budget = Budget(blocks, 1 - p, constraint, each_block=constraint.uniform)
        budget.check(self.sparsity)
        return budget

    def _teacher_samples(self, model: PreTrainedModel, calibration: Calibration) -> list[TeacherSample]:
        """The lesson of each step, by the model before it is pruned."""
        device = calibration.device or model.device
        windows, samples = calibration.windows(sum(len(ids) for ids in calibration)), []
        with (
            evaluating(model),
            on_device(model, device),
            Progress(len(windows), "asking the dense model", "window") as bar,
        ):
            for ids in windows:
                samples.append(teacher_sample(model, ids.to(device)))
                bar.update()
        return samples * self.passes

    def _learn_gates(
        self,
        model: PreTrainedModel,
        rows: Rows,
        scores: list[Tensor],  # [units] each
        p: float,
        samples: Sequence[TeacherSample],
        calibration: Calibration,
    ) -> list[Tensor]:  # [units] each
        """Scores after training; all processes take the first one's."""
        costs = [block.cost(group) for block, group in rows]
        cost = torch.cat([torch.full((len(s),), c / min(costs)) for s, c in zip(scores, costs, strict=True)])
        device = samples[0].ids.device
        theta = torch.cat(scores).to(device)
        with trainable(model, device):
            train_gates(model, rows, theta, cost.to(device), 1 - p, samples, self.learning_rate)
        return list(distributed.broadcast(theta, 0, calibration.group).cpu().split([len(s) for s in scores]))

    def _learn_gains(self, surgery: Surgery, samples: Sequence[TeacherSample]) -> None:
        """Gains of what stays, in the weights."""
        places = [(block, path) for block in surgery.blocks for path in block.projections]
        device = samples[0].ids.device
        with trainable(surgery.model, device):
            gains = unit_gains([block.part(path) for block, path in places], device)
            train_gains(surgery.model, gains, samples, self.gain_rate)
        for (block, path), (_, gain) in zip(places, gains, strict=True):
            surgery.scale(block, path, gain)

    def _choose(self, budget: Budget, scores: list[Tensor], p: float) -> list[Tensor]:
        chosen = global_ranking(scores, budget.costs, p)
        if budget.constraint == FREE:
            return chosen
        counts = budget.fit([len(keep) for keep in chosen])
        return [top_k(score, count) for score, count in zip(scores, counts, strict=True)]


def initial_scores(norm: Tensor, fraction: float) -> Tensor:  # [n] -> [n]
    """Scores in the order of the norms, above 0 for the given fraction of them.

    Example:
        >>> initial_scores(torch.tensor([1.0, 9.0, 4.0]), 0.5).round().tolist()
        [-2.0, 2.0, 0.0]
    """
    rank = torch.empty(len(norm)).index_copy_(
        0, norm.argsort(descending=True, stable=True), torch.arange(len(norm)) + 0.5
    )
    return SPREAD * (fraction - rank / len(norm))
