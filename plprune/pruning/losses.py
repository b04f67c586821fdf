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

from plprune.io.text import IGNORED
from plprune.pruning.forward import replaced_forwards


def top_k_log_probs(
    logits: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor]:  # [..., v] -> [..., k + 1], [..., k]
    """Log-probabilities of the likeliest tokens and, last, of all others together; and which tokens those are.

    Example:
        >>> values, tokens = top_k_log_probs(torch.tensor([4.0, 1.0, 2.0, 1.0]).log(), 2, 1.0)
        >>> values.exp(), tokens
        (tensor([0.5000, 0.2500, 0.2500]), tensor([0, 2]))
    """
    scaled = logits.float() / temperature
    values, tokens = scaled.topk(min(top_k, scaled.shape[-1]))
    if tokens.shape[-1] < scaled.shape[-1]:
        rest = scaled.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        values = torch.cat([values, rest], -1)
    return values.log_softmax(-1), tokens


def divergence(
    logits: Tensor,  # [n, v]
    values: Tensor,  # [n, k + 1], or [n, k] if that is the vocabulary
    tokens: Tensor,  # [n, k]
    temperature: float,
) -> Tensor:
    """KL divergence of a model from a teacher's :func:`top_k_log_probs`, summed, times the temperature squared."""
    index = tokens.long()
    own = logits.gather(-1, index).float() / temperature
    if values.shape[-1] > index.shape[-1]:
        # A new tensor, changed in place: the vocabulary is wide, and this is the only one that is made as large.
        others = (logits.float() / temperature).scatter_(-1, index, -torch.inf)
        own = torch.cat([own, others.logsumexp(-1, keepdim=True)], -1)
    theirs = values.float().log_softmax(-1)  # they were rounded
    divergence = nn.functional.kl_div(own.log_softmax(-1), theirs, log_target=True, reduction="sum")
    return temperature**2 * divergence


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:  # [b, s, v], [b, s]
    """Cross-entropy of every token given those before it; labels of -100 do not count.

    Example:
        >>> next_token_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 3]])).exp()
        tensor(4.)
    """
    logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)


# Bytes of logits in float32 at a time. On a CPU, malloc keeps no more than 32 MB at hand, and new pages are slow.
ROOM, ROOM_ON_CPU = 1 << 28, 3 << 23
LEAST = 64  # positions, as the head is read anew for each part
Criterion = Callable[[Tensor, slice], Tensor]  # logits [r, v], and which of all positions they are of: their sum


@dataclass(frozen=True)
class HeadInputs:
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


def rows_per_chunk(vocabulary: int, on_cpu: bool) -> int:
    """Of how many positions there are logits at a time."""
    return max(LEAST, (ROOM_ON_CPU if on_cpu else ROOM) // (4 * vocabulary))


def counted_positions(labels: Tensor) -> Tensor:  # [b, s] -> [n]
    """The positions, in all windows one after another, whose next token counts. A GPU is waited for.

    Example:
        >>> counted_positions(torch.tensor([[5, 6, 7], [5, -100, 7]]))
        tensor([0, 1, 4])
    """
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero().squeeze(1)


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model is given of a batch: the tokens and, where documents are apart, their positions in them."""
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


def head_inputs(model: PreTrainedModel, given: dict[str, Tensor], positions: Tensor, whole: bool = True) -> HeadInputs:
    """What enters the head of a model at some positions of windows.

    Args:
        model: The model.
        given: Its :func:`model_inputs`, [b, s] each.
        positions: As :func:`counted_positions` has them.
        whole: Whether this process holds the whole head. Where it has a shard, the model must be called as one: its
            logits are then made at once, in its dtype, and taken for the states of a head that does nothing.
    """
    rows = rows_per_chunk(model.config.vocab_size, positions.device.type == "cpu")
    if not whole:
        logits = model(**given, use_cache=False).logits
        return HeadInputs(logits.flatten(0, 1).index_select(0, positions), lambda values: values, [], rows)
    base = model.get_decoder()  # which the model calls before its head
    output = base(**given, use_cache=False)

    def head(values: Tensor) -> Tensor:
        said = type(output)(last_hidden_state=values[None])
        with replaced_forwards([base], [lambda *_, **__: said]):
            return model(**given, use_cache=False).logits[0]

    trained = [p for p in cast(nn.Module, model.get_output_embeddings()).parameters() if p.requires_grad]
    return HeadInputs(output.last_hidden_state.flatten(0, 1).index_select(0, positions), head, trained, rows)


def weighted_loss(
    states: HeadInputs, losses: Sequence[Criterion], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:  # [], [losses]
    """The sum of some losses over all positions by their weights, and, without a gradient, of each.

    Args:
        states: Of the positions.
        losses: What to sum.
        weights: Of each loss.
    """
    return _Summed.apply(states.values, states, losses, weights, *states.trained)  # type: ignore[no-any-return]


def next_token_criterion(labels: Tensor, positions: Tensor) -> Criterion:  # [b, s], [n]
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
    """:func:`weighted_loss`, whose gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        states: HeadInputs,
        losses: Sequence[Criterion],
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
