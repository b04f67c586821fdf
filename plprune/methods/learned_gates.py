r"""Learned gates: which FFN channels stay is learned, for all blocks at once, by the loss on next tokens.

Every channel gets a gate between 0 and 1. The gates are trained, in one budget for the whole model, while a temperature
closes or opens them, in the end all but wholly: what a gate lets through that is half open would be missed later. What
is scored is thus what channels do together, and not what each does alone, and nothing has to be said about how much a
block matters. A method of plprune's own; it needs gradients, hence the whole model in memory, and about three times
what a forward pass takes for each calibration window.

What stays is repaired in the same pass: every input of every projection of the blocks gets a gain, which starts at 1,
is trained beside the gates, and ends in the columns of the weight. These are a thousandth of all parameters, and so few
can be learned from few tokens.

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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune import processes
from plprune.allocation import (
    check_near,
    fit,
    fraction_to_remove,
    global_ranking,
    importance,
    kept_fractions,
    largest_remainder,
    top_k,
)
from plprune.anatomy import Block, blocks_of, innermost, matrix, on_device
from plprune.calibration import Calibration, observe, stream
from plprune.estimate import Work, block_flops
from plprune.evaluation import next_token_loss
from plprune.journal import journal_of
from plprune.methods.base import PruningMethod, Rows, distinct, thinned
from plprune.plan import PruningPlan
from plprune.progress import Progress
from plprune.running import evaluating
from plprune.serving import FREE, Constraint
from plprune.stats import Norms
from plprune.surgery import Surgery

Gains = list[dict[str, Tensor]]  # of each block: less 1, by the path of the projection, [d_in] each

SPREAD = 6.0  # of the scores of a block, from its best channel to its worst, at the start
WARM, COLD = 0.5, 0.005  # temperatures at the first and after the last step, when gates must be open or closed


@dataclasses.dataclass(frozen=True)
class LearnedGates(PruningMethod):
    """FFN channels by gates that are trained under one budget for all blocks; gains, trained beside them, repair.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        passes: How often the calibration windows are gone through; each is a step. Gates that see a text often learn it
            by heart: more windows do better than more passes.
        learning_rate: Of the scores, whose best and worst are 6 apart in every block at first.
        gain_rate: Learning rate of the gains, one for each input of each projection, which are 1 at first; at 0 they
            stay that, and no weight that is kept changes.
        target_parameters: How many parameters the whole model may have in the end, like 5.0B or 100M: `sparsity` is
            then found by it, and what is given for it does not count.
        target_memory: What its weights and the keys and values of `target_batch` sequences may take, like 8GiB or
            500MB: likewise. Of two targets the stricter counts.
        target_batch: Sequences for which `target_memory` has to do.
        target_context: Tokens of each.
        serve_on: Where the result must load: llama.cpp, vllm, transformers. Its sizes are then such as can be served
            there, and its sparsity as near to the one asked for as that allows; what cannot be is refused.
        tensor_parallel: Devices that will share the result: widths and heads are divisible by their number.
    """

    sparsity: float = 0.25
    passes: int = 1
    learning_rate: float = 0.1
    gain_rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes < 1 or self.learning_rate <= 0 or self.gain_rate < 0:
            raise ValueError(
                "gates are trained in at least one of `passes`, with a positive `learning_rate`, and gains with a "
                "`gain_rate` that is not negative"
            )

    def prune(self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor]) -> PruningPlan:
        calibration = Calibration.of(batches)
        asked, p = self.check(model), self._budget(blocks_of(model))
        if journal_of(model) is not None:
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
        if p:
            scores, gains = self._learn(model, rows, scores, p, calibration)
            for (block, _), own in zip(rows, gains, strict=True):
                for path, gain in own.items():
                    surgery.scale(block, path, 1 + gain)
        for (block, group), keep in zip(rows, self._choose(rows, scores, p, asked), strict=True):
            surgery.keep(block, group, keep)
        return surgery.plan("LearnedGates", dataclasses.asdict(self), u)

    def conflicts(self, asked: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        return []

    def check(self, model: PreTrainedModel) -> Constraint:
        asked, blocks = super().check(model), blocks_of(model)
        p = self._budget(blocks)
        if asked == FREE:
            return asked
        asked.check_heads(blocks)
        rows = _rows(blocks)
        check_near(self.sparsity, rows, self._alike(rows, p, asked), 1 - p, sum(b.parameters() for b in blocks))
        return asked

    def foresee(self, model: PreTrainedModel) -> list[dict[str, int]]:
        asked, blocks = self.check(model), blocks_of(model)
        rows, p = _rows(blocks), self._budget(blocks)
        alike = self._alike(rows, p, asked)
        if asked.uniform or len(rows) == 1 or not p:
            return distinct(rows, [alike])
        costs = [block.cost(group) for block, group in rows]
        allowed = [range(1, len(g) + 1) if asked == FREE else asked.counts(b, g) for b, g in rows]
        step = max(c * (a[-1] - a[-2] if len(a) > 1 else 1) for c, a in zip(costs, allowed, strict=True))
        target = (1 - p) * sum(cost * len(group) for cost, (_, group) in zip(costs, rows, strict=True))
        forth, limits = list(range(len(rows))), (target + step / 2, target - 1.5 * step)
        cases = [
            thinned(rows, allowed, [order], limit, even)
            for limit in limits
            for order, even in ((forth, True), (forth, False), (forth[::-1], False))
        ]
        return distinct(rows, [alike, *cases])

    def work(self, model: PreTrainedModel, count: int, length: int) -> Work:
        """A forward and a backward pass for every step, which keeps what it reads."""
        blocks, size = blocks_of(model), next(model.parameters()).element_size()
        once = 3 * count * length * sum(block_flops(block, length) for block in blocks)
        kept = length * size * sum(8 * model.config.hidden_size + 4 * block.channels for block in blocks)
        return Work(self.passes * once, 0, kept)

    def _budget(self, blocks: Sequence[Block]) -> float:
        """The fraction of the FFN channels to remove (p)."""
        return fraction_to_remove(self.sparsity, blocks, "none", "the FFN", biased=False)

    def _alike(self, rows: Rows, p: float, asked: Constraint) -> list[int]:
        """Units to keep in each group if all gates were alike."""
        sizes = [len(group) for _, group in rows]
        if asked == FREE:
            return largest_remainder(sizes, max(len(sizes), round(sum(sizes) * (1 - p))))
        return fit(rows, [n * (1 - p) for n in sizes], 1 - p, asked, asked.uniform)

    def _learn(
        self, model: PreTrainedModel, rows: Rows, scores: list[Tensor], p: float, calibration: Calibration
    ) -> tuple[list[Tensor], Gains]:  # [units] each
        """Scores and gains after training; of several processes all take the first one's scores."""
        device = calibration.device or model.device
        costs = [block.cost(group) for block, group in rows]
        cost = torch.cat([torch.full((len(s),), c / min(costs)) for s, c in zip(scores, costs, strict=True)]).to(device)
        theta, gains = torch.cat(scores).to(device), ones(rows, device) if self.gain_rate else [{} for _ in rows]
        windows = calibration.windows(sum(len(ids) for ids in calibration)) * self.passes
        with evaluating(model), on_device(model, device), frozen(model):
            train(model, rows, theta, gains, cost, 1 - p, windows, (self.learning_rate, self.gain_rate))
        return list(processes.sent(theta, 0, calibration.group).cpu().split([len(s) for s in scores])), gains

    def _choose(self, rows: Rows, scores: list[Tensor], p: float, asked: Constraint) -> list[Tensor]:
        chosen = global_ranking(scores, [block.cost(group) for block, group in rows], p)
        if asked == FREE:
            return chosen
        counts = fit(rows, [len(keep) for keep in chosen], 1 - p, asked, asked.uniform)
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


def ones(rows: Rows, device: torch.device) -> Gains:
    """Gains of 1 for every input of every projection of the blocks."""
    sizes = [{path: matrix(block.part(path)).shape[1] for path in block.projections} for block, _ in rows]
    return [{path: torch.zeros(size, device=device) for path, size in own.items()} for own in sizes]


def train(
    model: PreTrainedModel,
    rows: Rows,
    scores: Tensor,  # [units]
    gains: Gains,
    cost: Tensor,  # [units]
    keep: float,
    windows: Sequence[Tensor],
    rates: tuple[float, float],
) -> None:
    """Trains scores and gains, in place, by one step of Adam on each window; rates fall to a tenth, as gates go cold.

    Args:
        model: In evaluation mode, without gradients of its own.
        rows: Blocks with their groups.
        scores: Of all groups' units, one after another.
        gains: Of each block, less 1; projections that are not in them have none.
        cost: Of each unit.
        keep: The fraction of all cost that stays.
        windows: Token ids, [1, s] each.
        rates: The highest, of scores and of gains.
    """
    steps, budget = len(windows), keep * float(cost.sum())
    trained = [gain.requires_grad_() for own in gains for gain in own.values()]
    optimizer = torch.optim.Adam(
        [{"params": p, "lr": rate} for p, rate in zip(([scores], trained), rates, strict=True) if p], betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 16 * (step + 1) / steps) * (1 - 0.9 * step / steps)
    )
    with Progress(steps, "training gates", "window") as bar:
        for step, ids in enumerate(windows):
            temperature = WARM * (COLD / WARM) ** (step / steps)
            gates = opened(scores, cost, budget, temperature).requires_grad_()
            with torch.enable_grad(), scaled(rows, gates, gains):
                logits = model(input_ids=ids.to(scores.device), use_cache=False).logits
                gradient, *gradients = torch.autograd.grad(next_token_loss(logits, ids), [gates, *trained])
            scores.grad = within_budget(gates.detach(), gradient, cost)
            for gain, own in zip(trained, gradients, strict=True):
                gain.grad = own
            optimizer.step()
            schedule.step()
            bar.update()
    for gain in trained:
        gain.requires_grad_(False)


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
def scaled(rows: Rows, gates: Tensor, gains: Gains) -> Iterator[None]:  # [units]
    """The model with every unit multiplied by its gate and every input by its gain, for the time of the context."""

    def multiply(own: Tensor) -> Any:
        return lambda _, args: (args[0] * own.to(args[0].dtype), *args[1:])

    parts = gates.split([len(group) for _, group in rows])
    handles = [
        innermost(block.part(path)).register_forward_pre_hook(multiply(factor))
        for (block, group), gate, own in zip(rows, parts, gains, strict=True)
        for path, factor in [(group.consumer.path, gate), *((path, 1 + gain) for path, gain in own.items())]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _rows(blocks: Sequence[Block]) -> Rows:
    return [(block, block.groups("none")[0]) for block in blocks]
