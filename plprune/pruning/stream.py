"""Calibration: a walk over the decoder blocks in depth order, each with the inputs that the model would give it.

One block at a time needs to be on the accelerator. What an earlier run has behind it is taken from its journal, and
what is already known of a text is not observed again.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import Attention, Block, Group, blocks_of
from plprune.io import distributed
from plprune.io.progress import Progress
from plprune.pruning.forward import BlockInputs, Call, Held, evaluating, record, same_values, split_call, summary
from plprune.pruning.journal import Filed, Past, Walk, journal_of
from plprune.pruning.plan import fingerprint
from plprune.pruning.statistics import BlockInfluence, Statistic
from plprune.pruning.surgery import replay

S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Calibration:
    """Calibration text, and where to compute.

    Args:
        batches: Token ids, one tensor [b, s] each, without padding.
        device: Where the current block runs; the model's own device if not given.
        offload: Where hidden states wait: in the CPU's memory, on disk (only if the model streams from there), or on
            `device` if not given.
        group: Processes that share the work, each with the whole text and the whole model; None if there is only one.
        known: What `plprune.pruning.observations` has observed before; used if it is of the same text and model.
    """

    batches: list[Tensor]
    device: torch.device | None = None
    offload: Literal["cpu", "disk"] | None = None
    group: distributed.Group = None
    known: "Observations | None" = None

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
        return self._windows()[:count]

    def share(self) -> list[Tensor]:  # [b, s] each
        """The batches of this process, which may have none."""
        if self.group is None:
            return self.batches
        size = max(len(ids) for ids in self.batches)
        mine = distributed.share(self._windows(), self.group)
        alike = [list(run) for _, run in itertools.groupby(mine, lambda ids: ids.shape[1])]
        return [torch.cat(run[i : i + size]) for run in alike for i in range(0, len(run), size)]

    @property
    def first(self) -> int:
        """Which of all windows is the first of this process."""
        return next(iter(distributed.share(range(len(self._windows())), self.group)), 0)

    @property
    def fingerprint(self) -> str:
        """A hash of the windows, whatever the size of the batches."""
        ids, lengths = [ids.flatten() for ids in self], [ids.shape[1] for ids in self for _ in ids]
        return fingerprint([("ids", torch.cat(ids).cpu()), ("lengths", torch.tensor(lengths))], values=1 << 30)

    def _windows(self) -> list[Tensor]:  # [1, s] each
        return [ids[i : i + 1] for ids in self.batches for i in range(len(ids))]


@dataclass(frozen=True)
class Observed:
    """What was observed of one block.

    Args:
        influence: How far it moves its hidden states.
        statistics: By the path of the consumer, and the name of the statistic's class.
    """

    influence: BlockInfluence
    statistics: dict[str, dict[str, Statistic]]


@dataclass(frozen=True)
class Observations:
    """What was observed of a model on a text: any number of prunings can be decided by it, and need no forward pass.

    Args:
        weights: Fingerprint of the model.
        text: Fingerprint of the text.
        blocks: What was observed of each block.
    """

    weights: str
    text: str
    blocks: list[Observed]

    def are_of(self, model: PreTrainedModel, calibration: Calibration) -> bool:
        """Whether they were made of this model as it is, and of this text."""
        return self.text == calibration.fingerprint and self.weights == fingerprint(model.named_parameters())


class Replay(BlockInputs):
    """Stands for a block that an earlier run has behind it: gives back what was observed there, and runs nothing.

    Args:
        block: The block.
        past: What is known of it.
        device: Where it would run.
    """

    def __init__(self, block: Block, past: Past, device: torch.device) -> None:
        self.block, self.device, self.group = block, device, None
        self.influence = BlockInfluence()
        self.influence.load_state_dict(past.influence)
        self.decided = past.observed is None
        self._observed = iter(past.observed or [])

    def __getattr__(self, name: str) -> Any:
        raise ValueError(
            f"`{name}` of block {self.block.index} is not kept: a method that looks at more than what `observe` gives "
            "cannot go on after a stop; start again by --overwrite without --resume"
        )

    def again(self, groups: list[Group], statistic: Callable[[], S]) -> list[tuple[Group, S]]:
        """What the next observation gave; nothing if the block was pruned then, and its decisions are known."""
        if self.decided:
            return []
        kept, statistics = next(self._observed), {group.consumer.path: statistic() for group in groups}
        for path, state in kept.items():
            statistics[path].load_state_dict(state)
        return [(group, statistics[group.consumer.path]) for group in groups]


class Recalled(BlockInputs):
    """The inputs of a block of which much is known: the blocks before it are run only if something else is asked for.

    Args:
        block: The block.
        known: What was observed of it.
        feed: Makes what enters it.
    """

    def __init__(self, block: Block, known: Observed, feed: "Feed") -> None:
        self.block, self.known, self.feed, self.before = block, known, feed, summary(block.module)
        self.device, self.states, self.group = feed.device, feed.states, feed.calibration.group
        self.influence, self.observed = known.influence, []
        self._outputs, self._weights = None, {}

    @cached_property
    def hidden(self) -> Sequence[Tensor]:
        return self.feed.entering(self.block)

    @cached_property
    def calls(self) -> list[Call]:
        return [calls[self.block.index] for calls in self.feed.calls]

    @property
    def ran(self) -> bool:
        """Whether the block was run, as what was asked for is not known."""
        return self._outputs is not None

    @property
    def changed(self) -> bool:
        """Whether the block is another than was observed."""
        return not same_values(summary(self.block.module), self.before)

    def recall(self, groups: list[Group], statistic: Callable[[], S]) -> list[tuple[Group, S]] | None:
        """The groups with a statistic of a known class; None if one is not known, or the block was changed."""
        name = getattr(statistic, "__name__", "")
        found = [self.known.statistics.get(group.consumer.path, {}).get(name) for group in groups]
        if any(type(each) is not statistic for each in found) or self.changed:
            return None
        return [(group, cast(S, deepcopy(each))) for group, each in zip(groups, found, strict=True)]


class Feed:
    """What enters the blocks of a walk that may not need it.

    Args:
        model: The model.
        calibration: The text.
        device: Where blocks run.
        states: Makes an empty collection of hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        device: torch.device,
        states: Callable[[], Held | Filed],
    ) -> None:
        self.model, self.calibration, self.device, self.states = model, calibration, device, states

    @cached_property
    def calls(self) -> list[list[Call]]:
        self._first = self.states()
        return list(_enter(self.model, self.calibration, self._first))

    def entering(self, block: Block) -> Held | Filed:
        """What enters a block, made by running all before it."""
        calls, group = self.calls, self.calibration.group
        hidden = self._first
        for before in blocks_of(self.model)[: block.index]:
            own = [each[before.index] for each in calls]
            with before.present(self.device):
                hidden = BlockInputs(before, hidden, own, self.device, self.states, group).outputs()
        return hidden


def stream(
    model: PreTrainedModel, batches: Calibration | Iterable[Tensor], title: str = "calibrating"
) -> Iterator[tuple[Block, BlockInputs]]:
    """The blocks in depth order, each with its inputs.

    The caller may change a block before it asks for the next one: what follows then sees the change. If the model has a
    journal, what is known of a block is kept there once the caller asks for the next one.

    Args:
        model: A dense or pruned model.
        batches: Calibration token ids, [b, s] each.
        title: What the progress bar says.

    Raises:
        ValueError: Activations hold NaN or infinity; the message names the block.
    """
    calibration = Calibration.of(batches)
    device, states = calibration.device or model.device, _states(model, calibration)
    blocks, walk = blocks_of(model), _walk(model, calibration)
    done = walk.done if walk else 0
    quiet = distributed.rank(calibration.group) > 0
    walking = walk or contextlib.nullcontext()
    with evaluating(model), walking, Progress(len(blocks), title, "block", done, quiet) as bar:
        for block in blocks[:done]:
            yield from _again(model, block, cast(Walk, walk), device)
        if walk is None and calibration.known and calibration.known.are_of(model, calibration):
            done, hidden, calls = yield from _recalled(calibration.known, Feed(model, calibration, device, states), bar)
        else:
            hidden = walk.entering() if walk and done else states()
            calls = list(_enter(model, calibration, None if done else hidden)) if done < len(blocks) else []
        for block in blocks[done:]:
            inputs = BlockInputs(block, hidden, [c[block.index] for c in calls], device, states, calibration.group)
            version = block.home.version if block.home else 0
            with block.present(device):
                yield block, inputs
                leaving = inputs.outputs() if block is not blocks[-1] else None
            if walk:
                walk.commit(_past(block, inputs, version), leaving)
                hidden.discard()
            bar.update()
            if leaving is not None:
                hidden = leaving


def observe(
    block: Block,
    inputs: BlockInputs,
    statistic: Callable[[], S],
    attention: Attention = "kv_heads",
) -> list[tuple[Group, S]]:
    """Runs a block once over its inputs: every group with the statistic of its consumer's inputs, in all processes.

    The same pass measures how far the block moves its hidden states (`inputs.influence`) and keeps its outputs. Where
    an earlier run has already pruned the block, there are no groups left to decide on, and the list is empty.
    """
    return observe_groups(block, inputs, statistic, block.groups(attention))


def observe_groups(
    block: Block, inputs: BlockInputs, statistic: Callable[[], S], groups: list[Group]
) -> list[tuple[Group, S]]:
    """Likewise, of some of the block's groups."""
    if isinstance(inputs, Replay):
        return inputs.again(groups, statistic)
    if isinstance(inputs, Recalled) and (known := inputs.recall(groups, statistic)) is not None:
        return known
    statistics = {group.consumer.path: statistic() for group in groups}
    shape: tuple[int, ...] = ()  # some families flatten samples and tokens before the FFN

    def hook(path: str) -> Callable[..., None]:
        return lambda _, args: statistics[path].update(args[0].reshape(*shape, -1))

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal shape
        shape = split_call(args, kwargs)[0].shape[:2]

    handles = [block.part(path).register_forward_pre_hook(hook(path)) for path in statistics]
    handles.append(block.module.register_forward_pre_hook(enter, with_kwargs=True))
    inputs.influence = BlockInfluence()
    try:
        inputs.run(inputs.influence)
    finally:
        for handle in handles:
            handle.remove()
    if inputs.group is not None:
        for merging in (*statistics.values(), inputs.influence):
            merging.merge(inputs.group)
    inputs.observed.append(statistics)
    return [(group, statistics[group.consumer.path]) for group in groups]


def _walk(model: PreTrainedModel, calibration: Calibration) -> Walk | None:
    journal = journal_of(model)
    if journal is not None and calibration.group is not None:
        raise ValueError("a model that streams from disk is pruned by one process: start it without others")
    return Walk(journal) if journal is not None else None


def _states(model: PreTrainedModel, calibration: Calibration) -> Callable[[], Held | Filed]:
    """What makes empty collections of hidden states, where those are to wait."""
    if calibration.offload != "disk":
        device = torch.device("cpu") if calibration.offload else calibration.device or model.device
        return lambda: Held(device)
    journal, count = journal_of(model), itertools.count()
    if journal is None:
        raise ValueError(
            "hidden states can wait on disk only if the model streams from there (--stream): offload to cpu"
        )
    return lambda: Filed(journal.room(f"states.{next(count)}"))


def _enter(model: PreTrainedModel, calibration: Calibration, hidden: Held | Filed | None) -> Iterator[list[Call]]:
    """How each batch enters the blocks: what they are called with, and into `hidden` the states before the first."""
    for ids in calibration.share():
        first, calls = record(model, ids)
        if hidden is not None:
            hidden.append(first)
        yield calls


def _again(
    model: PreTrainedModel, block: Block, walk: Walk, device: torch.device
) -> Iterator[tuple[Block, BlockInputs]]:
    """A block that an earlier run has behind it."""
    past, home = walk.past(block.index, device), block.home
    inputs = Replay(block, past, device)
    if home is None or past.version == home.version:
        with block.present(device):
            yield block, inputs
        return
    while home.version < past.version:
        home.version += 1
        decisions = walk.journal.decided(block.index, home.version)
        replay(block, decisions, model)
        walk.journal.taken_over += decisions
    yield block, inputs


def _recalled(
    known: Observations, feed: Feed, bar: Progress
) -> Generator[tuple[Block, BlockInputs], None, tuple[int, Held | Filed, list[list[Call]]]]:
    """The blocks up to one that had to be run or was changed, as what is known of those after it is then of no use.

    Returns:
        How many there were, what enters the next one, and how each batch enters the blocks.
    """
    blocks = blocks_of(feed.model)
    for block in blocks:
        inputs = Recalled(block, known.blocks[block.index], feed)
        with block.present(feed.device):
            yield block, inputs
            needed = (inputs.ran or inputs.changed) and block is not blocks[-1]
            leaving = inputs.outputs() if needed else None
        bar.update()
        if leaving is not None:
            return block.index + 1, leaving, feed.calls
    return len(blocks), feed.states(), []


def _past(block: Block, inputs: BlockInputs, version: int) -> Past:
    """What is known of a block; what was observed there only if the decisions are still to be taken."""
    now = block.home.version if block.home else 0
    if now != version:
        return Past(inputs.influence.state_dict(), None, now)
    observed = [{path: _state(each) for path, each in own.items()} for own in inputs.observed]
    return Past(inputs.influence.state_dict(), observed, now)


def _state(statistic: Statistic) -> dict[str, Any]:
    if not isinstance(statistic, Statistic):
        raise ValueError(f"{type(statistic).__name__} cannot be kept for --resume: derive it from Statistic")
    return statistic.state_dict()
