r"""Losses of the next tokens that never hold the logits of all positions.

Logits are as wide as the vocabulary, and a loss needs them several times in float32: for 8192 tokens of Llama 3 that is
4 GB each time. So only the positions that count get any, a few at a time, and the gradient at what enters the head is
made as soon as their losses are there:

.. math:: L = \sum_i w_i \sum_t \ell_i(z_t), \qquad z_t = f(h_t), \qquad
    \frac{\partial L}{\partial h_t} = \Bigl(\frac{\partial f}{\partial h_t}\Bigr)^{\!\top}
    \sum_i w_i \frac{\partial \ell_i}{\partial z_t}

What is kept for the backward pass is as wide as the model: :math:`\partial L / \partial h`, [n, d].

Symbols: n positions that count, t one of them, h what enters the head, f the head and whatever the model does with what
leaves it, z logits, l losses, w their weights; b windows of a batch, s tokens of a window, d model width, v vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from plprune.running import standing_in
from plprune.text import IGNORED

# Bytes of logits in float32 at a time. On a CPU, malloc keeps no more than 32 MB at hand, and new pages are slow.
ROOM, ROOM_ON_CPU = 1 << 28, 3 << 23
LEAST = 64  # positions, as the head is read anew for each part
Loss = Callable[[Tensor, slice], Tensor]  # logits [r, v], and which of all positions they are of: their sum


@dataclass(frozen=True)
class States:
    """What enters a model's head, at some positions.

    Args:
        values: The hidden states, [n, d].
        head: Makes the logits [r, v] of some of them, by the model's own code, as some families scale or cap them.
        trained: What is trained of the head.
        rows: Of how many there may be logits at a time.
    """

    values: Tensor
    head: Callable[[Tensor], Tensor]
    trained: list[nn.Parameter]
    rows: int

    def logits(self) -> Iterator[tuple[Tensor, slice]]:
        """The logits of all positions, a few at a time, and of which they are."""
        for where in self.parts():
            yield self.head(self.values[where]), where

    def parts(self) -> list[slice]:
        """Which positions are taken together: at least one, maybe empty, part."""
        return [slice(start, start + self.rows) for start in range(0, max(1, len(self.values)), self.rows)]


def rows_at_a_time(vocabulary: int, on_cpu: bool) -> int:
    """Of how many positions there are logits at a time."""
    return max(LEAST, (ROOM_ON_CPU if on_cpu else ROOM) // (4 * vocabulary))


def counting(labels: Tensor) -> Tensor:  # [b, s] -> [n]
    """The positions, in all windows one after another, whose next token counts. A GPU is waited for.

    Example:
        >>> counting(torch.tensor([[5, 6, 7], [5, -100, 7]]))
        tensor([0, 1, 4])
    """
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero().squeeze(1)


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model is given of a batch: the tokens and, where documents are apart, their positions in them."""
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


def states(model: PreTrainedModel, given: dict[str, Tensor], positions: Tensor, whole: bool = True) -> States:
    """What enters the head of a model at some positions of windows.

    Args:
        model: The model.
        given: Its :func:`inputs`, [b, s] each.
        positions: As :func:`counting` has them.
        whole: Whether this process holds the whole head. Where it has a shard, the model must be called as one: its
            logits are then made at once, in its dtype, and taken for the states of a head that does nothing.
    """
    rows = rows_at_a_time(model.config.vocab_size, positions.device.type == "cpu")
    if not whole:
        logits = model(**given, use_cache=False).logits
        return States(logits.flatten(0, 1).index_select(0, positions), lambda values: values, [], rows)
    base = model.get_decoder()  # which the model calls before its head
    output = base(**given, use_cache=False)

    def head(values: Tensor) -> Tensor:
        said = type(output)(last_hidden_state=values[None])
        with standing_in([base], [lambda *_, **__: said]):
            return model(**given, use_cache=False).logits[0]

    trained = [p for p in cast(nn.Module, model.get_output_embeddings()).parameters() if p.requires_grad]
    return States(output.last_hidden_state.flatten(0, 1).index_select(0, positions), head, trained, rows)


def summed(states: States, losses: Sequence[Loss], weights: Sequence[float]) -> tuple[Tensor, Tensor]:  # [], [losses]
    """The sum of some losses over all positions by their weights, and, without a gradient, of each.

    Args:
        states: Of the positions.
        losses: What to sum.
        weights: Of each loss.
    """
    return _Summed.apply(states.values, states, losses, weights, *states.trained)  # type: ignore[no-any-return]


def next_token(labels: Tensor, positions: Tensor) -> Loss:  # [b, s], [n]
    """The cross-entropy of the next tokens."""
    following = labels.flatten()[positions + 1]
    return lambda logits, where: _NextToken.apply(logits, following[where, None])  # type: ignore[no-any-return]


class _NextToken(torch.autograd.Function):
    """The cross-entropy of logits [r, v] and labels [r, 1] in float32, summed.

    Its gradient, the softmax, but for -1 at the label, is made in the place of the logarithms; torch makes two more
    tensors as large.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logs = logits.log_softmax(1, dtype=torch.float32)
        ctx.save_for_backward(logs, labels)
        ctx.dtype = logits.dtype
        return -logs.gather(1, labels).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        logs, labels = ctx.saved_tensors
        shares = logs.exp_().mul_(scale).scatter_add_(1, labels, -scale.expand(labels.shape))
        return shares.to(ctx.dtype), None


class _Summed(torch.autograd.Function):
    """:func:`summed`, whose gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        states: States,
        losses: Sequence[Loss],
        weights: Sequence[float],
        *trained: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        sums, gradients = torch.zeros(len(losses), device=values.device), [torch.zeros_like(p) for p in trained]
        gradient = torch.empty_like(values)
        for where in states.parts():
            with torch.set_grad_enabled(wanted):
                own = values[where].detach().requires_grad_(wanted)
                logits = states.head(own)
                found = torch.stack([loss(logits, where) for loss in losses])
                total = _weighed(found, weights)
            sums += found.detach()
            if wanted:
                gradient[where], *of_head = torch.autograd.grad(total, [own, *trained])
                for so_far, each in zip(gradients, of_head, strict=True):
                    so_far += each
        ctx.save_for_backward(gradient, *gradients)
        ctx.mark_non_differentiable(sums)
        return _weighed(sums, weights), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *gradients = (each * scale for each in ctx.saved_tensors)
        return gradient, None, None, None, *gradients


def _weighed(sums: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * each for each, weight in zip(sums, weights, strict=True)]).sum()
