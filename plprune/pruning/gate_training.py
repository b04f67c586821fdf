"""Trains gates and gains, which multiply the inputs of projections, to match the outputs of the dense model.

Gates lie between 0 and 1 and share one budget; as their temperature falls, each one opens or closes. The channels of
a block's experts have the same scores, each expert's in an order of its own, so that as many gates of each are open;
so have the experts of all blocks. Gains are unbounded. The weights stay fixed. A step of Adam takes one calibration
window or several, which processes share.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import UnitGroup
from plprune.architecture.modules import innermost, matrix, on_device, requiring_grad
from plprune.architecture.probing import has_interface
from plprune.io import distributed
from plprune.pruning.allocation import Rows, ranked
from plprune.pruning.descent import steps
from plprune.pruning.expert_inputs import gated
from plprune.pruning.forward import after_blocks, evaluating
from plprune.pruning.losses import (
    Criterion,
    HeadInputs,
    counted_positions,
    divergence,
    head_inputs,
    next_token_criterion,
    top_k_log_probs,
    weighted_loss,
)

# projections with the factors of their inputs, [d_in]; experts with those of their channels, [experts, channels], or
# of what they add, [experts]
Factors = list[tuple[nn.Module, Tensor]]
WARM, COLD = 0.5, 0.005  # temperatures of the first step and after the last
LIKELIEST = 64  # number of likeliest tokens that are compared individually; the others are pooled


@dataclasses.dataclass(frozen=True)
class TeacherSample:
    """A calibration window with the dense model's distribution of each next token.

    Args:
        ids: Token ids, [1, s].
        values: Log-probabilities of the k likeliest tokens, and of all others together, [1, s - 1, k + 1].
        tokens: Ids of the k likeliest tokens, [1, s - 1, k].
    """

    ids: Tensor
    values: Tensor
    tokens: Tensor

    def to(self, device: torch.device | str) -> "TeacherSample":
        """The sample on a device."""
        return TeacherSample(self.ids.to(device), self.values.to(device), self.tokens.to(device))

    def divergence(self, states: HeadInputs) -> Tensor:
        """The mean divergence from the dense model's distributions, of a model with these :func:`states_of`."""
        return self._mean(states, [self._criterion])

    def loss(self, states: HeadInputs) -> Tensor:
        """The mean of the divergence and the loss on the text's next tokens."""
        return self._mean(states, [self._criterion, next_token_criterion(self.ids, counted_positions(self.ids))])

    def _criterion(self, logits: Tensor, where: slice) -> Tensor:
        return divergence(logits, self.values[0, where], self.tokens[0, where], temperature=1.0)

    def _mean(self, states: HeadInputs, criteria: list[Criterion]) -> Tensor:
        weight = 1 / (len(criteria) * len(states.values))
        return weighted_loss(states, criteria, [weight] * len(criteria))[0]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The parameters of units, some of which may lie within others: channels within experts.

    Args:
        each: Of each unit with what lies within it, [units].
        inner: Indices of the units that lie within others.
        outer: For each of these, the index of the other.
    """

    each: Tensor
    inner: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    outer: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    @classmethod
    def of(cls, rows: Rows, device: torch.device) -> "Costs":
        """The costs of the units of groups, in costs of the cheapest; channels of experts come after experts."""
        costs = [block.cost(group) / max(1, group.experts) for block, group in rows]
        sizes = [len(group) * max(1, group.experts) for _, group in rows]
        each = torch.cat([torch.full((n,), cost / min(costs)) for n, cost in zip(sizes, costs, strict=True)])
        inner, outer, at, experts = [], [], 0, {}
        for (block, group), size in zip(rows, sizes, strict=True):
            places = torch.arange(at, at + size)
            if group.kind == "expert":
                experts[block.index] = places
            elif group.experts and block.index in experts:
                inner.append(places)
                outer.append(experts[block.index].repeat_interleave(len(group)))
            at += size
        none = [torch.zeros(0, dtype=torch.long)]
        return cls(each.to(device), torch.cat(inner or none).to(device), torch.cat(outer or none).to(device))

    def spent(self, gates: Tensor) -> Tensor:  # [units] -> []
        r"""What open gates cost: :math:`\sum_o z_o (c_o - \sum_{i \in o} (1 - z_i) c_i)` over outer units o."""
        costs = gates * self._own(gates)
        return costs.sum() - costs[self.inner].sum()

    def marginal(self, gates: Tensor) -> Tensor:  # [units] -> [units]
        """The derivative of :meth:`spent`."""
        return self._own(gates).index_copy(0, self.inner, self.each[self.inner] * gates[self.outer])

    def _own(self, gates: Tensor) -> Tensor:  # [units] -> [units]
        """The cost of each unit without that of the closed ones within it."""
        return self.each.index_add(0, self.outer, ((gates - 1) * self.each)[self.inner])


@torch.no_grad()
def teacher_sample(model: PreTrainedModel, ids: Tensor, hidden: Tensor | None = None) -> TeacherSample:
    """A window with a model's next-token distributions.

    Args:
        model: The model.
        ids: Token ids, [1, s].
        hidden: The output of its last block, [1, s, d]; by default the blocks run.
    """
    with contextlib.nullcontext() if hidden is None else after_blocks(model, hidden):
        states = states_of(model, ids)
    parts = [top_k_log_probs(logits, LIKELIEST, temperature=1.0) for logits, _ in states.logits()]
    values, tokens = (torch.cat(each)[None] for each in zip(*parts, strict=True))
    return TeacherSample(ids, values, tokens.int())


def states_of(model: PreTrainedModel, ids: Tensor) -> HeadInputs:  # [1, s]
    """Runs a model on a window up to its head, for every position with a next token."""
    return head_inputs(model, {"input_ids": ids}, counted_positions(ids))


def unit_gains(projections: Iterable[nn.Module], device: torch.device) -> Factors:
    """A gain of 1 for every input of each projection."""
    return [(part, torch.ones(matrix(part).shape[1], device=device)) for part in projections]


def train_gates(
    model: PreTrainedModel,
    rows: Rows,
    scores: Tensor,  # [units]
    cost: Costs,
    keep: float,
    batches: Sequence[Sequence[TeacherSample]],
    rate: float,
    group: distributed.ProcessGroup = None,
) -> Tensor:  # [units]
    """Trains scores in place while the temperature of their gates falls.

    Args:
        model: In evaluation mode; its parameters need no gradients.
        rows: Blocks with their groups.
        scores: One per unit, group after group; of channels of experts one per expert and channel.
        cost: Of the units.
        keep: The fraction of the total cost to keep.
        batches: The samples of each step.
        rate: The highest learning rate.
        group: The processes that share the samples of a step.

    Returns:
        The gates in the end.
    """
    budget = keep * float(cost.spent(torch.ones_like(scores)))
    consumers = [
        block.part(block.experts.path if group.kind.startswith("expert") else group.consumer.path)
        for block, group in rows
    ]
    for done, samples in steps([{"params": [scores], "lr": rate}], batches, "training gates", group):
        align(scores, rows)
        gates = gate_values(scores, cost, budget, WARM * (COLD / WARM) ** done).requires_grad_()
        with torch.enable_grad():  # the caller may have disabled gradients
            own = [_of_inputs(each, group) for each, (_, group) in zip(by_group(gates, rows), rows, strict=True)]
            factors = list(zip(consumers, own, strict=True))
        (gradient,) = mean_gradients(model, samples, factors, TeacherSample.divergence, [gates], group)
        scores.grad = within_budget(gates.detach(), gradient, cost)
    align(scores, rows)
    return gate_values(scores, cost, budget, COLD)


def by_group(values: Tensor, rows: Rows) -> list[Tensor]:  # [units] or [experts, channels] each
    """Splits the values of all units by their groups."""
    parts = values.split([len(group) * max(1, group.experts) for _, group in rows])
    return [
        part.view(group.experts, -1) if group.experts else part for part, (_, group) in zip(parts, rows, strict=True)
    ]


def _of_inputs(gates: Tensor, group: UnitGroup) -> Tensor:  # [units] -> [inputs of the consumer]
    """The gate of each input of a group's consumer; that of a head is of all its channels."""
    if group.kind != "attention":
        return gates
    index = group.consumer.index.to(gates.device)
    return gates.new_ones(index.numel()).index_copy(0, index.flatten(), gates.repeat_interleave(index.shape[1]))


def align(scores: Tensor, rows: Rows) -> None:
    """Gives the channels of a block's experts the same scores, in place, and all blocks' experts.

    Those of a rank become their mean: of each expert the r-th best channel, of each group of experts the r-th best.
    """
    experts = []
    for own, (block, group) in zip(by_group(scores, rows), rows, strict=True):
        if group.experts:
            _align([own])
        elif group.kind == "expert":
            experts.append(own.view(block.experts.groups, -1))
    if experts:
        _align(experts)


def _align(alike: list[Tensor]) -> None:  # [n, units] each
    mean = ranked(torch.cat(alike)).mean(1)
    for own in alike:
        order = own.argsort(dim=1, descending=True, stable=True)
        own.scatter_(1, order, mean.expand_as(own))


def train_gains(
    model: PreTrainedModel,
    gains: Factors,
    batches: Sequence[Sequence[TeacherSample]],
    rate: float,
    group: distributed.ProcessGroup = None,
) -> None:
    """Trains gains in place.

    Args:
        model: In evaluation mode; its parameters need no gradients.
        gains: The model's projections with their gains.
        batches: The samples of each step.
        rate: The highest learning rate.
        group: The processes that share the samples of a step.
    """
    trained = [gain.detach().requires_grad_() for _, gain in gains]  # these share memory with `gains`
    factors = [(part, own) for (part, _), own in zip(gains, trained, strict=True)]
    for _, samples in steps([{"params": trained, "lr": rate}], batches, "training gains", group):
        found = mean_gradients(model, samples, factors, TeacherSample.loss, trained, group)
        for gain, gradient in zip(trained, found, strict=True):
            gain.grad = gradient


def mean_gradients(
    model: PreTrainedModel,
    samples: Sequence[TeacherSample],
    factors: Factors,
    loss: Callable[[TeacherSample, HeadInputs], Tensor],
    of: list[Tensor],
    group: distributed.ProcessGroup,
) -> list[Tensor]:
    """Gradients of the mean loss of all samples with respect to the tensors in `of`; the factors depend on them."""
    sizes = [each.numel() for each in of]
    total = torch.zeros(sum(sizes), device=of[0].device, dtype=of[0].dtype)
    for sample in samples[distributed.rank(group) :: distributed.size(group)]:
        with torch.enable_grad(), scaled_inputs(factors):
            own = torch.autograd.grad(loss(sample, states_of(model, sample.ids)), of)
        total += torch.cat([each.flatten() for each in own])
    mean = distributed.all_reduce_sum(total, group) / len(samples)
    return [part.view_as(each) for part, each in zip(mean.split(sizes), of, strict=True)]


def gate_values(theta: Tensor, cost: Costs, budget: float, temperature: float) -> Tensor:  # [units] -> [units]
    """Computes gates whose total cost equals the budget; finds the threshold of the scores by bisection.

    Example:
        >>> gate_values(torch.tensor([-1.0, 1.0]), Costs(torch.ones(2)), 1.0, 0.1).round()
        tensor([0., 1.])
    """
    low, high = theta.min() - 20 * temperature, theta.max() + 20 * temperature
    for _ in range(40):
        middle = (low + high) / 2
        if cost.spent(torch.sigmoid((theta - middle) / temperature)) > budget:
            low = middle
        else:
            high = middle
    return torch.sigmoid((theta - (low + high) / 2) / temperature)


def within_budget(gates: Tensor, gradient: Tensor, cost: Costs) -> Tensor:  # [units] each -> [units]
    """The gradient of the scores per unit of cost, projected so that the total cost of the gates stays the same.

    Example:
        >>> within_budget(torch.tensor([0.5, 0.5]), torch.tensor([-3.0, -1.0]), Costs(torch.ones(2)))
        tensor([-0.2500,  0.2500])
    """
    slope, marginal = gates * (1 - gates), cost.marginal(gates)
    price = (slope * gradient).sum() / (slope * marginal).sum()
    return slope * (gradient - price * marginal) / cost.each


@contextlib.contextmanager
def scaled_inputs(factors: Factors) -> Iterator[None]:
    """Multiplies the inputs of projections, and experts or their inner activations, by factors within the context."""

    def multiply(own: Tensor) -> Any:
        return lambda _, args: (args[0] * own.to(args[0].dtype), *args[1:])

    handles = [
        innermost(part).register_forward_pre_hook(multiply(own)) for part, own in factors if not has_interface(part)
    ]
    try:
        with contextlib.ExitStack() as stack:
            for experts, own in [factor for factor in factors if has_interface(factor[0])]:
                stack.enter_context(gated(experts, own))
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def trainable(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Puts the model on a device, in evaluation mode and without gradients, within the context."""
    with evaluating(model), on_device(model, device), requiring_grad(model.parameters(), False):
        yield
