"""Three sources of the blocks' inputs: running the blocks, the journal of an earlier run, and saved observations.

A pass over the blocks first takes inputs from the journal or the observations, and then runs the remaining blocks.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any, Protocol, TypeVar, cast

import torch
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.pruning.calibration import Calibration, Observations, Observed
from plprune.pruning.forward import BlockInputs, Call, checksums, record_inputs, same_values
from plprune.pruning.hidden_states import HiddenStates, MemoryStates, Part
from plprune.pruning.journal import BlockRecord, Journal, PassLog
from plprune.pruning.model_state import journal_of
from plprune.pruning.statistics import BlockInfluence, Stateful, Statistic
from plprune.pruning.surgery import replay

S = TypeVar("S", bound=Statistic)


class BlockSource(Protocol):
    """Provides the inputs of the blocks in one pass."""

    def inputs(self, block: Block) -> contextlib.AbstractContextManager[BlockInputs]:
        """The inputs of the next block; the caller may change the block within the context."""
        ...

    def after(self, block: Block) -> "BlockSource":
        """The source for the block that follows `block`."""
        ...


class Fresh:
    """Runs the blocks: the outputs of one are the inputs of the next.

    Args:
        model: The model.
        calibration: The calibration text.
        dense: Whether the hidden states of the dense model are followed too. They come after the others in `hidden`.

    Raises:
        ValueError: The model has a journal but several processes prune it, or has none but `offload` is disk.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration, dense: bool = False) -> None:
        self.model, self.calibration, self.journal, self.dense = model, calibration, journal_of(model), dense
        self.log = PassLog(self.journal) if isinstance(self.journal, Journal) else None
        if self.log and calibration.group is not None:
            raise ValueError("a model that streams from disk is pruned by one process: start it without others")
        if calibration.offload == "disk" and not self.log:
            raise ValueError("`offload` disk is only for a model that streams from disk (--stream): set it to cpu")
        self.device = calibration.device or model.device
        self.next = self.log.done if self.log else 0  # index of the block that `hidden` enters
        self.hidden: HiddenStates | None = self.log.entering() if self.log and self.next else None

    @cached_property
    def calls(self) -> list[list[Call]]:
        """The arguments of each block except its hidden states, per batch."""
        records = (record_inputs(self.model, ids) for ids in self.calibration.share())
        if self.hidden is not None:
            return [calls for _, calls in records]
        self.hidden, every = self.states(), []
        for hidden, calls in records:
            self.hidden.append(hidden)
            every.append(calls)
        for i in range(len(every) if self.dense else 0):
            self.hidden.append(self.hidden[i])
        return every

    def states(self) -> HiddenStates:
        """An empty collection of hidden states, on the device or disk that `offload` names."""
        if self.calibration.offload == "disk":
            return self.journal.hidden_states(self.device)
        return MemoryStates(torch.device("cpu") if self.calibration.offload else self.device)

    def entering(self, block: Block) -> HiddenStates:
        """The hidden states that enter a block; first runs any earlier blocks that have not run."""
        for before in blocks_of(self.model)[self.next : block.index]:
            with before.present(self.device):
                self.advance(self._inputs(before).outputs())
        _ = self.calls  # sets `hidden` for the first block
        assert self.hidden is not None
        return self.hidden

    def advance(self, leaving: HiddenStates) -> None:
        """Moves on to the next block; `leaving` are the outputs of the current one."""
        self.hidden, self.next = leaving, self.next + 1

    @contextlib.contextmanager
    def inputs(self, block: Block) -> Iterator[BlockInputs]:
        inputs, version = self._inputs(block), _version(block)
        with block.present(self.device):
            yield inputs
            leaving = inputs.outputs() if block.index < len(blocks_of(self.model)) - 1 else None
            if leaving is not None and self.dense:
                for hidden in inputs.targets:
                    leaving.append(hidden)
            inputs.targets.discard()
        if self.log:
            self.log.append(_record_of(block, inputs, version), leaving)
            self.entering(block).discard()
        if leaving is not None:
            self.advance(leaving)

    def after(self, block: Block) -> BlockSource:
        return self

    def _inputs(self, block: Block) -> BlockInputs:
        hidden, calls = self.entering(block), [calls[block.index] for calls in self.calls]
        own, dense = Part(hidden, range(len(calls))), Part(hidden, range(len(calls), len(hidden)))
        return BlockInputs(block, own, calls, self.device, self.states, self.calibration.group, dense)


class Replayed:
    """Reads the records of an earlier run from the journal, and runs no block.

    Args:
        fresh: The source for the blocks without a record.
        log: The records.
    """

    def __init__(self, fresh: Fresh, log: PassLog) -> None:
        self.fresh, self.log = fresh, log

    @contextlib.contextmanager
    def inputs(self, block: Block) -> Iterator[BlockInputs]:
        record = self.log.read(block.index, self.fresh.device)
        inputs = ReplayedInputs(block, record, self.fresh.device)
        if inputs.pruned:
            self._prune_again(block, record.version)
            yield inputs
            return
        with block.present(self.fresh.device):
            yield inputs

    def after(self, block: Block) -> BlockSource:
        return self if block.index + 1 < self.fresh.next else self.fresh

    def _prune_again(self, block: Block, version: int) -> None:
        """Prunes a block, whose weights are on disk, to the structure of a later version."""
        assert block.home is not None
        while block.home.version < version:
            block.home.version += 1
            decisions = self.log.journal.decisions_of(block.index, block.home.version)
            replay(block, decisions, self.fresh.model)
            self.log.journal.decisions += decisions


class Recalled:
    """Uses saved observations, up to the first block that was changed, or must run for a missing statistic.

    Args:
        fresh: The source for the later blocks.
        known: The observations of all blocks.
    """

    def __init__(self, fresh: Fresh, known: Observations) -> None:
        self.fresh, self.known = fresh, known

    @contextlib.contextmanager
    def inputs(self, block: Block) -> Iterator[BlockInputs]:
        inputs = RecalledInputs(block, self.known.blocks[block.index], self.fresh)
        with block.present(self.fresh.device):
            yield inputs
            if (inputs.ran or inputs.changed) and block.index < len(self.known.blocks) - 1:
                self.fresh.entering(block)
                self.fresh.advance(inputs.outputs())

    def after(self, block: Block) -> BlockSource:
        return self.fresh if self.fresh.next > block.index else self


class ReplayedInputs(BlockInputs):
    """The inputs of a block that an earlier run finished; only the recorded statistics are available.

    Args:
        block: The block.
        record: Its record.
        device: The device for the recorded tensors.
    """

    def __init__(self, block: Block, record: BlockRecord, device: torch.device) -> None:
        self.block, self.device, self.group = block, device, None
        self.influence = BlockInfluence()
        self.influence.load_state_dict(record.influence)
        self.pruned = record.observed is None
        self._observed = iter(record.observed or [])

    def __getattr__(self, name: str) -> Any:
        raise ValueError(
            f"`{name}` of block {self.block.index} is not kept: a method that looks at more than what `observe` gives "
            "cannot go on after a stop; start again by --overwrite without --resume"
        )

    def known(
        self, groups: list[UnitGroup], statistic: Callable[[], S], of_experts: Stateful | None = None
    ) -> list[tuple[UnitGroup, S]] | None:
        """The recorded result of the next observation; empty if the earlier run pruned the block."""
        if self.pruned:
            return []
        kept, statistics = next(self._observed), {group.consumer.path: statistic() for group in groups}
        every: dict[str, Stateful] = {**statistics}
        if of_experts is not None:
            every[self.block.experts.path] = of_experts
        for path, state in kept.items():
            every[path].load_state_dict(state)
        return [(group, statistics[group.consumer.path]) for group in groups]


class RecalledInputs(BlockInputs):
    """The inputs of a block with saved observations; earlier blocks run only if a statistic is missing.

    Args:
        block: The block.
        seen: Its observations.
        fresh: Runs the blocks.
    """

    def __init__(self, block: Block, seen: Observed, fresh: Fresh) -> None:
        self.block, self.seen, self.fresh, self.before = block, seen, fresh, checksums(block.module)
        self.device, self.states, self.group = fresh.device, fresh.states, fresh.calibration.group
        self.influence, self.observed = seen.influence, []
        self._outputs, self._weights = None, {}

    @cached_property
    def hidden(self) -> Sequence[torch.Tensor]:
        return self.fresh.entering(self.block)

    @cached_property
    def calls(self) -> list[Call]:
        return [calls[self.block.index] for calls in self.fresh.calls]

    @property
    def ran(self) -> bool:
        """Whether the block was run for a missing observation."""
        return self._outputs is not None

    @property
    def changed(self) -> bool:
        """Whether the block changed after it was observed."""
        return not same_values(checksums(self.block.module), self.before)

    def known(
        self, groups: list[UnitGroup], statistic: Callable[[], S], of_experts: Stateful | None = None
    ) -> list[tuple[UnitGroup, S]] | None:
        """The saved statistics; None if their class was not observed or the block changed."""
        if of_experts is not None:
            return None
        name = getattr(statistic, "__name__", "")
        found = [self.seen.statistics.get(group.consumer.path, {}).get(name) for group in groups]
        if any(type(each) is not statistic for each in found) or self.changed:
            return None
        return [(group, cast(S, deepcopy(each))) for group, each in zip(groups, found, strict=True)]


def _version(block: Block) -> int:
    """The number of changes to the block on disk."""
    return block.home.version if block.home else 0


def _record_of(block: Block, inputs: BlockInputs, version: int) -> BlockRecord:
    """The record of a block; includes its observations only if the pass left it at `version`."""
    now = _version(block)
    if now != version:
        return BlockRecord(inputs.influence.state_dict(), None, now)
    observed = [{path: _state(each) for path, each in own.items()} for own in inputs.observed]
    return BlockRecord(inputs.influence.state_dict(), observed, now)


def _state(statistic: Stateful) -> dict[str, Any]:
    if not isinstance(statistic, Stateful):
        raise ValueError(f"{type(statistic).__name__} cannot be kept for --resume: derive it from Statistic")
    return statistic.state_dict()
