"""The only code that changes shapes, and the plan that grows with it.

Parameters are replaced by smaller ones, in place in the model; what leaves is freed. Everything works on the meta
device too, so that a plan rebuilds the structure of a pruned model before any weight is read.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.anatomy import Block, Group, blocks_of, innermost
from plprune.journal import Decision, journal_of
from plprune.plan import PruningPlan
from plprune.repair import complement

Side = Literal["in_features", "out_features"]


class Gather(nn.Module):
    """A projection that reads only some of its inputs: the consumer of ragged value channels.

    Args:
        linear: The projection of the channels that are read.
        index: Which those are.
        in_features: Width of the input.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, index: Tensor, in_features: int) -> None:
        super().__init__()
        self.linear, self.in_features = linear, in_features
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., d_out]
        return self.linear(x.index_select(-1, self.index))


class Scatter(nn.Module):
    """A projection that computes only some of its outputs and leaves zeros for the others: ragged value channels.

    Args:
        linear: The projection to the channels that are computed.
        index: Which those are.
        out_features: Width of the output.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, index: Tensor, out_features: int) -> None:
        super().__init__()
        self.linear, self.out_features = linear, out_features
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., out_features]
        y = self.linear(x)
        return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.index, y)


class NoAttention(nn.Module):
    """Stands where an attention sub-block was dropped, and adds zero.

    The cache gets an entry of width one: it asks its first layer for the length of the sequence, and would silently
    misplace every token if there were none.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:
            batch, length, _width = hidden_states.shape
            entry = hidden_states.new_zeros(batch, 1, length, 1)
            past_key_values.update(entry, entry, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class BlockConfig:
    """The model's config as one block sees it: a few values of its own, the model's for all others."""

    def __init__(self, base: Any, **own: Any) -> None:
        self.__dict__.update(own, _base=base)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_base"], name)


class Surgery:
    """Prunes the groups of a model one by one and writes down what it did.

    Args:
        model: Changed in place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks = blocks_of(model)
        self._before = [block.parameters() for block in self.blocks]
        self._rest = sum(p.numel() for p in model.parameters()) - sum(self._before)
        self._keep: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._repaired: list[str] = []

    def keep(
        self,
        block: Block,
        group: Group,
        keep: Tensor,  # [kept]
        weight: Tensor | None = None,  # [d, kept columns]
        bias_gain: Tensor | None = None,  # [d]
    ) -> None:
        """Removes all other units of `group`, and repairs its consumer.

        Args:
            block: The group's block.
            group: The group.
            keep: Indices of the units that stay, ascending.
            weight: The consumer's weight from now on, over the columns that stay, ascending.
            bias_gain: Added to the consumer's bias, which is made if there is none.
        """
        size = len(group)
        with block.present():
            shrink(block, group, keep)
            nothing = len(keep) == size or (weight is None and bias_gain is None)
            repaired = [] if nothing else self._repair(block, group, weight, bias_gain)
            decision = Decision(group.name, keep.cpu(), size, repaired)
            if block.home is not None:
                block.home.note(decision)
        self._take_over()
        self._write_down(decision)

    def plan(self, method: str, settings: dict[str, Any], importance: Tensor) -> PruningPlan:
        """The plan of all that was done, which the model carries from now on as `pruning_plan`."""
        self._take_over()
        plan = PruningPlan(
            keep=self._keep,
            sizes=self._sizes,
            importance=importance.double().cpu(),
            before=self._before,
            after=[block.parameters() for block in self.blocks],
            rest=self._rest,
            sparsity=settings["sparsity"],
            method=method,
            settings=settings,
            repaired=self._repaired,
            config=_dense_config(self.model),
            previous=plan_of(self.model),
        )
        attach(self.model, plan)
        return plan

    def _repair(self, block: Block, group: Group, weight: Tensor | None, bias_gain: Tensor | None) -> list[str]:
        """Gives the consumer new values; the names of the parameters that got them."""
        consumer = block.part(group.consumer.path)
        linear, repaired = innermost(consumer), []
        if weight is not None:
            if isinstance(consumer, Gather) and group.kind != "value":  # of the columns that stay, it reads some
                weight = weight[:, consumer.index]
            linear.weight = _parameter(linear.weight, weight)
            repaired.append(self._name(linear.weight))
        if bias_gain is not None:
            old = linear.bias if linear.bias is not None else linear.weight.new_zeros(len(linear.weight))
            linear.bias = _parameter(old, old.double() + bias_gain.to(old.device))
            repaired.append(self._name(linear.bias))
        return repaired

    def _take_over(self) -> None:
        """Writes down what an earlier run had decided, and this one has not been asked to."""
        journal = journal_of(self.model)
        while journal is not None and journal.taken_over:
            self._write_down(journal.taken_over.pop(0))

    def _write_down(self, decision: Decision) -> None:
        self._keep[decision.group], self._sizes[decision.group] = decision.keep, decision.size
        self._repaired += decision.repaired

    def _name(self, parameter: nn.Parameter) -> str:
        return next(name for name, p in self.model.named_parameters() if p is parameter)


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan by which a model was pruned, if it was."""
    return getattr(model, "pruning_plan", None)


def attach(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Makes a model carry its plan."""
    cast(Any, model).pruning_plan = plan


def apply(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Gives a model the structure of a plan, with those before it that it lacks; repaired values are not in a plan.

    Raises:
        ValueError: The plan was made for a model of other shapes, or one that had been pruned otherwise.
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
    attach(model, plan)


def replay(block: Block, decisions: list[Decision], model: PreTrainedModel) -> None:
    """Gives a block the structure that decisions gave it before; its weights may be on meta."""
    for decision in decisions:
        shrink(block, next(group for group in _groups(block) if group.name == decision.group), decision.keep)
        _add_biases(model, decision.repaired)


def shrink(block: Block, group: Group, keep: Tensor) -> None:
    """Removes all units of a group but `keep` from every projection that holds a part of them."""
    if group.kind == "attention" and not len(keep):
        return drop_attention(block)
    if len(keep) == len(group):
        return
    cut = _vacate if group.kind == "value" else _remove
    gone = complement(keep, len(group))
    for path in dict.fromkeys(s.path for s in group.producers):
        rows = torch.cat([s.index[gone].flatten() for s in group.producers if s.path == path])
        _replace(block, path, cut(block.part(path), "out_features", rows))
    path, columns = group.consumer.path, group.consumer.index[gone].flatten()
    _replace(block, path, cut(block.part(path), "in_features", columns))
    if group.kind == "attention":
        _set_counts(block, kv_heads=len(keep))


def drop_attention(block: Block) -> None:
    """Replaces a block's attention sub-block by one that adds zero."""
    _replace(block, block.family.attention, NoAttention(block.index))


@contextlib.contextmanager
def without_attention(block: Block) -> Iterator[None]:
    """The block as it would be without its attention, for the time of the context."""
    attention = block.part(block.family.attention)
    drop_attention(block)
    try:
        yield
    finally:
        _replace(block, block.family.attention, attention)


def _add_biases(model: PreTrainedModel, repaired: list[str]) -> None:
    for name in repaired:
        path, _, kind = name.rpartition(".")
        linear = cast(nn.Linear, model.get_submodule(path))
        if kind == "bias" and linear.bias is None:
            linear.bias = _parameter(linear.weight, linear.weight.new_zeros(len(linear.weight)))


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


def _planned(block: Block, plan: PruningPlan) -> list[Group]:
    """The block's groups that a plan speaks of."""
    return [group for group in _groups(block) if group.name in plan.keep]


def _groups(block: Block) -> list[Group]:
    """The block's groups of every kind."""
    return [*block.groups("kv_heads"), *block.groups("value_channels")[:-1]]


def _dense_config(model: PreTrainedModel) -> dict[str, Any]:
    previous = plan_of(model)
    return previous.config if previous else model.config.to_diff_dict() | {"model_type": model.config.model_type}


def _parameter(old: Tensor, new: Tensor) -> nn.Parameter:
    """A parameter of new values with the dtype and device of an old one."""
    return nn.Parameter(new.to(old).contiguous(), requires_grad=old.requires_grad)


def _replace(block: Block, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.part(parent), name, module)


def _take_rows(linear: nn.Linear, keep: Tensor) -> nn.Linear:
    keep = keep.to(linear.weight.device)
    linear.weight = _parameter(linear.weight, linear.weight.detach()[keep])
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias, linear.bias.detach()[keep])
    linear.out_features = len(keep)
    return linear


def _take_columns(linear: nn.Linear, keep: Tensor) -> nn.Linear:
    linear.weight = _parameter(linear.weight, linear.weight.detach()[:, keep.to(linear.weight.device)])
    linear.in_features = len(keep)
    return linear


_TAKE = {"out_features": _take_rows, "in_features": _take_columns}


def _remove(module: nn.Module, side: Side, gone: Tensor) -> nn.Module:
    """A projection without some of its inputs or outputs."""
    kept = complement(gone, getattr(module, side))
    if not isinstance(module, Gather | Scatter):
        return _TAKE[side](cast(nn.Linear, module), kept)
    index = module.index.cpu()
    linear = _TAKE[side](module.linear, torch.isin(index, kept).nonzero().flatten())
    return type(module)(linear, torch.isin(kept, index).nonzero().flatten().to(module.index.device), len(kept))


def _vacate(module: nn.Module, side: Side, gone: Tensor) -> nn.Module:
    """A projection that skips some of its inputs or outputs, of the same width to those around it."""
    wrapper, width = {"in_features": Gather, "out_features": Scatter}[side], getattr(module, side)
    if not isinstance(module, wrapper):
        module = wrapper(cast(nn.Linear, module), _everything(module, width), width)
    assert isinstance(module, Gather | Scatter)
    stays = torch.isin(module.index.cpu(), gone, invert=True).nonzero().flatten()
    return wrapper(_TAKE[side](module.linear, stays), module.index[stays.to(module.index.device)], width)


def _everything(module: nn.Module, width: int) -> Tensor:
    """All indices; on the CPU while the weight is on meta, as an index must hold values."""
    device = innermost(module).weight.device
    return torch.arange(width, device=None if device.type == "meta" else device)


def _set_counts(block: Block, kv_heads: int) -> None:
    heads = kv_heads * block.queries_per_head
    for path, what in block.family.counts.items():
        owner, _, attribute = path.rpartition(".")
        count = heads if what == "heads" else kv_heads
        if owner.endswith(".config"):
            holder = block.part(owner.removesuffix(".config"))
            cast(Any, holder).config = BlockConfig(holder.config, **{attribute: count})
        else:
            setattr(block.part(owner), attribute, count)
