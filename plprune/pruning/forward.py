"""Running a model's blocks one by one, each on what the model itself passes it.

Nothing is guessed: the model is run once per batch with its blocks made transparent, what it passes to each of them
is recorded, and the blocks are then called with just that.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.architecture.modules import lacks_weights
from plprune.io import distributed
from plprune.pruning.journal import DiskStates, NotFinite
from plprune.pruning.statistics import BlockInfluence, Statistic

S = TypeVar("S", bound=Statistic)
PAIR = ((3, 8), (8, 16))  # token ids of two documents, of unlike length


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> "Call":
        return Call(_move(self.args, device), _move(self.kwargs, device))


class MemoryStates(list[Tensor]):
    """Hidden states in memory, on one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def append(self, hidden: Tensor) -> None:
        super().append(hidden.to(self.device))

    def discard(self) -> None:
        """Does nothing: there are no files to delete."""


class BlockInputs:
    """The inputs of one block for all batches; after :func:`observe` also its outputs.

    Args:
        block: The block.
        hidden: The hidden states that enter it, [b, s, d] each.
        calls: The other arguments, for each batch.
        device: The device that it runs on.
        states: Makes an empty collection for its outputs.
        group: Processes that share the batches.
    """

    decided = False  # whether an earlier run has already pruned the block

    def __init__(
        self,
        block: Block,
        hidden: Sequence[Tensor],
        calls: list[Call],
        device: torch.device,
        states: Callable[[], MemoryStates | DiskStates],
        group: distributed.ProcessGroup = None,
    ) -> None:
        self.block, self.hidden, self.calls = block, hidden, calls
        self.device, self.states, self.group = device, states, group
        self.influence = BlockInfluence()
        self.observed: list[Mapping[str, Statistic]] = []  # statistics by consumer, for each observation
        self._outputs: MemoryStates | DiskStates | None = None
        self._weights: dict[str, Tensor] = {}  # checksums of the weights that made the outputs

    def known(self, groups: list[UnitGroup], statistic: Callable[[], S]) -> list[tuple[UnitGroup, S]] | None:
        """The groups' statistics, if they are known without running the block; else None."""
        return None

    @torch.no_grad()
    def run(self, influence: BlockInfluence | None = None) -> None:
        """Runs the block on every batch and keeps the outputs."""
        if self._outputs is not None:
            self._outputs.discard()
        self._outputs, self._weights = self.states(), checksums(self.block.module)
        sums = []  # looked at once, as a look waits for a GPU
        for hidden, call in zip(self.hidden, self.calls, strict=True):
            x = hidden.to(self.device)
            y = run_block(self.block, x, call.to(self.device))
            sums.append(y.sum(dtype=torch.float32))
            if influence is not None:
                influence.update(x, y)
            self._outputs.append(y)
        if sums and not torch.stack(sums).isfinite().all():
            raise NotFinite(
                f"NaN or infinity in the activations of block {self.block.index}: load the model in float32 or "
                "bfloat16, and check its weights"
            )

    def outputs(self) -> "MemoryStates | DiskStates":
        """The outputs of the block as it is now; it runs again only if its weights have changed since it last ran."""
        if self._outputs is None or not same_values(checksums(self.block.module), self._weights):
            self.observed.clear()
            self.run()
        assert self._outputs is not None
        return self._outputs


def check_ids(
    model: PreTrainedModel, batches: Iterable[Tensor], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raises ValueError if a token id has no row in the model's embedding, as with the tokenizer of another model."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    beyond = sorted({int(i) for ids in batches if ids.numel() and ids.max() >= rows for i in ids[ids >= rows].unique()})
    if beyond:
        some = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" if tokenizer else str(i) for i in beyond[:5]]
        more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        raise ValueError(
            f"the text has tokens that the embedding, of {rows} rows, has none for: {', '.join(some)}{more}; use the "
            "model's own tokenizer, or make the embedding larger by model.resize_token_embeddings"
        )


def check_masking(model: PreTrainedModel) -> None:
    """Checks on an example that tokens attend only to their own document when positions restart at each document.

    Of several processes only the first runs it, as the others may not have the weights.

    Raises:
        ValueError: The logits of two documents in one window differ from those of each document alone.
    """
    gap = distributed.broadcast_object(None if lacks_weights(model) else _crossing(model), distributed.world())
    if gap is not None and not gap <= (1e-3 if model.dtype == torch.float32 else 0.06):
        raise ValueError(
            f"{type(model).__name__} does not keep documents of a window apart (logits differ by {gap:.2g} of the "
            "largest from those of each document alone): leave out data.intra_document_masking"
        )


@torch.no_grad()
def _crossing(model: PreTrainedModel) -> float:
    """The largest difference between logits of documents in a window and alone, over the largest logit; two orders."""
    first, second = (torch.arange(*each)[None].to(model.device) % cast(int, model.config.vocab_size) for each in PAIR)
    orders = [(first, second), (second, first)]
    ids = torch.cat([torch.cat(order, 1) for order in orders])
    positions = torch.cat([torch.cat([torch.arange(each.shape[1]) for each in order])[None] for order in orders])
    with evaluating(model):
        alone = {each: model(input_ids=each, use_cache=False).logits for each in (first, second)}
        packed = model(input_ids=ids, position_ids=positions.to(model.device), use_cache=False).logits
    expected = torch.cat([torch.cat([alone[each] for each in order], 1) for order in orders])
    return float((packed - expected).abs().max() / expected.abs().max())


@contextlib.contextmanager
def checking_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within the context, every call of the model checks its token ids by :func:`check_ids`."""
    look = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: check_ids(model, args[:1], tokenizer))
    try:
        yield
    finally:
        look.remove()


@torch.no_grad()
def record_inputs(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Call]]:  # ids: [b, s]
    """The hidden states that enter the first block, and the other arguments of each block."""
    first: list[Tensor] = []
    calls: list[Call] = []
    blocks = blocks_of(model)
    check_ids(model, [ids])

    def transparent(*args: Any, **kwargs: Any) -> Tensor:
        hidden, call = split_call(args, kwargs)
        first.append(hidden)
        calls.append(call)
        if len(calls) == len(blocks):
            raise _Enough
        return hidden

    with replaced_forwards([b.module for b in blocks], [transparent] * len(blocks)), contextlib.suppress(_Enough):
        model(input_ids=ids.to(model.device), use_cache=False)
    return first[0], calls


@torch.no_grad()
def logits_from(
    model: PreTrainedModel, ids: Tensor, hidden: Tensor
) -> Tensor:  # [b, s], [b, s, d] -> [b, s, vocabulary]
    """The logits that the model computes from the last block's output."""
    blocks = blocks_of(model)
    forwards = [lambda *a, **k: split_call(a, k)[0]] * (len(blocks) - 1) + [lambda *_, **__: hidden]
    with replaced_forwards([block.module for block in blocks], forwards):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def run_block(block: Block, hidden: Tensor, call: Call) -> Tensor:  # [b, s, d] -> [b, s, d]
    """Calls one block as the model would."""
    output = block.module(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def checksums(module: nn.Module) -> dict[str, Tensor]:
    """Checksums of each parameter: sums over its bits, by rows and by columns.

    In practice they differ whenever the values do; they are far smaller, and fast to compute.
    """
    return {name: _sums(p.detach()) for name, p in module.named_parameters()}


def same_values(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether the checksums of two modules are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _sums(values: Tensor) -> Tensor:
    if values.ndim != 2 or not values.is_contiguous() or values.shape[1] * values.element_size() % 8:
        return values.clone()
    bits = values.view(torch.int64)
    return torch.cat([bits.sum(0), bits.sum(1)])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode within the context."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Enough(Exception):
    """Ends a forward pass once all blocks have been called."""


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Splits a block's arguments into its hidden states and the others."""
    if args:
        return args[0], Call(args[1:], kwargs)
    return kwargs["hidden_states"], Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


@contextlib.contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replaces the modules' forward functions within the context."""
    own = [module.__dict__.get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        cast(Any, module).forward = forward
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                cast(Any, module).forward = forward


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_move(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _move(v, device) for k, v in value.items()}
    return value
