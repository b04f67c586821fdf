"""Shows what each expert of a mixture sees: its tokens, their routing weights, its inner activations and its outputs.

It also multiplies inner activations, or whole experts, by gates. An implementation of experts of our own is registered
with transformers, and chosen by the config for the duration of a context. Experts with fewer than `FEW` tokens say
little.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from plprune.io.distributed import ProcessGroup, all_reduce_sum
from plprune.pruning.statistics import HoldoutGram, Stateful, Statistic

FEW = 8  # tokens
NAME = "plprune"

# expert, rows of its tokens [n], routing weights [n], inner activations [n, channels], outputs before them [n, d]
Watcher = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
_WATCHERS: WeakKeyDictionary[nn.Module, Watcher] = WeakKeyDictionary()
_GATES: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # [experts, channels] each
_WHOLE: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # [experts] each


class ExpertStatistic(Stateful):
    """A running statistic of the experts of one block."""

    @abstractmethod
    def update(self, expert: int, tokens: Tensor, weights: Tensor, inner: Tensor, outputs: Tensor) -> None:
        """Adds the tokens of one expert.

        Args:
            expert: Its index.
            tokens: Rows of its tokens among all tokens, [n].
            weights: Their routing weights, [n].
            inner: The inputs of its last projection, [n, channels].
            outputs: What it computes, before the routing weights, [n, d].
        """


class Saliency(ExpertStatistic):
    r"""The mean over an expert's tokens of their routing weight times the norm of its output (REAP), and their number.

    .. math:: S_e = \frac{1}{|T_e|} \sum_{t \in T_e} g_e(x_t) \, \lVert f_e(x_t) \rVert_2

    Args:
        experts: How many there are.

    Example:
        >>> s = Saliency(2)
        >>> s.update(1, torch.tensor([0, 3]), torch.tensor([0.5, 1.0]), torch.zeros(2, 1), torch.tensor([[4.0], [3.0]]))
        >>> s.tokens, s.mean
        (tensor([0, 2]), tensor([0.0000, 2.5000], dtype=torch.float64))
    """

    state_fields = ("tokens", "_sum")

    def __init__(self, experts: int) -> None:
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        self._sum = torch.zeros(experts, dtype=torch.float64)

    def update(self, expert: int, tokens: Tensor, weights: Tensor, inner: Tensor, outputs: Tensor) -> None:
        norms = torch.linalg.vector_norm(outputs, dim=1, dtype=torch.float64)
        self.tokens[expert] += len(tokens)
        self._sum[expert] += (weights.double() * norms).sum().cpu()

    def merge(self, group: ProcessGroup) -> None:
        self.tokens, self._sum = all_reduce_sum(self.tokens, group), all_reduce_sum(self._sum, group)

    @property
    def mean(self) -> Tensor:  # [experts]
        """The saliency of each expert; 0 without tokens."""
        return self._sum / self.tokens.clamp(min=1)


class PerExpert(ExpertStatistic):
    """A statistic of the inner activations of each expert, over its own tokens.

    Args:
        experts: How many there are.
        channels: Of each.
        statistic: Makes an empty one.
        expected: How large each channel should be by its weights, [experts, channels]; by default all alike.
    """

    def __init__(
        self, experts: int, channels: int, statistic: Callable[[], Statistic], expected: Tensor | None = None
    ) -> None:
        self.parts = [statistic() for _ in range(experts)]
        self.expected = torch.ones(experts, channels, dtype=torch.float64) if expected is None else expected
        self.saliency = Saliency(experts)
        self.length = 1  # tokens of a sample
        self._sample = self._next = getattr(self.parts[0], "next", 0)  # the first sample of this batch and of the next

    def state_dict(self) -> dict[str, Any]:
        return {"saliency": self.saliency.state_dict(), "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saliency.load_state_dict(state["saliency"])
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)

    def begin(self, samples: int, length: int) -> None:
        """Announces a batch of some samples of some tokens."""
        self.length, self._sample, self._next = length, self._next, self._next + samples

    def update(self, expert: int, tokens: Tensor, weights: Tensor, inner: Tensor, outputs: Tensor) -> None:
        self.saliency.update(expert, tokens, weights, inner, outputs)
        counts, part = torch.bincount(tokens // self.length).tolist(), self.parts[expert]
        samples = [i for i, n in enumerate(counts) if n]
        for i, own in zip(samples, inner.split([counts[i] for i in samples]), strict=True):
            if isinstance(part, HoldoutGram):  # holds out the same samples for all experts
                part.next = self._sample + i
            part.update(own[None])  # samples stay apart, so that batches do not matter

    def merge(self, group: ProcessGroup) -> None:
        self.saliency.merge(group)
        for part, tokens in zip(self.parts, self.tokens, strict=True):
            if tokens:
                part.merge(group)

    @property
    def tokens(self) -> list[int]:
        """How many tokens each expert has seen."""
        return self.saliency.tokens.tolist()

    @property
    def few(self) -> list[int]:
        """The experts with too few tokens for statistics."""
        return [expert for expert, tokens in enumerate(self.tokens) if tokens < FEW]

    def stacked(self, read: Callable[[Any], Tensor]) -> Tensor:  # [experts, channels]
        """A value of each channel; for experts with few tokens the mean of all others, as weights scale it."""
        few = set(self.few)
        known = {e: read(part).double().cpu() for e, part in enumerate(self.parts) if e not in few}
        usual = torch.stack([*known.values()]).mean() if known else torch.ones((), dtype=torch.float64)
        return torch.stack([known.get(e, usual * expected) for e, expected in enumerate(self.expected)])


def watched(experts: nn.Module, watcher: Watcher) -> contextlib.AbstractContextManager[None]:
    """Shows a watcher what experts see, for the duration of the context."""
    return _held(_WATCHERS, experts, watcher)


def gated(experts: nn.Module, gates: Tensor) -> contextlib.AbstractContextManager[None]:
    """Multiplies experts by gates for the duration of the context.

    Args:
        experts: The module of all.
        gates: Of inner activations, [experts, channels], or of what each expert adds, [experts].
    """
    return _held(_GATES if gates.ndim == 2 else _WHOLE, experts, gates)


@contextlib.contextmanager
def _held(held: WeakKeyDictionary[nn.Module, Any], experts: nn.Module, value: Any) -> Iterator[None]:
    """Chooses our implementation, which looks up the value, for the duration of the context."""
    config: Any = experts.config
    before, held[experts] = config._experts_implementation, value
    config._experts_implementation = NAME
    try:
        yield
    finally:
        config._experts_implementation = before
        del held[experts]


def _run(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Runs experts one by one: [n, d] hidden states, [n, k] experts of each token, and [n, k] routing weights."""
    order = index.flatten().argsort(stable=True)
    tokens, scales = order // index.shape[1], weights.flatten()[order]
    counts = torch.bincount(index.flatten(), minlength=experts.num_experts)[: experts.num_experts].tolist()
    output, start = torch.zeros_like(hidden), 0
    watcher, gates, whole = _WATCHERS.get(experts), _GATES.get(experts), _WHOLE.get(experts)
    for expert, count in enumerate(counts):
        rows, scale = tokens[start : start + count], scales[start : start + count]
        start += count
        if count:
            inner = _inner(experts, expert, hidden[rows])
            if gates is not None:
                inner = inner * gates[expert].to(inner.dtype)
            outputs = _linear(experts, "down_proj", expert, inner)
            if experts.has_post_expert_norm:
                outputs = experts.post_expert_norm(outputs)
            if whole is not None:
                outputs = outputs * whole[expert].to(outputs.dtype)
            if watcher is not None:
                watcher(expert, rows, scale, inner, outputs)
            output.index_add_(0, rows, (outputs * scale[:, None]).to(output.dtype))
    return output


def _inner(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    if experts.has_gate:
        return experts._apply_gate(_linear(experts, "gate_up_proj", expert, hidden))
    return experts.act_fn(_linear(experts, "up_proj", expert, hidden))


def _linear(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(x, weight.T if experts.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(NAME, _run)
