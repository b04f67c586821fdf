"""Removes units from projections, and records each removal for the plan. No other module changes shapes.

Smaller parameters replace the old ones in the model. All functions also work on the meta device, so that a plan can
rebuild the structure of a pruned model before its weights are read.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from plprune.architecture.anatomy import ModelAnatomy, SubBlock
from plprune.architecture.attached import attach
from plprune.architecture.blocks import (
    Block,
    Decision,
    Kind,
    UnitGroup,
    anatomy_of,
    blocks_of,
    dense_class,
    set_anatomy,
)
from plprune.architecture.cutting import complement, cut, cut_values, cut_within, held, like, put, spread
from plprune.architecture.depth import Shorter, renumber, shorter
from plprune.architecture.modeling_plprune import Gather, NoAttention, NoFFN, Scatter, replace, set_count
from plprune.architecture.modules import Side, innermost, is_transposed, matrix, says_tied, tied, width
from plprune.architecture.wrappers import text_configs, with_sizes
from plprune.pruning.model_state import journal_of, model_state
from plprune.pruning.plan import PruningPlan, block_name, composed


class Surgery:
    """Prunes the groups of a model one by one and records the decisions.

    Args:
        model: Changed in place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks = blocks_of(model)
        self._before = [block.parameters() for block in self.blocks]
        self._rest = sum(p.numel() for p in model.parameters()) - sum(self._before)
        self.parameters = sum(self._before)  # of all blocks, before pruning
        self.journal = journal_of(model)
        self._gone: list[int] = []
        self._config = dense_config(model)  # before blocks leave it
        self._scaled: list[str] = []

    def keep(
        self,
        block: Block,
        group: UnitGroup,
        keep: Tensor,  # [kept], or [experts, kept]
        weight: Tensor | None = None,  # [d, kept columns], or [experts, d, kept]
        bias_gain: Tensor | None = None,  # [d], or [experts, d]
    ) -> None:
        """Removes all other units of `group`, and repairs its consumer.

        Args:
            block: The group's block.
            group: The group.
            keep: Indices of the units that stay, ascending.
            weight: The consumer's new weight for the kept columns, in ascending order.
            bias_gain: Added to the consumer's bias; a missing bias counts as zero, except that experts must have one.
        """
        size = len(group)
        with block.present():
            shrink(block, group, keep)
            unchanged = keep.shape[-1] == size or (weight is None and bias_gain is None)
            repaired = [] if unchanged else self._repair(block, group, weight, bias_gain)
            self._record(block, Decision(group.name, keep.cpu(), size, repaired))

    def scale(self, block: Block, path: str, gain: Tensor) -> None:  # [d_in], or [experts, channels]
        """Multiplies each column of a projection's weight, or of the last one of each expert, by a gain.

        Args:
            block: The projection's block, in memory.
            path: The path of the projection in the block.
            gain: One factor per column.
        """
        if (stacked := held(block.module, path)) is not None:
            across = gain[:, None] if block.experts.channels.consumer.axis == 2 else gain[..., None]
            put(block.module, path, stacked.detach() * across.to(stacked.device))
            self._scaled.append(f"{block.path}.{path}")
            return
        linear = innermost(block.part(path))
        gain = gain.to(linear.weight.device)
        linear.weight = like(linear.weight, linear.weight.detach() * (gain[:, None] if is_transposed(linear) else gain))
        self._scaled.append(self._name(linear.weight))

    def changed(self, block: Block) -> None:
        """Records that all parameters of a block have new values; the block was pruned last."""
        now = next(group for group in block.recorded_groups if group.name == self.journal.decisions[-1].group)
        everything = torch.arange(len(now)).expand(*([now.experts] if now.experts else []), len(now))
        names = [f"{block.path}.{name}" for name, _ in block.module.named_parameters()]
        self._record(block, Decision(now.name, everything, len(now), names))

    def drop_blocks(self, gone: Sequence[int]) -> None:
        """Removes whole blocks, as the last change: it numbers the others anew.

        Args:
            gone: Indices of the blocks.

        Raises:
            ValueError: The family's config cannot express a model without these blocks.
        """
        drop_blocks(self.model, gone)
        self._gone = sorted(gone)
        nothing = torch.zeros(0, dtype=torch.long)
        self.journal.decisions += [Decision(block_name(i), nothing, 1) for i in self._gone]

    def plan(self, method: str, settings: dict[str, Any], importance: Tensor) -> PruningPlan:
        """Makes the plan of all recorded removals and repairs, and attaches it to the model."""
        decisions = self.journal.decisions
        repaired = [name for decision in decisions for name in decision.repaired] + self._scaled
        keep, sizes = dict[str, Tensor](), dict[str, int]()
        for decision in decisions:  # a group may have been cut twice
            before = keep.get(decision.group)
            keep[decision.group] = decision.keep if before is None else composed(before, decision.keep)
            sizes.setdefault(decision.group, decision.size)
        plan = PruningPlan(
            keep=keep,
            sizes=sizes,
            importance=importance.double().cpu(),
            before=self._before,
            after=[0 if block.index in self._gone else block.parameters() for block in self.blocks],
            rest=self._rest,
            sparsity=settings["sparsity"],
            method=method,
            settings=settings,
            repaired=self._renamed(dict.fromkeys(repaired)),  # a weight may be both restored and scaled
            config=self._config,
            previous=plan_of(self.model),
        )
        set_plan(self.model, plan)
        return plan

    def _record(self, block: Block, decision: Decision) -> None:
        """Keeps a decision about a block, which is in memory."""
        if block.home is not None:
            block.home.note(decision)
        self.journal.decisions.append(decision)

    def _repair(self, block: Block, group: UnitGroup, weight: Tensor | None, bias_gain: Tensor | None) -> list[str]:
        """Sets the consumer's weight and bias, and returns the names of the changed parameters."""
        if group.experts:
            return self._repair_experts(block, group, weight, bias_gain)
        consumer = block.part(group.consumer.path)
        linear, repaired = innermost(consumer), []
        if weight is not None:
            if isinstance(consumer, Gather) and group.kind != "value":  # it reads only some of the kept columns
                weight = weight[:, consumer.index]
            linear.weight = like(linear.weight, weight.T if is_transposed(linear) else weight)
            repaired.append(self._name(linear.weight))
        if bias_gain is not None:
            _ensure_bias(linear)
            linear.bias = like(linear.bias, linear.bias.double() + bias_gain.to(linear.bias.device))
            repaired.append(self._name(linear.bias))
        return repaired

    def _repair_experts(
        self, block: Block, group: UnitGroup, weight: Tensor | None, bias_gain: Tensor | None
    ) -> list[str]:
        paths = []
        if weight is not None:
            paths.append(group.consumer.path)
            put(block.module, paths[-1], weight if group.consumer.axis == 2 else weight.mT)
        if bias_gain is not None:
            paths.append(block.expert_bias)
            old = cast(Tensor, held(block.module, paths[-1])).detach()
            put(block.module, paths[-1], old.double() + bias_gain.to(old.device))
        return [f"{block.path}.{path}" for path in paths]

    def _renamed(self, names: Iterable[str]) -> list[str]:
        """Names of parameters after blocks have left, without those of the blocks that did."""
        left = [block.path for block in self.blocks if block.index not in self._gone]
        new = {old: block.path for old, block in zip(left, self.blocks, strict=False)}
        lengths = {path.count(".") + 1 for path in new}
        pairs = [(name, ".".join(name.split(".")[: max(lengths)])) for name in names]
        return [new[path] + name.removeprefix(path) for name, path in pairs if path in new]

    def _name(self, parameter: nn.Parameter) -> str:
        return next(name for name, p in self.model.named_parameters() if p is parameter)


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan of a pruned model; None for a dense one."""
    return model_state(model).plan


def dense_config(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration of a model before it was first pruned, with its `model_type`."""
    previous = plan_of(model)
    if previous:
        return previous.config
    values = model.config.to_diff_dict() | {"model_type": model.config.model_type}
    return values | ({} if says_tied(model.config) == tied(model) else {"tie_word_embeddings": tied(model)})


def config_of_the_rest(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration of a dense model of the blocks that are left, with its `model_type`."""
    values, plan, kind = dense_config(model), plan_of(model), dense_class(model)[0]
    for step in plan.chain() if plan else []:
        if step.dropped:
            config = CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
            changes = shorter(kind, config, anatomy_of(model).blocks, step.remaining).config
            values = with_sizes(values, changes, type(config))
    return values


def set_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Attaches a plan to a model, and tells the model how many experts its blocks have left."""
    attach(model, dataclasses.replace(model_state(model), plan=plan))
    for block in blocks_of(model):
        for path in block.experts.outside if block.expert_count else ():
            set_count(model, path, block.expert_count)


def apply(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Prunes a model to the structure of a plan and of any earlier plans; a plan has no repaired values.

    Raises:
        ValueError: The plan was made for a model of other shapes, or of another pruning history.
    """
    done, steps = plan_of(model), plan.chain()
    past = [step.digest for step in done.chain()] if done else []
    if past != [step.digest for step in steps[: len(past)]]:
        raise ValueError("the plan does not fit the model, which is pruned by another: use the model it was made for")
    for step in steps[len(past) :]:
        blocks = blocks_of(model)
        _check_fit(blocks, step)
        for block in blocks:
            for group in _planned(block, step):
                shrink(block, group, step.keep[group.name])
        if step.dropped:
            drop_blocks(model, step.dropped)
        _add_biases(model, step.repaired)
    set_plan(model, plan)


def replay(block: Block, decisions: list[Decision], model: PreTrainedModel) -> None:
    """Prunes a block again by recorded decisions; its weights may be on the meta device."""
    for decision in decisions:
        shrink(block, next(group for group in block.recorded_groups if group.name == decision.group), decision.keep)
        _add_biases(model, decision.repaired)


def shrink(block: Block, group: UnitGroup, keep: Tensor) -> None:
    """Removes all units of a group except `keep` from every projection of the group."""
    if group.kind == "attention" and not len(keep):
        return drop_attention(block)
    if keep.shape[-1] == len(group):
        return
    if group.kind == "whole_ffn":
        drop_ffn(block)
    elif group.kind == "expert_channel":
        cut_within(block.module, group.producers, group.consumer, group.counts, keep)
    elif group.kind == "value":
        cut_values(block.module, group.producers[0], group.consumer, keep)
    else:
        cut(block.module, group.producers, group.consumer, group.counts, keep)


def may_leave(blocks: Sequence[Block], gone: Collection[int]) -> list[Block]:
    """The blocks that may leave after others: one that caches keys and values stays, by which tokens are counted."""
    rest = [block for block in blocks if block.index not in gone]
    caching = [block.index for block in rest if block.anatomy.values is not None]  # without its attention too
    return [block for block in rest if caching != [block.index]]


def first_to_leave(blocks: Sequence[Block], order: Sequence[Block], count: int) -> list[Block]:
    """The first of some blocks in order, without those that may not leave.

    Raises:
        ValueError: There are fewer.
    """
    gone: list[Block] = []
    for block in order:
        before = {each.index for each in gone}
        if len(gone) < count and block.index in {each.index for each in may_leave(blocks, before)}:
            gone.append(block)
    if len(gone) < count:
        raise ValueError(
            f"{count} blocks cannot leave, but {len(gone)}, as one with a cache stays: lower `drop_blocks`"
        )
    return gone


def check_depth(model: PreTrainedModel, gone: Sequence[int]) -> None:
    """Raises ValueError if the family's config cannot express a model without some of its blocks."""
    _without_blocks(model, gone)


def _without_blocks(model: PreTrainedModel, gone: Sequence[int]) -> tuple[list[int], Shorter]:
    """The indices of the blocks that stay, and what else changes."""
    found, (kind, config) = anatomy_of(model), dense_class(model)
    kept = complement(torch.tensor(gone), len(found.anatomies)).tolist()
    return kept, shorter(kind, config, found.blocks, kept)


def drop_blocks(model: PreTrainedModel, gone: Sequence[int]) -> None:
    """Removes blocks from the list of blocks, numbers the others anew, and changes the config accordingly.

    Raises:
        ValueError: The family's config cannot express a model without these blocks.
    """
    (kept, changes), found = _without_blocks(model, gone), anatomy_of(model)
    blocks = cast(nn.ModuleList, model.get_submodule(found.blocks))
    for new, old in enumerate(kept):
        renumber(blocks[old], changes.indices, old, new)
    replace(model, found.blocks, nn.ModuleList(blocks[i] for i in kept))
    for config in text_configs(model):
        config.__dict__.update(changes.config)
    set_anatomy(model, ModelAnatomy(found.blocks, tuple(found.anatomies[i] for i in kept)))


def drop_attention(block: Block) -> None:
    """Replaces a block's attention sub-block by a module that outputs zero."""
    config = getattr(block.part(block.anatomy.mixer), "config", None)
    replace(block.module, block.anatomy.mixer, NoAttention(block.index, config))


def drop_ffn(block: Block) -> None:
    """Replaces a block's FFN, or its mixture of experts, by a module that outputs zero."""
    found = cast(SubBlock, block.anatomy.whole_ffn)
    replace(block.module, found.path, NoFFN(found.returned))


@contextlib.contextmanager
def without(block: Block, kind: Kind) -> Iterator[None]:
    """Drops a block's attention, or its whole FFN, within the context."""
    path = block.anatomy.mixer if kind == "attention" else cast(SubBlock, block.anatomy.whole_ffn).path
    own = block.part(path)
    (drop_attention if kind == "attention" else drop_ffn)(block)
    try:
        yield
    finally:
        replace(block.module, path, own)


def widen(model: PreTrainedModel) -> None:
    """Puts zeros in place of removed value channels, which replaces gather and scatter; outputs stay the same."""
    for block in blocks_of(model):
        for path in block.attention_paths:
            part = block.part(path)
            if isinstance(part, Gather | Scatter):
                side: Side = "in_features" if isinstance(part, Gather) else "out_features"
                replace(block.module, path, spread(part.linear, side, part.index, width(part, side)))


def pad(model: PreTrainedModel, multiple: int) -> None:
    """Pads every FFN with zero channels to a multiple; outputs stay the same."""
    for block in blocks_of(model):
        if (ffn := block.anatomy.ffn) is None or not block.has_ffn:
            continue
        if any(not torch.equal(a.index, b.index) for a, b in zip(ffn.producers, ffn.stacked(len(ffn)), strict=True)):
            raise ValueError("the channels of gate and up take turns in one projection, and cannot be padded")
        channels, inputs = block.channels, [part.path for part in ffn.producers]
        size = -(-channels // multiple) * multiple
        for path in dict.fromkeys(inputs):
            parts = torch.arange(inputs.count(path))  # gate and up may be one projection
            places = (parts[:, None] * size + torch.arange(channels)).flatten()
            spread(cast(nn.Linear, block.part(path)), "out_features", places, len(parts) * size)
        spread(cast(nn.Linear, block.part(ffn.consumer.path)), "in_features", torch.arange(channels), size)


def _add_biases(model: PreTrainedModel, repaired: list[str]) -> None:
    for name in repaired:
        path, _, kind = name.rpartition(".")
        if kind == "bias":
            _ensure_bias(cast(nn.Linear, model.get_submodule(path)))


def _ensure_bias(linear: nn.Linear) -> None:
    """Gives a projection without a bias one of zeros."""
    if linear.bias is None:
        linear.bias = like(linear.weight, linear.weight.new_zeros(len(matrix(linear))))


def _check_fit(blocks: list[Block], plan: PruningPlan) -> None:
    sizes = {g.name: len(g) for b in blocks for g in _planned(b, plan)} | {block_name(b.index): 1 for b in blocks}
    for name, size in plan.sizes.items():
        if sizes.get(name) != size:
            raise ValueError(
                f"the plan does not fit the model: {name} has {size} units in the plan and "
                f"{sizes.get(name, 'none')} in the model; use the model it was made for ({plan.origin.get('model')})"
            )
    now = [block.parameters() for block in blocks]
    for i, (there, here) in enumerate(itertools.zip_longest(plan.before, now, fillvalue=0)):
        if there != here:
            raise ValueError(
                f"the plan does not fit the model: block {i} has {there} parameters in the plan and {here} in the "
                f"model; use the model it was made for ({plan.origin.get('model')})"
            )


def _planned(block: Block, plan: PruningPlan) -> list[UnitGroup]:
    """The block's groups that a plan contains."""
    return [group for group in block.recorded_groups if group.name in plan.keep]
