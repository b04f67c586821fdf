"""Full training of the consumers: the projections whose inputs were pruned, and which a pruning repairs, if anything.

They are where what was lost can be made up for without adapters, and the shapes of the model stay as they are. What is
trained is kept in float32: such a projection computes in it on whatever it is given, and hands on what the rest of the
model computes in. It is saved in the dtype of the rest.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.attached import attach, attached
from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.families import family_of
from plprune.architecture.modules import innermost
from plprune.pruning.plan import PruningPlan


@dataclass(frozen=True)
class SavedDtype:
    """Attached to a projection that is kept in float32: the dtype in which it is saved."""

    dtype: torch.dtype


def unfreeze(model: PreTrainedModel, plan: PruningPlan | None) -> list[str]:
    """Has the consumers of all groups that lost units trained, weights and biases, and nothing else; gives their names.

    Args:
        model: Changed in place.
        plan: Says which those are; without it, all are trained.

    Raises:
        ValueError: No group has lost a unit.
    """
    model.requires_grad_(False)
    prefix, names = family_of(model.config).blocks, []
    for block in blocks_of(model):
        for path in consumers(block, plan):
            _free(innermost(block.part(path)))
            names.append(f"{prefix}.{block.index}.{path}")
    if not names:
        raise ValueError("the plan has removed nothing, so there is no consumer to train: set model.train to lora")
    return names


def consumers(block: Block, plan: PruningPlan | None) -> list[str]:
    """Paths of the consumers of a block whose inputs a plan, or one before it, has pruned; of all without a plan."""
    family, there = block.family, block.has_attention
    by_kind = ({"attention": family.output, "value": family.output} if there else {}) | {"ffn": family.ffn_out}
    if plan is None:
        return list(dict.fromkeys(by_kind.values()))
    lost = {name for step in plan.chain() for name, keep in step.keep.items() if len(keep) < step.sizes[name]}
    return list(dict.fromkeys(path for kind, path in by_kind.items() if f"blocks.{block.index}.{kind}" in lost))


def to_saved_dtype(module: nn.Module, value: Tensor) -> Tensor:
    """A parameter's value in the dtype in which it is saved."""
    return value.to(saved_dtype(module, value))


def saved_dtype(module: nn.Module, value: Tensor) -> torch.dtype:
    """The dtype in which a parameter of a module is saved."""
    saved = attached(module, SavedDtype)
    return saved.dtype if saved else value.dtype


@contextlib.contextmanager
def weights_in_saved_dtype(model: nn.Module) -> Iterator[None]:
    """The model with all weights in the dtypes in which they are saved, for the time of the context."""
    kept = [(p, module) for module in model.modules() if attached(module, SavedDtype) for p in module.parameters()]
    full = [p.data for p, _ in kept]
    for parameter, module in kept:
        parameter.data = to_saved_dtype(module, parameter.data)
    try:
        yield
    finally:
        for (parameter, _), value in zip(kept, full, strict=True):
            parameter.data = value


def _free(linear: nn.Linear) -> None:
    linear.requires_grad_(True)
    if linear.weight.dtype == torch.float32:
        return
    attach(linear, SavedDtype(linear.weight.dtype))
    for parameter in linear.parameters():
        parameter.data = parameter.data.float()
    linear.register_forward_pre_hook(_to_own)
    linear.register_forward_hook(_to_others)


def _to_own(linear: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0].to(next(linear.parameters()).dtype)


def _to_others(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return to_saved_dtype(linear, output)
