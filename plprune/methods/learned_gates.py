r"""Learned gates: trains a gate for every FFN channel to match the dense model's outputs, and keeps the best channels.

Gates lie between 0 and 1. The gates of all blocks are trained together under one budget, while a falling temperature
opens or closes them (`plprune.pruning.gate_training`). The scores thus account for interactions between channels, and
need no separate measure of a block's importance. No paper describes this method. It needs gradients, hence the whole
model in memory, and about six times the work of a forward pass per calibration window.

The loss is the divergence from the dense model's next-token distributions, as in `plprune.recovery.distillation`. They
come from the last block's outputs in the pass that gives the initial scores. Gates trained on the text's next tokens
overfit.

Two repairs follow. The first is least squares, toward the outputs of the dense FFNs (`plprune.pruning.repair`). The
second trains a gain for every input of every projection in the blocks. Gains start at 1. Their loss is half that
divergence and half the loss on next tokens; they are then multiplied into the weights. Gains are a thousandth of all
parameters, few enough to learn from few tokens. They come second because least squares would undo them.

With `attention`, kv heads have gates too, each one for the outputs of its query heads.

Experts of a mixture have a gate and a gain for each of their channels. All experts of a block share one set of scores,
each in an order of its own, so that as many gates of each are open. With `experts`, each expert has a gate too, which
multiplies what it adds. The experts of all blocks share one set of scores, so that as many of each block stay; these
start in the order of REAP's saliency.

Symbols: :math:`\theta_j` the score of channel j, :math:`z_j` its gate, T the temperature, :math:`c_j` the number of
parameters of the channel, K the number to keep, :math:`g_j` the gradient of the loss with respect to the gate.

.. math:: z_j = \sigma\bigl((\theta_j - \tau) / T\bigr), \quad \tau \text{ such that } \sum_j c_j z_j = K

As :math:`\tau` depends on the scores, the gradient of a score contains the price :math:`\pi` of a parameter:

.. math:: \frac{\partial L}{\partial \theta_j} \propto z_j (1 - z_j) (g_j - \pi c_j), \quad
          \pi = \frac{\sum_i z_i (1 - z_i) g_i}{\sum_i z_i (1 - z_i) c_i}

The initial scores are as in CFSP: widths by block importance, channels by activation norm. L0 regularisation
(https://arxiv.org/abs/1712.01312) and Sheared LLaMA (https://arxiv.org/abs/2310.06694) train gates under a budget
together with the weights; plprune trains gates alone, in one short pass. IA3 (https://arxiv.org/abs/2205.05638)
trains only gains.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.architecture.modules import on_device
from plprune.architecture.wrappers import text_config
from plprune.io import distributed
from plprune.io.checks import check_shares, check_sizes
from plprune.methods.base import Repairing
from plprune.planning import whole_experts
from plprune.planning.extremes import attention_by_span, distinct, extreme_sizes, orders, unique_cases
from plprune.planning.needs import Work
from plprune.planning.sizes import block_flops
from plprune.planning.structures import Competition
from plprune.pruning.allocation import (
    Budget,
    Rows,
    fraction_to_remove,
    global_ranking,
    importance,
    kept_fractions,
    largest_remainder,
    ranked,
    top_k,
)
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.expert_inputs import PerExpert
from plprune.pruning.forward import evaluating
from plprune.pruning.gate_training import (
    LIKELIEST,
    Costs,
    TeacherSample,
    by_group,
    teacher_sample,
    train_gains,
    train_gates,
    trainable,
    unit_gains,
)
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import Damping, Repair
from plprune.pruning.statistics import Norms
from plprune.pruning.stream import observe, stream, values
from plprune.pruning.surgery import Surgery

log = logging.getLogger(__name__)
SPREAD = 6.0  # initial difference between the best and the worst score of a block


@dataclasses.dataclass(frozen=True)
class LearnedGates(Repairing):
    """Trains gates to choose FFN channels under one budget for all blocks; repairs by least squares and trained gains.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        passes: Number of passes over the calibration windows, for gates and again for gains. Gates overfit in many
            passes: prefer more windows.
        gate_share: The fraction of the calibration windows that train gates, the first ones; all of them train gains.
        windows_per_step: The number of windows per step of training, which several processes share.
        learning_rate: Learning rate of the scores; the best and the worst of a block initially differ by 6.
        gain_rate: Learning rate of the gains, which multiply the inputs of all projections and start at 1; 0 trains no
            gains.
        experts: Whether whole experts of a mixture have gates too, under the same budget; every block keeps as many.
        attention: Whether kv heads have gates too, each with its query heads, under the same budget. They start open.
        repair: Repair of consumers that lose inputs, before the gains. none; compensate: adds the mean contribution of
            the removed inputs to the bias; restore: adjusts the kept weights by least squares to replace them.
    """

    sparsity: float = 0.25
    passes: int = 1
    gate_share: float = dataclasses.field(default=1.0, kw_only=True)
    windows_per_step: int = dataclasses.field(default=1, kw_only=True)
    learning_rate: float = 0.1
    gain_rate: float = 0.01
    experts: bool = False
    attention: Literal["none", "kv_heads"] = dataclasses.field(default="none", kw_only=True)
    repair: Repair = dataclasses.field(default="restore", kw_only=True)
    damping: Damping = dataclasses.field(default=0.1, kw_only=True)
    bias: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(windows_per_step=self.windows_per_step)
        if self.experts and self.attention != "none":
            raise ValueError("`experts` and heads are not ranked together: set `attention` to none")
        check_shares(gate_share=self.gate_share)
        if not 1 <= self.passes < 2**31 or not 0 < self.learning_rate < math.inf or not 0 <= self.gain_rate < math.inf:
            raise ValueError(
                "gates are trained in at least one of `passes`, with a positive `learning_rate`, and gains with a "
                "`gain_rate` that is not negative"
            )

    @property
    def unstreamable(self) -> str:
        return "gates are trained by gradients through the whole model: leave out --stream, or take another method"

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration, blocks = Calibration.of(batches), blocks_of(model)
        (p, budget), repairer = self._settled(blocks, constraint), self.repairer(calibration)
        self.check_weights(model)
        rows, norms, distances = [], [], []
        saliencies: list[Tensor] = []  # [experts] each
        hidden: Iterable[Tensor] = []  # after the last block, [b, s, d] each
        for block, inputs in stream(model, calibration, "LearnedGates"):
            for group, seen in observe(block, inputs, Norms, attention=self.attention):
                rows.append((block, group))
                norms.append(_norms_of_units(group, values(seen, lambda n: n.pooled).cpu()))
                if isinstance(seen, PerExpert):
                    saliencies.append(seen.saliency.mean)
            distances.append(inputs.influence.distance("angular"))
            if block.index == len(blocks) - 1 and self.sparsity:
                hidden = inputs.outputs()
        u, surgery = importance(distances), Surgery(model)
        fractions = kept_fractions(u[[block.index for block, _ in rows]], p, [len(group) for _, group in rows]).tolist()
        scores = [
            initial_scores(norm, 1.0 if group.kind == "attention" else k)
            for (_, group), norm, k in zip(rows, norms, fractions, strict=True)
        ]
        samples, leaving = self._teacher_samples(model, calibration, hidden) if self.sparsity else [], {}
        if samples and self.experts:
            units, first, remove = self._experts(blocks, budget, saliencies)
            every, scores = [*units, *rows], [*first, *scores]
            scores, gates = self._learn_gates(model, every, scores, remove, samples, calibration)
            p, budget = self._settled(blocks, constraint, round(float(gates[0].sum())))
            leaving = whole_experts.to_keep([block for block, _ in units], scores, budget)
            scores = [
                score[leaving[block.index]] if group.experts and leaving else score
                for (block, group), score in zip(rows, scores[len(units) :], strict=True)
            ]
        elif samples:
            scores, _ = self._learn_gates(model, rows, scores, p, samples, calibration)
        chosen = self._choose(budget, scores, p)
        decided = [(block, group, keep) for (block, group), keep in zip(budget.rows, chosen, strict=True)]
        decided = whole_experts.with_leaving(decided, leaving)
        repairer.carry_out(surgery, decided, "LearnedGates repair")
        if samples and self.gain_rate:
            self._learn_gains(surgery, samples, calibration.group)
        return surgery.plan("LearnedGates", dataclasses.asdict(self), u)

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        alike = "no head may leave" if constraint.dense_heads else "all blocks must have the same sizes"
        fixed = self.attention != "none" and (constraint.dense_heads or constraint.uniform)
        return [f"{alike}: set `attention` to none"] * fixed + super().conflicts(constraint, blocks)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks, cases = blocks_of(model), []
        if self.attention != "none":
            p, budget = self._settled(blocks, constraint)
            return Competition("AL-AM").predict(budget, attention_by_span(model, budget.rows), p, self.biased)
        for wanted in whole_experts.possible(blocks, self.sparsity, "LearnedGates") if self.experts else [None]:
            p, budget = self._settled(blocks, constraint, wanted)
            cases += [case | whole_experts.sizes(budget) for case in self._cases(budget, p)]
        return distinct(cases)

    def _cases(self, budget: Budget, p: float) -> list[dict[str, int]]:
        if not budget.restricted:
            sizes = budget.sizes
            alike = largest_remainder(sizes, max(len(sizes), round(sum(sizes) * (1 - p))))
        else:
            alike = budget.fit(budget.alike)
        if budget.each_block or len(budget.blocks) == 1 or not p:
            return unique_cases(budget.rows, [alike])
        step, target, forth = max(budget.steps), budget.keep * budget.whole, list(range(len(budget.rows)))
        cases = [
            extreme_sizes(budget.rows, budget.allowed, phases, limit, even)
            for limit in (target + step / 2, target - 1.5 * step)
            for order, even in ((forth, True), (forth, False), (forth[::-1], False))
            for phases in orders(budget.rows, order)
        ]
        return unique_cases(budget.rows, [alike, *cases])

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The cost of the dense model's head, of a forward and a backward pass for each window of gates and of gains,
        with the activations kept for it, and of the repair pass.
        """
        blocks, size = blocks_of(model), next(model.parameters()).element_size()
        once = count * length * sum(block_flops(block, length) for block in blocks)
        text = text_config(model.config)
        d, head = text.hidden_size, 2 * count * length * text.hidden_size * text.vocab_size
        inner = sum(b.channels + (b.experts.active * b.expert_width if b.expert_count else 0) for b in blocks)
        kept = length * size * (8 * d * len(blocks) + 4 * inner)
        repairs = self.repair_work(model, count * length, length, self.attention)
        passes = self.passes * (self.gate_share + bool(self.gain_rate))
        teacher = count * length * LIKELIEST * 8
        return Work(head + 3 * passes * once + repairs.flops, repairs.single, teacher + max(kept, repairs.bytes))

    @property
    def ranks_experts(self) -> bool:
        return self.experts

    def _settled(
        self, blocks: Sequence[Block], constraint: Constraint, wanted: int | None = None
    ) -> tuple[float, Budget]:
        """The fraction of channels to remove (p), and the budget, with the number of experts nearest to `wanted`."""

        def settle(left: int | None) -> tuple[float, Budget]:
            what = "the FFN" if self.attention == "none" else "what LearnedGates prunes"
            p = fraction_to_remove(self.sparsity, blocks, self.attention, what, self.biased, left)
            budget = Budget(blocks, 1 - p, constraint, self.attention, constraint.uniform, left)
            budget.check(self.sparsity)
            return p, budget

        return whole_experts.nearest(blocks, wanted, settle, "LearnedGates") if self.experts else settle(None)

    def _experts(
        self, blocks: Sequence[Block], budget: Budget, saliencies: Sequence[Tensor]
    ) -> tuple[Rows, list[Tensor], float]:
        """The groups of whole experts with their initial scores, and the fraction to remove of them and all others."""
        units = [(block, block.expert_units()) for block in whole_experts.mixtures(blocks, "LearnedGates")]
        costs = [(block.cost(group), len(group)) for block, group in units]
        others = sum(len(group) * block.cost(group) for block, group in budget.rows if not group.experts)
        gone = sum(cost * (n - (budget.left or n)) for cost, n in costs)
        remove = ((1 - budget.keep) * budget.whole + gone) / (others + sum(cost * n for cost, n in costs))
        by_group = [s.view(b.experts.groups, -1) for (b, _), s in zip(units, saliencies, strict=True)]
        return units, [initial_scores(own, 1 - remove).flatten() for own in by_group], remove

    def _teacher_samples(
        self, model: PreTrainedModel, calibration: Calibration, hidden: Iterable[Tensor]
    ) -> list[TeacherSample]:
        """The dense model's distributions in all windows, from the last block's outputs in those of this process."""
        device, samples = calibration.device or model.device, []
        with evaluating(model), on_device(model, device):
            for ids, states in zip(calibration.share(), hidden, strict=True):
                rows = zip(ids.to(device).split(1), states.to(device).split(1), strict=True)
                samples += [teacher_sample(model, *row) for row in rows]
        if calibration.group is None:
            return samples
        every = distributed.gather_objects([sample.to("cpu") for sample in samples], calibration.group)
        return [sample.to(device) for own in every for sample in own]

    def _steps(self, samples: Sequence[TeacherSample]) -> list[list[TeacherSample]]:
        """The samples of each step."""
        n = self.windows_per_step
        return [list(samples[i : i + n]) for i in range(0, len(samples), n)] * self.passes

    def _learn_gates(
        self,
        model: PreTrainedModel,
        rows: Rows,
        scores: list[Tensor],  # [units], or [experts, channels] each
        p: float,
        samples: Sequence[TeacherSample],
        calibration: Calibration,
    ) -> tuple[list[Tensor], list[Tensor]]:  # as `scores`
        """Trains the scores; all processes get those of the first process, and their gates."""
        device = samples[0].ids.device
        theta = torch.cat([s.flatten() for s in scores]).to(device)
        steps = self._steps(samples[: max(1, round(self.gate_share * len(samples)))])
        if self.windows_per_step % (count := distributed.size(calibration.group)):
            log.warning(
                "%d processes share the windows of a step, of which there are %d, so some processes wait: set "
                "`windows_per_step` to a multiple of %d",
                *(count, self.windows_per_step, count),
            )
        with trainable(model, device):
            costs = Costs.of(rows, device)
            gates = train_gates(model, rows, theta, costs, 1 - p, steps, self.learning_rate, calibration.group)
        both = distributed.broadcast(torch.stack([theta, gates]), 0, calibration.group).cpu()
        return by_group(both[0], rows), by_group(both[1], rows)

    def _learn_gains(self, surgery: Surgery, samples: Sequence[TeacherSample], group: distributed.ProcessGroup) -> None:
        """Trains gains of the pruned model, and multiplies them into the weights."""
        places = [(block, path) for block in surgery.blocks for path in block.projections]
        mixtures, device = [block for block in surgery.blocks if block.expert_count], samples[0].ids.device
        with trainable(surgery.model, device):
            gains = unit_gains([block.part(path) for block, path in places], device)
            for block in mixtures:
                ones = torch.ones(block.expert_count, block.expert_width, device=device)
                places.append((block, block.experts.channels.consumer.path))
                gains.append((block.part(block.experts.path), ones))
            train_gains(surgery.model, gains, self._steps(samples), self.gain_rate, group)
        for (block, path), (_, gain) in zip(places, gains, strict=True):
            surgery.scale(block, path, gain)

    def _choose(self, budget: Budget, scores: list[Tensor], p: float) -> list[Tensor]:
        alike = [score if score.ndim == 1 else ranked(score).mean(1) for score in scores]  # of experts each rank's
        chosen = global_ranking(alike, budget.costs, p, exact=True)
        if not budget.restricted:
            return chosen
        counts = budget.fit([len(keep) for keep in chosen])
        return [top_k(score, count) for score, count in zip(scores, counts, strict=True)]


def _norms_of_units(group: UnitGroup, norms: Tensor) -> Tensor:  # of inputs of the group's consumer -> of units
    return norms[group.consumer.index].norm(dim=1) if group.kind == "attention" else norms


def initial_scores(norm: Tensor, fraction: float) -> Tensor:  # [..., n] -> [..., n]
    """Scores in the order of the norms; those of the given fraction of channels are above 0.

    Example:
        >>> initial_scores(torch.tensor([1.0, 9.0, 4.0]), 0.5).round().tolist()
        [-2.0, 2.0, 0.0]
    """
    n, order = norm.shape[-1], norm.argsort(descending=True, stable=True)
    rank = torch.empty(norm.shape).scatter_(-1, order, (torch.arange(n) + 0.5).expand_as(norm))
    return SPREAD * (fraction - rank / n)
