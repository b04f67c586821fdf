"""Visits the decoder blocks in depth order, each with the inputs that it would have in the model.

Only the current block needs to be on the accelerator. Results of an interrupted run come from its journal, and saved
observations replace forward passes (`plprune.pruning.block_sources`); callers see no difference.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import AttentionUnit, Block, UnitGroup, blocks_of
from plprune.io import distributed
from plprune.io.progress import Progress
from plprune.pruning.block_sources import BlockSource, Fresh, Recalled, Replayed
from plprune.pruning.calibration import Calibration
from plprune.pruning.expert_inputs import FEW, ExpertStatistic, PerExpert, watched
from plprune.pruning.forward import BlockInputs, evaluating
from plprune.pruning.statistics import BlockInfluence, Norms, Statistic

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Statistic)
E = TypeVar("E", bound=ExpertStatistic)


def stream(
    model: PreTrainedModel,
    batches: Calibration | Iterable[Tensor],
    title: str = "calibrating",
    dense: bool = False,
) -> Iterator[tuple[Block, BlockInputs]]:
    """Yields the blocks in depth order, each with its inputs.

    The caller may change a block before it asks for the next one; the blocks after it then see the change. A block that
    an interrupted run has already pruned is yielded too: `observe` then returns an empty list.

    Args:
        model: A dense or pruned model.
        batches: Calibration token ids, [b, s] each.
        title: Title of the progress bar.
        dense: Whether the inputs in the dense model are followed too (`BlockInputs.dense`). The caller must call
            `inputs.aim` before it changes a block.

    Raises:
        ValueError: Activations are NaN or infinite; the message names the block.
    """
    calibration, blocks = Calibration.of(batches), blocks_of(model)
    fresh = Fresh(model, calibration, dense)
    source, done, quiet = _first_source(fresh), fresh.next, distributed.rank(calibration.group) > 0
    with (
        evaluating(model),
        fresh.log or contextlib.nullcontext(),
        Progress(len(blocks), title, "block", done, quiet) as bar,
    ):
        for block in blocks:
            with source.inputs(block) as inputs:
                yield block, inputs
            source = source.after(block)
            if block.index >= done:
                bar.update()


def prune_blocks(
    model: PreTrainedModel,
    batches: Calibration | Iterable[Tensor],
    title: str,
    prune_block: Callable[[Block, BlockInputs], None],
    dense: bool = False,
) -> list[BlockInfluence]:
    """Prunes the blocks in depth order, each by the inputs that the pruned blocks before it produce.

    Args:
        model: Changed in place.
        batches: Calibration token ids, [b, s] each.
        title: Title of the progress bar.
        prune_block: Prunes one block by `Surgery.keep`; not called for blocks that an interrupted run has pruned.
        dense: As for :func:`stream`.

    Returns:
        How far each block moves its hidden states, as `prune_block` has observed it.
    """
    influences = []
    for block, inputs in stream(model, batches, title, dense):
        if not inputs.pruned:
            prune_block(block, inputs)
        influences.append(inputs.influence)
    return influences


def observe(
    block: Block,
    inputs: BlockInputs,
    statistic: Callable[[], S],
    attention: AttentionUnit = "kv_heads",
    experts: bool = True,
) -> list[tuple[UnitGroup, S]]:
    """Runs a block once over its inputs, of all processes.

    The same run measures how far the block moves its hidden states (`inputs.influence`) and keeps its outputs.

    Args:
        block: The block.
        inputs: Its inputs.
        statistic: Makes an empty statistic.
        attention: The attention units to observe.
        experts: Whether channels of experts are observed.

    Returns:
        Every group with the statistic of its consumer's inputs, which :func:`values` reads; nothing if an earlier run
        has already pruned the block.
    """
    groups = block.groups(attention, experts)
    channels = next((group for group in groups if group.experts), None)
    if channels is None or inputs.pruned:
        return observe_groups(block, inputs, statistic, groups)
    seen = PerExpert(channels.experts, len(channels), statistic, _expected(block, channels))
    others = [group for group in groups if group is not channels]
    found = observe_groups(block, inputs, statistic, others, seen)
    if seen.few:
        log.warning(
            "%s: %d of %d experts saw fewer than %d calibration tokens, so weights alone score their channels",
            *(block.path, len(seen.few), len(seen.parts), FEW),
        )
    return [*found, (channels, cast(Any, seen))]


def _expected(block: Block, channels: UnitGroup) -> Tensor:  # [experts, channels]
    """The products of the norms of what computes each channel, over their mean."""
    norms = [torch.linalg.vector_norm(w, dim=2, dtype=torch.float64).cpu() for w in block.rows_of_experts(channels)]
    sizes = math.prod(norms[1:], start=norms[0])
    return sizes / sizes.mean()


def values(seen: Any, read: Callable[[Any], Tensor]) -> Tensor:  # [features], or [experts, channels]
    """A value of each feature that a statistic has seen; for the channels of experts those of each expert."""
    return seen.stacked(read) if isinstance(seen, PerExpert) else read(seen)


def observe_groups(
    block: Block,
    inputs: BlockInputs,
    statistic: Callable[[], S],
    groups: list[UnitGroup],
    channels: PerExpert | None = None,
) -> list[tuple[UnitGroup, S]]:
    """Like :func:`observe`, for some of the block's groups; `channels` sees those of experts."""
    if (known := inputs.known(groups, statistic, channels)) is not None:
        return known
    statistics = {group.consumer.path: statistic() for group in groups}

    def hook(path: str) -> Callable[..., None]:  # some families flatten samples and tokens before the FFN
        return lambda _, args: statistics[path].update(args[0].reshape(inputs.batch[0], -1, args[0].shape[-1]))

    def enter(*_: Any) -> None:
        if channels is not None and inputs.batch:  # else the model runs to record the block's arguments
            channels.begin(*inputs.batch)

    handles = [block.part(path).register_forward_pre_hook(hook(path)) for path in statistics]
    handles.append(block.module.register_forward_pre_hook(enter))
    inputs.influence = BlockInfluence()
    watching = watched(block.part(block.experts.path), channels.update) if channels else None
    try:
        with watching or contextlib.nullcontext():
            inputs.run(inputs.influence)
    finally:
        for handle in handles:
            handle.remove()
    if inputs.group is not None:
        for merging in (*statistics.values(), *([channels] if channels else []), inputs.influence):
            merging.merge(inputs.group)
    inputs.observed.append({**statistics, **({block.experts.path: channels} if channels else {})})
    return [(group, statistics[group.consumer.path]) for group in groups]


def observe_experts(block: Block, inputs: BlockInputs, statistic: E) -> E:
    """Runs a block once over its inputs, of all processes, and gives a statistic what each of its experts sees.

    The same run measures how far the block moves its hidden states (`inputs.influence`) and keeps its outputs.
    """
    own = {block.experts.path: statistic} if block.expert_count else {}
    if inputs.known([], Norms, statistic if own else None) is not None:
        return statistic
    inputs.influence = BlockInfluence()
    watching = watched(block.part(block.experts.path), statistic.update) if own else None
    with watching or contextlib.nullcontext():
        inputs.run(inputs.influence)
    if inputs.group is not None:
        for merging in (statistic, inputs.influence):
            merging.merge(inputs.group)
    inputs.observed.append(own)
    return statistic


def _first_source(fresh: Fresh) -> BlockSource:
    """The source for the first block."""
    if fresh.log is not None:
        return Replayed(fresh, fresh.log) if fresh.log.done else fresh
    known = None if fresh.dense else fresh.calibration.known
    return Recalled(fresh, known) if known and known.are_of(fresh.model, fresh.calibration) else fresh
