"""Runs a model's blocks one by one, with the arguments that the model itself passes.

To record these arguments, the model runs once per batch with blocks that return their input unchanged.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.architecture.modeling_plprune import returned
from plprune.architecture.modules import lacks_weights, passing, replaced_forwards
from plprune.architecture.wrappers import text_config
from plprune.io import distributed
from plprune.pruning.hidden_states import HiddenStates, MemoryStates
from plprune.pruning.journal import NotFinite
from plprune.pruning.statistics import BlockInfluence, Stateful, Statistic

S = TypeVar("S", bound=Statistic)
DOCUMENTS = ((3, 8), (8, 16))  # ranges of token ids: two documents of different lengths


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, except its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: tuple[int, ...] = ()  # samples, and tokens of each

    def to(self, device: torch.device) -> "Call":
        return Call(_move(self.args, device), _move(self.kwargs, device), self.batch)


class BlockInputs:
    """The inputs of one block for all batches, and its outputs once it has run.

    Args:
        block: The block.
        hidden: The hidden states that enter it, [b, s, d] each.
        calls: Its other arguments, one call per batch.
        device: The device that it runs on.
        states: Makes an empty collection for its outputs.
        group: The processes that share the batches.
        dense: The hidden states that enter the block in the dense model, if they are followed too.
    """

    pruned = False  # whether an interrupted run has already pruned the block
    batch: tuple[int, ...] = ()  # samples and tokens of the batch that runs; nothing before any does

    def __init__(
        self,
        block: Block,
        hidden: Sequence[Tensor],
        calls: list[Call],
        device: torch.device,
        states: Callable[[], HiddenStates],
        group: distributed.ProcessGroup = None,
        dense: Sequence[Tensor] = (),
    ) -> None:
        self.block, self.hidden, self.calls, self.dense = block, hidden, calls, dense
        self.device, self.states, self.group = device, states, group
        self.influence = BlockInfluence()
        self.observed: list[Mapping[str, Stateful]] = []  # statistics by consumer, for each observation
        self.targets = states() if dense else MemoryStates(device)  # what leaves the block in the dense model
        self._outputs: HiddenStates | None = None
        self._weights: dict[str, Tensor] = {}  # checksums of the weights that produced the outputs

    def known(
        self, groups: list[UnitGroup], statistic: Callable[[], S], of_experts: Stateful | None = None
    ) -> list[tuple[UnitGroup, S]] | None:
        """Returns the groups' statistics if they are known without running the block, else None.

        Args:
            groups: The groups.
            statistic: Makes an empty statistic.
            of_experts: An empty statistic of the block's experts, which is filled too.
        """
        return None

    @torch.no_grad()
    def run(self, influence: BlockInfluence | None = None) -> None:
        """Runs the block on every batch and keeps the outputs."""
        if self._outputs is not None:
            self._outputs.discard()
        self._outputs, self._weights = self.states(), checksums(self.block.module)
        sums = []  # checked once at the end, as a check synchronises the GPU
        for hidden, call in zip(self.hidden, self.calls, strict=True):
            x, self.batch = hidden.to(self.device), call.batch
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

    @torch.no_grad()
    def aim(self) -> None:
        """Runs the block, not yet pruned, on the dense model's hidden states; the results are its targets."""
        for hidden, call in zip(self.dense, self.calls, strict=True):
            self.targets.append(run_block(self.block, hidden.to(self.device), call.to(self.device)))

    def outputs(self) -> HiddenStates:
        """Returns the outputs of the block with its current weights, and runs it again only if these have changed."""
        if self._outputs is None or not same_values(checksums(self.block.module), self._weights):
            self.observed.clear()
            self.run()
        assert self._outputs is not None
        return self._outputs


def check_ids(
    model: PreTrainedModel, batches: Iterable[Tensor], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raises ValueError if the model's embedding has no row for a token id, as with another model's tokenizer."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    beyond = sorted({int(i) for ids in batches if ids.numel() and ids.max() >= rows for i in ids[ids >= rows].unique()})
    if beyond:
        some = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" if tokenizer else str(i) for i in beyond[:5]]
        more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        raise ValueError(
            f"the text has tokens that the embedding, of {rows} rows, has none for: {', '.join(some)}{more}; use the "
            "model's own tokenizer, or enlarge the embedding by model.resize_token_embeddings"
        )


def check_masking(model: PreTrainedModel) -> None:
    """Checks on an example that no token attends to another document when positions restart at each document.

    Only the first process runs the check, as the others may not have the weights.

    Raises:
        ValueError: The logits of two documents in one window differ from those of each document alone.
    """
    gap = distributed.broadcast_object(None if lacks_weights(model) else _document_leakage(model), distributed.world())
    if gap is not None and not gap <= (1e-3 if model.dtype == torch.float32 else 0.06):
        raise ValueError(
            f"{type(model).__name__} does not separate the documents of a window (their logits differ from those of "
            f"each document alone by {gap:.2g} of the largest logit): leave out data.intra_document_masking"
        )


@torch.no_grad()
def _document_leakage(model: PreTrainedModel) -> float:
    """The largest difference between logits of packed and of separate documents, relative to the largest logit."""
    vocabulary = text_config(model.config).vocab_size
    first, second = (torch.arange(*ids)[None].to(model.device) % vocabulary for ids in DOCUMENTS)
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
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: check_ids(model, ids[:1], tokenizer))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def record_inputs(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Call]]:  # ids: [b, s]
    """Returns the hidden states that enter the first block, and the other arguments of each block."""
    first: list[Tensor] = []
    calls: list[Call] = []
    blocks = blocks_of(model)
    check_ids(model, [ids])

    def transparent(*args: Any, **kwargs: Any) -> Any:
        hidden, call = split_call(args, kwargs)
        first.append(hidden)
        calls.append(Call(call.args, call.kwargs, tuple(ids.shape)))
        if len(calls) == len(blocks):
            raise _Stop
        return returned(hidden, blocks[len(calls) - 1].anatomy.returned)

    with replaced_forwards([b.module for b in blocks], [transparent] * len(blocks)), contextlib.suppress(_Stop):
        model(input_ids=ids.to(model.device), use_cache=False)
    return first[0], calls


@torch.no_grad()
def logits_from(
    model: PreTrainedModel, ids: Tensor, hidden: Tensor
) -> Tensor:  # [b, s], [b, s, d] -> [b, s, vocabulary]
    """Computes the logits from the last block's output, by the model's own code."""
    with after_blocks(model, hidden):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def after_blocks(model: PreTrainedModel, hidden: Tensor) -> contextlib.AbstractContextManager[None]:  # [b, s, d]
    """Within the context, the model runs no block: `hidden` is what the last one returns."""
    blocks = blocks_of(model)
    forwards: list[Callable[..., Any]] = [passing(block.anatomy.returned) for block in blocks[:-1]]
    forwards.append(lambda *_, **__: returned(hidden, blocks[-1].anatomy.returned))
    return replaced_forwards([block.module for block in blocks], forwards)


def run_block(block: Block, hidden: Tensor, call: Call) -> Tensor:  # [b, s, d] -> [b, s, d]
    """Calls one block as the model would."""
    output = block.module(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple | list) else output


def checksums(module: nn.Module) -> dict[str, Tensor]:
    """Checksums of each parameter: sums of its bits over rows and over columns, small and fast to compute."""
    return {name: _sums(p.detach()) for name, p in module.named_parameters()}


def same_values(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two results of :func:`checksums` are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _sums(values: Tensor) -> Tensor:
    values = values.flatten(0, -2) if values.ndim > 2 else values  # the stacked weights of experts
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


class _Stop(Exception):
    """Ends a forward pass once all blocks have been called."""


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Splits a block's arguments into its hidden states and the other arguments."""
    if args:
        return args[0], Call(args[1:], kwargs)
    return kwargs["hidden_states"], Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_move(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _move(v, device) for k, v in value.items()}
    return value
