"""Removes units from projections, and records each removal for the plan. No other module changes shapes.

Smaller parameters replace the old ones in the model. All functions also work on the meta device, so that a plan can
rebuild the structure of a pruned model before its weights are read.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.attached import attach
from plprune.architecture.blocks import Block, Decision, UnitGroup, blocks_of
from plprune.architecture.modeling_plprune import Gather, NoAttention, Scatter, replace, set_count
from plprune.architecture.modules import Side, innermost, is_transposed, matrix, tied, width, width_name
from plprune.pruning.allocation import complement
from plprune.pruning.model_state import journal_of, model_state
from plprune.pruning.plan import PruningPlan


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
        self.journal = journal_of(model)
        self._scaled: list[str] = []

    def keep(
        self,
        block: Block,
        group: UnitGroup,
        keep: Tensor,  # [kept]
        weight: Tensor | None = None,  # [d, kept columns]
        bias_gain: Tensor | None = None,  # [d]
    ) -> None:
        """Removes all other units of `group`, and repairs its consumer.

        Args:
            block: The group's block.
            group: The group.
            keep: Indices of the units that stay, ascending.
            weight: The consumer's new weight for the kept columns, in ascending order.
            bias_gain: Added to the consumer's bias; a missing bias counts as zero.
        """
        size = len(group)
        with block.present():
            shrink(block, group, keep)
            unchanged = len(keep) == size or (weight is None and bias_gain is None)
            repaired = [] if unchanged else self._repair(block, group, weight, bias_gain)
            decision = Decision(group.name, keep.cpu(), size, repaired)
            if block.home is not None:
                block.home.note(decision)
        self.journal.decisions.append(decision)

    def scale(self, block: Block, path: str, gain: Tensor) -> None:  # [d_in]
        """Multiplies each column of a projection's weight by a gain.

        Args:
            block: The projection's block, in memory.
            path: The path of the projection in the block.
            gain: One factor per column.
        """
        linear = innermost(block.part(path))
        gain = gain.to(linear.weight.device)
        linear.weight = _parameter(
            linear.weight, linear.weight.detach() * (gain[:, None] if is_transposed(linear) else gain)
        )
        self._scaled.append(self._name(linear.weight))

    def plan(self, method: str, settings: dict[str, Any], importance: Tensor) -> PruningPlan:
        """Makes the plan of all recorded removals and repairs, and attaches it to the model."""
        decisions = self.journal.decisions
        repaired = [name for decision in decisions for name in decision.repaired] + self._scaled
        plan = PruningPlan(
            keep={decision.group: decision.keep for decision in decisions},
            sizes={decision.group: decision.size for decision in decisions},
            importance=importance.double().cpu(),
            before=self._before,
            after=[block.parameters() for block in self.blocks],
            rest=self._rest,
            sparsity=settings["sparsity"],
            method=method,
            settings=settings,
            repaired=list(dict.fromkeys(repaired)),  # a weight may be both restored and scaled
            config=dense_config(self.model),
            previous=plan_of(self.model),
        )
        set_plan(self.model, plan)
        return plan

    def _repair(self, block: Block, group: UnitGroup, weight: Tensor | None, bias_gain: Tensor | None) -> list[str]:
        """Sets the consumer's weight and bias, and returns the names of the changed parameters."""
        consumer = block.part(group.consumer.path)
        linear, repaired = innermost(consumer), []
        if weight is not None:
            if isinstance(consumer, Gather) and group.kind != "value":  # it reads only some of the kept columns
                weight = weight[:, consumer.index]
            linear.weight = _parameter(linear.weight, weight.T if is_transposed(linear) else weight)
            repaired.append(self._name(linear.weight))
        if bias_gain is not None:
            old = linear.bias if linear.bias is not None else linear.weight.new_zeros(len(matrix(linear)))
            linear.bias = _parameter(old, old.double() + bias_gain.to(old.device))
            repaired.append(self._name(linear.bias))
        return repaired

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
    return values | ({} if model.config.tie_word_embeddings == tied(model) else {"tie_word_embeddings": tied(model)})


def set_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Attaches a plan to a model."""
    attach(model, dataclasses.replace(model_state(model), plan=plan))


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
        _add_biases(model, step.repaired)
    set_plan(model, plan)


def replay(block: Block, decisions: list[Decision], model: PreTrainedModel) -> None:
    """Prunes a block again by recorded decisions; its weights may be on the meta device."""
    for decision in decisions:
        shrink(block, next(group for group in _groups(block) if group.name == decision.group), decision.keep)
        _add_biases(model, decision.repaired)


def shrink(block: Block, group: UnitGroup, keep: Tensor) -> None:
    """Removes all units of a group except `keep` from every projection of the group."""
    if group.kind == "attention" and not len(keep):
        return drop_attention(block)
    if len(keep) == len(group):
        return
    cut = _vacate if group.kind == "value" else _remove
    gone = complement(keep, len(group))
    for path in dict.fromkeys(s.path for s in group.producers):
        rows = torch.cat([s.index[gone].flatten() for s in group.producers if s.path == path])
        replace(block.module, path, cut(block.part(path), "out_features", rows))
    path, columns = group.consumer.path, group.consumer.index[gone].flatten()
    replace(block.module, path, cut(block.part(path), "in_features", columns))
    if group.kind == "attention":
        _set_counts(block, kv_heads=len(keep))


def drop_attention(block: Block) -> None:
    """Replaces a block's attention sub-block by a module that outputs zero."""
    replace(block.module, block.family.attention, NoAttention(block.index))


@contextlib.contextmanager
def without_attention(block: Block) -> Iterator[None]:
    """Drops a block's attention within the context."""
    attention = block.part(block.family.attention)
    drop_attention(block)
    try:
        yield
    finally:
        replace(block.module, block.family.attention, attention)


def widen(model: PreTrainedModel) -> None:
    """Puts zeros in place of removed value channels, which replaces gather and scatter; outputs stay the same."""
    for block in blocks_of(model):
        for path in block.attention_paths:
            part = block.part(path)
            if isinstance(part, Gather | Scatter):
                side: Side = "in_features" if isinstance(part, Gather) else "out_features"
                replace(block.module, path, _spread(part.linear, side, part.index, width(part, side)))


def pad(model: PreTrainedModel, multiple: int) -> None:
    """Pads every FFN with zero channels to a multiple; outputs stay the same."""
    for block in blocks_of(model):
        channels = block.channels
        size = -(-channels // multiple) * multiple
        for path in dict.fromkeys(block.family.ffn_in):
            parts = torch.arange(block.family.ffn_in.count(path))  # gate and up may be one projection
            places = (parts[:, None] * size + torch.arange(channels)).flatten()
            _spread(cast(nn.Linear, block.part(path)), "out_features", places, len(parts) * size)
        _spread(cast(nn.Linear, block.part(block.family.ffn_out)), "in_features", torch.arange(channels), size)


def _add_biases(model: PreTrainedModel, repaired: list[str]) -> None:
    for name in repaired:
        path, _, kind = name.rpartition(".")
        linear = cast(nn.Linear, model.get_submodule(path))
        if kind == "bias" and linear.bias is None:
            linear.bias = _parameter(linear.weight, linear.weight.new_zeros(len(matrix(linear))))


def _check_fit(blocks: list[Block], plan: PruningPlan) -> None:
    sizes = {g.name: len(g) for b in blocks for g in _planned(b, plan)}
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
    return [group for group in _groups(block) if group.name in plan.keep]


def _groups(block: Block) -> list[UnitGroup]:
    """The groups of a block, of all kinds."""
    return [*block.groups("kv_heads"), *block.groups("value_channels")[:-1]]


def _parameter(old: Tensor, new: Tensor) -> nn.Parameter:
    """Makes a parameter of new values, with the dtype and device of an old one."""
    return nn.Parameter(new.to(old).contiguous(), requires_grad=old.requires_grad)


def _take(module: nn.Module, side: Side, keep: Tensor) -> nn.Linear:
    """Keeps only some inputs or outputs of a projection, or some values of a norm."""
    linear, rows = cast(nn.Linear, module), side == "out_features"
    keep, bias = keep.to(linear.weight.device), getattr(linear, "bias", None)
    axis = int(rows == is_transposed(linear))
    linear.weight = _parameter(linear.weight, linear.weight.detach().index_select(axis, keep))
    if rows and bias is not None:
        linear.bias = _parameter(bias, bias.detach()[keep])
    if name := width_name(linear, side):
        setattr(linear, name, len(keep))
    return linear


def _remove(module: nn.Module, side: Side, gone: Tensor) -> nn.Module:
    """Removes some inputs or outputs of a projection."""
    kept = complement(gone, width(module, side))
    if not isinstance(module, Gather | Scatter):
        return _take(module, side, kept)
    index = module.index.cpu()
    linear = _take(module.linear, side, torch.isin(index, kept).nonzero().flatten())
    return type(module)(linear, torch.isin(kept, index).nonzero().flatten().to(module.index.device), len(kept))


def _vacate(module: nn.Module, side: Side, gone: Tensor) -> nn.Module:
    """Removes inputs or outputs of a projection, but keeps its outer width by a gather or scatter."""
    wrapper, full = {"in_features": Gather, "out_features": Scatter}[side], width(module, side)
    if not isinstance(module, wrapper):
        module = wrapper(cast(nn.Linear, module), _everything(module, full), full)
    assert isinstance(module, Gather | Scatter)
    stays = torch.isin(module.index.cpu(), gone, invert=True).nonzero().flatten()
    return wrapper(_take(module.linear, side, stays), module.index[stays.to(module.index.device)], full)


def _spread(linear: nn.Linear, side: Side, places: Tensor, size: int) -> nn.Linear:
    """Widens a projection to `size`: moves its inputs or outputs to `places`, with zeros elsewhere."""
    weight, axis = linear.weight.detach(), int((side == "out_features") == is_transposed(linear))
    shape = [size if i == axis else n for i, n in enumerate(weight.shape)]
    places = places.to(weight.device)
    linear.weight = _parameter(linear.weight, weight.new_zeros(shape).index_copy(axis, places, weight))
    if side == "out_features" and linear.bias is not None:
        bias = linear.bias.detach()
        linear.bias = _parameter(bias, bias.new_zeros(size).index_copy(0, places, bias))
    setattr(linear, cast(str, width_name(linear, side)), size)
    return linear


def _everything(module: nn.Module, full: int) -> Tensor:
    """All indices, on the weight's device; on the CPU if that is meta, as indices need values."""
    device = innermost(module).weight.device
    return torch.arange(full, device=None if device.type == "meta" else device)


def _set_counts(block: Block, kv_heads: int) -> None:
    heads = kv_heads * block.queries_per_head
    counts = {"heads": heads, "kv_heads": kv_heads, "query_width": heads * block.head_dim}
    for path, what in block.family.counts.items():
        set_count(block.module, path, counts[what])
