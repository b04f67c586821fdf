"""Running the decoder blocks one by one, each on the inputs that the model itself would give it.

Nothing is guessed: the model is run once per batch with its blocks made transparent, what it passes to each of them
is recorded, and the blocks are then called with just that. One block at a time needs to be on the accelerator.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from plprune.anatomy import Block, Group, blocks_of
from plprune.stats import BlockInfluence, Statistic

S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Calibration:
    """Calibration text, and where to compute.

    Args:
        batches: Token ids, one tensor [b, s] each, without padding.
        device: Where the current block runs; the model's own device if not given.
        offload: Whether hidden states wait on the CPU rather than on `device`.
    """

    batches: list[Tensor]
    device: torch.device | None = None
    offload: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    @classmethod
    def of(cls, batches: "Calibration | Iterable[Tensor]") -> "Calibration":
        """Any batches of token ids as a Calibration.

        Raises:
            ValueError: There are none, or they are not of shape [b, s].
        """
        calibration = batches if isinstance(batches, cls) else cls(list(batches))
        if not calibration.batches:
            raise ValueError("no calibration text: give at least one batch of token ids")
        if any(not isinstance(b, Tensor) or b.ndim != 2 or b.is_floating_point() for b in calibration.batches):
            raise ValueError("calibration batches must be integer tensors of shape [batch, seq_len]")
        return calibration

    def windows(self, count: int) -> list[Tensor]:  # [1, s] each
        """The first `count` windows, one by one."""
        return [ids[i : i + 1] for ids in self.batches for i in range(len(ids))][:count]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, its hidden states aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> "Call":
        return Call(_move(self.args, device), _move(self.kwargs, device))


class BlockInputs:
    """What enters one block, over all batches, and after :func:`observe` also what leaves it."""

    def __init__(
        self, block: Block, hidden: list[Tensor], calls: list[Call], device: torch.device, store: torch.device
    ):
        self.block, self.hidden, self.calls, self.device, self.store = block, hidden, calls, device, store
        self.influence = BlockInfluence()
        self._outputs: list[Tensor] = []
        self._weights: list[Tensor] = []  # copies of those that made the outputs

    @torch.no_grad()
    def run(self, influence: BlockInfluence | None = None) -> None:
        """Runs the block on every batch, and keeps the outputs."""
        self._outputs, self._weights = [], [p.detach().clone() for p in self.block.module.parameters()]
        for hidden, call in zip(self.hidden, self.calls, strict=True):
            x = hidden.to(self.device)
            y = run_block(self.block, x, call.to(self.device))
            if not torch.isfinite(y.sum(dtype=torch.float32)):
                raise ValueError(
                    f"NaN or infinity in the activations of block {self.block.index}: load the model in float32 or "
                    "bfloat16, and check its weights"
                )
            if influence is not None:
                influence.update(x, y)
            self._outputs.append(y.to(self.store))

    def outputs(self) -> list[Tensor]:
        """What leaves the block as it is now: it is run again only if its weights were changed since it last was."""
        now = list(self.block.module.parameters())  # compared by value: a change through `.data` leaves no other trace
        same = len(now) == len(self._weights) and all(map(torch.equal, now, self._weights))
        if not self._outputs or not same:
            self.run()
        return self._outputs


def stream(
    model: PreTrainedModel, batches: Calibration | Iterable[Tensor], title: str = "calibrating"
) -> Iterator[tuple[Block, BlockInputs]]:
    """The blocks in depth order, each with its inputs.

    The caller may change a block before it asks for the next one: what follows then sees the change.

    Args:
        model: A dense or pruned model.
        batches: Calibration token ids, [b, s] each.
        title: What the progress bar says.

    Raises:
        ValueError: Activations hold NaN or infinity; the message names the block.
    """
    calibration = Calibration.of(batches)
    device = calibration.device or model.device
    store = torch.device("cpu") if calibration.offload else device
    blocks = blocks_of(model)
    with evaluating(model), tqdm(total=len(blocks), desc=title, unit="block", disable=None) as bar:
        records = [record(model, ids) for ids in calibration]
        hidden = [first.to(store) for first, _ in records]
        for block in blocks:
            calls = [calls[block.index] for _, calls in records]
            inputs = BlockInputs(block, hidden, calls, device, store)
            with on_device(block.module, device):
                yield block, inputs
                if block is not blocks[-1]:
                    hidden = inputs.outputs()
            bar.update()


def observe(
    block: Block,
    inputs: BlockInputs,
    statistic: Callable[[], S],
    attention: Literal["kv_heads", "value_channels", "none"] = "kv_heads",
) -> list[tuple[Group, S]]:
    """Runs a block once over its inputs: every group with the statistic of its consumer's inputs.

    The same pass measures how far the block moves its hidden states (`inputs.influence`) and keeps its outputs.
    """
    groups = block.groups(attention)
    statistics = {group.consumer.path: statistic() for group in groups}
    shapes = iter(h.shape[:2] for h in inputs.hidden)  # some families flatten samples and tokens before the FFN
    shape = next(shapes)

    def hook(path: str) -> Callable[..., None]:
        return lambda _, args: statistics[path].update(args[0].reshape(*shape, -1))

    def advance(*_: Any) -> None:
        nonlocal shape
        shape = next(shapes, shape)

    handles = [block.part(path).register_forward_pre_hook(hook(path)) for path in statistics]
    handles.append(block.module.register_forward_hook(advance))
    inputs.influence = BlockInfluence()
    try:
        inputs.run(inputs.influence)
    finally:
        for handle in handles:
            handle.remove()
    return [(group, statistics[group.consumer.path]) for group in groups]


@torch.no_grad()
def record(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Call]]:  # ids: [b, s]
    """The first block's input, and what the model passes to each block besides."""
    first: list[Tensor] = []
    calls: list[Call] = []
    blocks = blocks_of(model)

    def transparent(*args: Any, **kwargs: Any) -> Tensor:
        hidden, call = _split(args, kwargs)
        first.append(hidden)
        calls.append(call)
        if len(calls) == len(blocks):
            raise _Enough
        return hidden

    with _standing_in(blocks, [transparent] * len(blocks)), contextlib.suppress(_Enough):
        model(input_ids=ids.to(model.device), use_cache=False)
    return first[0], calls


@torch.no_grad()
def finish(model: PreTrainedModel, ids: Tensor, hidden: Tensor) -> Tensor:  # [b, s], [b, s, d] -> [b, s, vocabulary]
    """The logits that the model makes of the last block's output."""
    blocks = blocks_of(model)
    forwards = [lambda *a, **k: _split(a, k)[0]] * (len(blocks) - 1) + [lambda *_, **__: hidden]
    with _standing_in(blocks, forwards):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def run_block(block: Block, hidden: Tensor, call: Call) -> Tensor:  # [b, s, d] -> [b, s, d]
    """Calls one block as the model would."""
    output = block.module(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device`, for the time of the context."""
    home = next(module.parameters()).device
    if home == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, for the time of the context."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Enough(Exception):
    """All blocks have been called."""


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    return kwargs["hidden_states"], Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


@contextlib.contextmanager
def _standing_in(blocks: list[Block], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Other forward functions in the place of the blocks' own, for the time of the context."""
    own = [block.module.__dict__.get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        cast(Any, block.module).forward = forward
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.module.forward
            if forward is not None:
                cast(Any, block.module).forward = forward


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_move(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _move(v, device) for k, v in value.items()}
    return value
