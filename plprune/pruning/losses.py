r"""Language-modelling losses that never hold the logits of all positions in memory.

Logits are as wide as the vocabulary, and a loss needs several float32 copies of them: for 8192 tokens of Llama 3, each
copy takes 4 GB. Therefore logits are computed for chunks of the counted positions only, and each chunk's gradient with
respect to the head's inputs is computed in the forward pass:

.. math:: L = \sum_i w_i \sum_t \ell_i(z_t), \qquad z_t = f(h_t), \qquad
    \frac{\partial L}{\partial h_t} = \Bigl(\frac{\partial f}{\partial h_t}\Bigr)^{\!\top}
    \sum_i w_i \frac{\partial \ell_i}{\partial z_t}

The backward pass then needs only :math:`\partial L / \partial h`, [n, d].

Symbols: t one of n counted positions, h inputs of the head, f the head with any scaling or capping of its output,
z logits, :math:`\ell_i` criteria, w their weights, b windows per batch, s tokens per window, d model width,
v vocabulary size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from plprune.architecture.modules import replaced_forwards
from plprune.architecture.wrappers import text_config
from plprune.io.text import IGNORED


def top_k_log_probs(
    logits: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor]:  # [..., v] -> [..., k + 1], [..., k]
    """The log-probabilities of the `top_k` likeliest tokens and, last, of all other tokens together; and the tokens.

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
    theirs = values.float().log_softmax(-1)  # stored values are rounded, so they are normalised again
    return _Divergence.apply(logits, theirs, tokens.long(), temperature)  # type: ignore[no-any-return]


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:  # [b, s, v], [b, s]
    """Cross-entropy of each label given the tokens before it; labels of -100 do not count.

    Example:
        >>> next_token_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 3]])).exp()
        tensor(4.)
    """
    logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
    return nn.functional.cross_entropy(logits, labels, reduction=reduction)


# Bytes of float32 logits per chunk. On a CPU, malloc reuses at most 32 MB, and new pages are slow.
CHUNK_BYTES, CHUNK_BYTES_ON_CPU = 1 << 28, 3 << 23
LEAST_ROWS = 64  # per chunk, as each chunk reads all weights of the head
Criterion = Callable[[Tensor, slice], Tensor]  # logits [r, v] and their slice of all positions -> sum of losses


@dataclass(frozen=True)
class HeadInputs:
    """The inputs of a model's head at the counted positions."""

    values: Tensor  # [n, d]
    head: Callable[[Tensor], Tensor]  # [r, d] -> [r, v], by the model's own code, which may scale or cap logits
    trained: list[nn.Parameter]  # the trainable parameters of the head
    rows: int  # per chunk
    unequal_loads: Tensor | None = None  # [], the loss of a mixture's routers, if the config asks for it

    def logits(self) -> Iterator[tuple[Tensor, slice]]:
        """Yields the logits chunk by chunk, each with its slice of the positions."""
        for where in self.chunks():
            yield self.head(self.values[where]), where

    def chunks(self) -> list[slice]:
        """The slices of the positions; without positions, one empty slice."""
        return [slice(start, start + self.rows) for start in range(0, max(1, len(self.values)), self.rows)]


def rows_per_chunk(vocabulary: int, on_cpu: bool) -> int:
    """The number of positions per chunk of logits."""
    return max(LEAST_ROWS, (CHUNK_BYTES_ON_CPU if on_cpu else CHUNK_BYTES) // (4 * vocabulary))


def counted_positions(labels: Tensor) -> Tensor:  # [b, s] -> [n]
    """Indices into the flattened windows of the positions whose next token counts. Synchronises a GPU.

    Example:
        >>> counted_positions(torch.tensor([[5, 6, 7], [5, -100, 7]]))
        tensor([0, 1, 4])
    """
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero().squeeze(1)


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a batch that are passed to the model; position ids exist if documents are masked separately."""
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


def head_inputs(model: PreTrainedModel, given: dict[str, Tensor], positions: Tensor, whole: bool = True) -> HeadInputs:
    """Runs a model up to its head.

    Args:
        model: The model.
        given: Its :func:`model_inputs`, [b, s] each.
        positions: The :func:`counted_positions`.
        whole: Whether this process holds the whole head. With a shard, the model must be called as a whole: its logits
            are then computed at once, in its dtype, and returned as inputs of an identity head.
    """
    rows = rows_per_chunk(text_config(model.config).vocab_size, positions.device.type == "cpu")
    if not whole:
        result = model(**given, use_cache=False)
        logits, loads = result.logits.flatten(0, 1).index_select(0, positions), getattr(result, "aux_loss", None)
        return HeadInputs(logits, lambda values: values, [], rows, loads)
    base = model.get_decoder()  # the part of the model before its head
    output = base(**given, use_cache=False)
    states = output.last_hidden_state.flatten(0, 1)

    def after_base(values: Tensor, **others: Any) -> Any:
        replaced = type(output)(last_hidden_state=values[None], **others)
        with replaced_forwards([base], [lambda *_, **__: replaced]):
            return model(**given, use_cache=False)

    def head(values: Tensor) -> Tensor:
        return after_base(values).logits.flatten(0, 1)

    trained = [p for p in cast(nn.Module, model.get_output_embeddings()).parameters() if p.requires_grad]
    loads, routed = None, getattr(output, "router_logits", None)
    if routed:
        loads = getattr(after_base(states[:1].detach(), router_logits=routed), "aux_loss", None)
    return HeadInputs(states.index_select(0, positions), head, trained, rows, loads)


def weighted_loss(
    states: HeadInputs, criteria: Sequence[Criterion], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:  # [], [losses]
    """Sums criteria over all positions.

    Returns:
        Their weighted sum, and the sum of each criterion without a gradient.
    """
    return _WeightedLoss.apply(states.values, states, criteria, weights, *states.trained)  # type: ignore[no-any-return]


def next_token_criterion(labels: Tensor, positions: Tensor) -> Criterion:  # [b, s], [n]
    """A criterion for :func:`weighted_loss`: the cross-entropy of the next tokens, summed."""
    following = labels.flatten()[positions + 1]
    return lambda logits, where: _CrossEntropy.apply(logits, following[where, None])  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    """The cross-entropy of logits [r, v] and labels [r, 1] in float32, summed.

    The gradient overwrites the saved log-probabilities; torch's cross-entropy allocates two more tensors of this size.
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
        gradient = logs.exp_().mul_(scale).scatter_add_(1, labels, -scale.expand(labels.shape))
        return gradient.to(ctx.dtype), None


class _Divergence(torch.autograd.Function):
    """:func:`divergence`, with log-probabilities that are normalised.

    One copy of the logits is made. It becomes the exponentials of the tokens that the teacher pools, and then the
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, theirs: Tensor, index: Tensor, temperature: float) -> Tensor:
        others = logits.float() / temperature
        ours, total = others.gather(-1, index), None
        if theirs.shape[-1] > index.shape[-1]:
            others.scatter_(-1, index, -torch.inf)
            largest = others.amax(-1, keepdim=True)
            total = others.sub_(largest).exp_().sum(-1, keepdim=True)
            ours = torch.cat([ours, largest + total.log()], -1)
        logs = ours.log_softmax(-1)
        ctx.save_for_backward(others, logs.exp() - theirs.exp(), index, total)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return temperature**2 * nn.functional.kl_div(logs, theirs, log_target=True, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, of_events, index, total = ctx.saved_tensors
        of_events = of_events * (scale * ctx.temperature)
        if total is not None:
            gradient.mul_(of_events[..., -1:] / total)
        return gradient.scatter_(-1, index, of_events[..., : index.shape[-1]]).to(ctx.dtype), None, None, None


class _WeightedLoss(torch.autograd.Function):
    """:func:`weighted_loss`, with the gradient computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        states: HeadInputs,
        criteria: Sequence[Criterion],
        weights: Sequence[float],
        *trained: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        sums, gradients = torch.zeros(len(criteria), device=values.device), [torch.zeros_like(p) for p in trained]
        gradient = torch.empty_like(values)
        for where in states.chunks():
            with torch.set_grad_enabled(wanted):
                chunk = values[where].detach().requires_grad_(wanted)
                logits = states.head(chunk)
                losses = torch.stack([criterion(logits, where) for criterion in criteria])
                total = _weighted_sum(losses, weights)
            sums += losses.detach()
            if wanted:
                gradient[where], *head_gradients = torch.autograd.grad(total, [chunk, *trained])
                for total_gradient, head_gradient in zip(gradients, head_gradients, strict=True):
                    total_gradient += head_gradient
        ctx.save_for_backward(gradient, *gradients)
        ctx.mark_non_differentiable(sums)
        return _weighted_sum(sums, weights), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *gradients = (each * scale for each in ctx.saved_tensors)
        return gradient, None, None, None, *gradients


def _weighted_sum(sums: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([weight * each for each, weight in zip(sums, weights, strict=True)]).sum()
