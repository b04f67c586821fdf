r"""Learned gates: which FFN channels stay is learned, for all blocks at once, from what the dense model says.

Every channel gets a gate between 0 and 1. The gates are trained, in one budget for the whole model, while a temperature
closes or opens them, in the end all but wholly: what a gate lets through that is half open would be missed later. What
is scored is thus what channels do together, and not what each does alone, and nothing has to be said about how much a
block matters. A method of plprune's own; it needs gradients, hence the whole model in memory, and about three times
what a forward pass takes for each calibration window, twice, after one that asks the dense model.

The loss is the divergence from the dense model's distributions of each next token, its likeliest tokens one by one and
all others together, as in `plprune.recovery.distillation`. Gates that are trained by the text's next tokens learn it.

What stays is repaired twice. First by least squares, toward what the FFNs did (`plprune.pruning.repair`), drawn to the
weights as they are. Then every input of every projection of the blocks gets a gain, which starts at 1, is trained by
that divergence and the loss on next tokens in equal parts, and ends in the columns of the weight. These are a
thousandth of all parameters, and so few can be learned from few tokens; the other way round, least squares would undo
what they learned.

Symbols: :math:`\theta_j` the score of channel j, :math:`z_j` its gate, T the temperature, :math:`c_j` the parameters of
the channel, K those that may stay, :math:`g_j` the gradient of the loss with respect to the gate.

.. math:: z_j = \sigma\bigl((\theta_j - \tau) / T\bigr), \quad \tau \text{ such that } \sum_j c_j z_j = K

As :math:`\tau` follows the scores, the gradient of a score is that of its gate less what the budget costs it,

.. math:: \frac{\partial L}{\partial \theta_j} \propto z_j (1 - z_j) (g_j - \pi c_j), \quad
          \pi = \frac{\sum_i z_i (1 - z_i) g_i}{\sum_i z_i (1 - z_i) c_i}

The scores start as CFSP would have them: widths by block importance, channels by activation norm. Gates that are
trained under a budget are known from L0 regularisation (https://arxiv.org/abs/1712.01312) and from Sheared LLaMA
(https://arxiv.org/abs/2310.06694), which train the weights with them; these here are annealed in one short pass. Gains
as all that is trained are known from IA3 (https://arxiv.org/abs/2205.05638).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import innermost, lacks_weights, matrix, on_device
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
from plprune.pruning.losses import divergence, next_token_loss, top_k_log_probs
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import Damping, Repair
from plprune.pruning.statistics import Norms
from plprune.pruning.stream import observe, stream
from plprune.pruning.surgery import Surgery

Factors = list[tuple[nn.Module, Tensor]]  # projections, and what their inputs are multiplied by, [d_in] each
SPREAD = 6.0  # of the scores of a block, from its best channel to its worst, at the start
WARM, COLD = 0.5, 0.005  # temperatures at the first and after the last step, when gates must be open or closed
LIKELIEST = 64  # tokens that the dense model is asked for one by one; all others count together


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A calibration window, with what the dense model says of it.

    Args:
        ids: Token ids, [1, s].
        values: Log-probabilities of the tokens that it holds likeliest, and of all others together, [1, s - 1, k + 1].
        tokens: Which these are, [1, s - 1, k].
    """

    ids: Tensor
    values: Tensor
    tokens: Tensor

    def divergence(self, logits: Tensor) -> Tensor:  # [1, s, v]
        """From what the dense model says of the next tokens."""
        return divergence(logits[0, :-1], self.values[0], self.tokens[0], temperature=1.0) / (self.ids.numel() - 1)

    def loss(self, logits: Tensor) -> Tensor:  # [1, s, v]
        """This and what the text says next, in equal parts."""
        return (self.divergence(logits) + next_token_loss(logits, self.ids)) / 2


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
        scores = [started(norm, k) for norm, k in zip(norms, fractions, strict=True)]
        lessons = self._lessons(model, calibration) if p else []
        if lessons:
            scores = self._learn_gates(model, rows, scores, p, lessons, calibration)
        chosen = self._choose(budget, scores, p)
        decided = [(block, group, keep) for (block, group), keep in zip(rows, chosen, strict=True)]
        repairer.carry_out(surgery, decided, "LearnedGates repair")
        if lessons and self.gain_rate:
            self._learn_gains(surgery, lessons)
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
        taught = count * length * LIKELIEST * 8
        return Work((1 + 3 * passes) * once + repairs.flops, repairs.single, taught + max(kept, repairs.bytes))

    def _fraction(self, blocks: Sequence[Block]) -> float:
        """The fraction of the FFN channels to remove (p)."""
        return fraction_to_remove(self.sparsity, blocks, "none", "the FFN", biased=self.biased)

    def _budget(self, blocks: Sequence[Block], p: float, constraint: Constraint) -> Budget:
        budget = Budget(blocks, 1 - p, constraint, each_block=constraint.uniform)
        budget.check(self.sparsity)
        return budget

    def _lessons(self, model: PreTrainedModel, calibration: Calibration) -> list[Lesson]:
        """The lesson of each step, by the model before it is pruned."""
        device = calibration.device or model.device
        windows, lessons = calibration.windows(sum(len(ids) for ids in calibration)), []
        with (
            evaluating(model),
            on_device(model, device),
            Progress(len(windows), "asking the dense model", "window") as bar,
        ):
            for ids in windows:
                lessons.append(lesson(model, ids.to(device)))
                bar.update()
        return lessons * self.passes

    def _learn_gates(
        self,
        model: PreTrainedModel,
        rows: Rows,
        scores: list[Tensor],  # [units] each
        p: float,
        lessons: Sequence[Lesson],
        calibration: Calibration,
    ) -> list[Tensor]:  # [units] each
        """Scores after training; all processes take the first one's."""
        costs = [block.cost(group) for block, group in rows]
        cost = torch.cat([torch.full((len(s),), c / min(costs)) for s, c in zip(scores, costs, strict=True)])
        device = lessons[0].ids.device
        theta = torch.cat(scores).to(device)
        with trainable(model, device):
            train_gates(model, rows, theta, cost.to(device), 1 - p, lessons, self.learning_rate)
        return list(distributed.broadcast(theta, 0, calibration.group).cpu().split([len(s) for s in scores]))

    def _learn_gains(self, surgery: Surgery, lessons: Sequence[Lesson]) -> None:
        """Gains of what stays, in the weights."""
        places = [(block, path) for block in surgery.blocks for path in block.projections]
        device = lessons[0].ids.device
        with trainable(surgery.model, device):
            gains = ones([block.part(path) for block, path in places], device)
            train_gains(surgery.model, gains, lessons, self.gain_rate)
        for (block, path), (_, gain) in zip(places, gains, strict=True):
            surgery.scale(block, path, gain)

    def _choose(self, budget: Budget, scores: list[Tensor], p: float) -> list[Tensor]:
        chosen = global_ranking(scores, budget.costs, p)
        if budget.constraint == FREE:
            return chosen
        counts = budget.fit([len(keep) for keep in chosen])
        return [top_k(score, count) for score, count in zip(scores, counts, strict=True)]


def started(norm: Tensor, fraction: float) -> Tensor:  # [n] -> [n]
    """Scores in the order of the norms, above 0 for the given fraction of them.

    Example:
        >>> started(torch.tensor([1.0, 9.0, 4.0]), 0.5).round().tolist()
        [-2.0, 2.0, 0.0]
    """
    rank = torch.empty(len(norm)).index_copy_(
        0, norm.argsort(descending=True, stable=True), torch.arange(len(norm)) + 0.5
    )
    return SPREAD * (fraction - rank / len(norm))


@torch.no_grad()
def lesson(model: PreTrainedModel, ids: Tensor) -> Lesson:  # [1, s]
    """A window with what a model says of it."""
    values, tokens = top_k_log_probs(model(input_ids=ids, use_cache=False).logits[:, :-1], LIKELIEST, temperature=1.0)
    return Lesson(ids, values, tokens.int())


def ones(projections: Iterable[nn.Module], device: torch.device) -> Factors:
    """Gains of 1 for every input of the projections."""
    return [(part, torch.ones(matrix(part).shape[1], device=device)) for part in projections]


def train_gates(
    model: PreTrainedModel,
    rows: Rows,
    scores: Tensor,  # [units]
    cost: Tensor,  # [units]
    keep: float,
    lessons: Sequence[Lesson],
    rate: float,
) -> None:
    """Trains scores, in place, as gates go cold.

    Args:
        model: In evaluation mode, without gradients of its own.
        rows: Blocks with their groups.
        scores: Of all groups' units, one after another.
        cost: Of each unit.
        keep: The fraction of all cost that stays.
        lessons: One for each step.
        rate: The highest learning rate.
    """
    budget, consumers = keep * float(cost.sum()), [block.part(group.consumer.path) for block, group in rows]
    for done, taught in steps([scores], rate, lessons, "training gates"):
        gates = opened(scores, cost, budget, WARM * (COLD / WARM) ** done).requires_grad_()
        with torch.enable_grad():  # who prunes may have it off
            factors = list(zip(consumers, gates.split([len(group) for _, group in rows]), strict=True))
        (gradient,) = gradients(model, taught.ids, factors, taught.divergence, [gates])
        scores.grad = within_budget(gates.detach(), gradient, cost)


def train_gains(model: PreTrainedModel, gains: Factors, lessons: Sequence[Lesson], rate: float) -> None:
    """Trains gains, in place.

    Args:
        model: In evaluation mode, without gradients of its own.
        gains: Of its projections.
        lessons: One for each step.
        rate: The highest learning rate.
    """
    trained = [gain.detach().requires_grad_() for _, gain in gains]  # these share their memory
    factors = [(part, own) for (part, _), own in zip(gains, trained, strict=True)]
    for _, taught in steps(trained, rate, lessons, "training gains"):
        for gain, gradient in zip(trained, gradients(model, taught.ids, factors, taught.loss, trained), strict=True):
            gain.grad = gradient


def steps(
    parameters: list[Tensor], rate: float, lessons: Sequence[Lesson], title: str
) -> Iterator[tuple[float, Lesson]]:
    """The lessons, each with the share of all that went before; a step of Adam follows each, by what was set as `grad`.

    The rate rises through the first sixteenth of the steps, and falls to a tenth through all.
    """
    optimizer, count = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95)), len(lessons)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 16 * (step + 1) / count) * (1 - 0.9 * step / count)
    )
    with Progress(count, title, "window") as bar:
        for step, taught in enumerate(lessons):
            yield step / count, taught
            optimizer.step()
            schedule.step()
            bar.update()


def gradients(
    model: PreTrainedModel,
    ids: Tensor,  # [1, s]
    factors: Factors,
    loss: Callable[[Tensor], Tensor],  # of the logits
    of: list[Tensor],
) -> Sequence[Tensor]:
    """Gradients of a loss with respect to what inputs are multiplied by."""
    with torch.enable_grad(), scaled(factors):
        return torch.autograd.grad(loss(model(input_ids=ids, use_cache=False).logits), of)


def opened(theta: Tensor, cost: Tensor, budget: float, temperature: float) -> Tensor:  # [units], [units] -> [units]
    """Gates that together cost the budget: the threshold of the scores is found by bisection.

    Example:
        >>> opened(torch.tensor([-1.0, 1.0]), torch.ones(2), 1.0, 0.1).round()
        tensor([0., 1.])
    """
    low, high = theta.min() - 20 * temperature, theta.max() + 20 * temperature
    for _ in range(40):
        middle = (low + high) / 2
        if (cost * torch.sigmoid((theta - middle) / temperature)).sum() > budget:
            low = middle
        else:
            high = middle
    return torch.sigmoid((theta - (low + high) / 2) / temperature)


def within_budget(gates: Tensor, gradient: Tensor, cost: Tensor) -> Tensor:  # [units] each -> [units]
    """The gradient of the scores, along which what the gates cost together does not change, by unit of cost.

    Example:
        >>> within_budget(torch.tensor([0.5, 0.5]), torch.tensor([-3.0, -1.0]), torch.ones(2))
        tensor([-0.2500,  0.2500])
    """
    slope = gates * (1 - gates)
    price = (slope * gradient).sum() / (slope * cost).sum()
    return slope * (gradient - price * cost) / cost


@contextlib.contextmanager
def scaled(factors: Factors) -> Iterator[None]:
    """The model with inputs of projections multiplied by factors, for the time of the context."""

    def multiply(own: Tensor) -> Any:
        return lambda _, args: (args[0] * own.to(args[0].dtype), *args[1:])

    handles = [innermost(part).register_forward_pre_hook(multiply(own)) for part, own in factors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def trainable(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """The model where and as factors of it are trained, for the time of the context."""
    with evaluating(model), on_device(model, device), frozen(model):
        yield


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model without gradients of its own, for the time of the context."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
