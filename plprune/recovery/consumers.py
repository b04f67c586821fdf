"""Full training of the consumers, which are the projections whose inputs were pruned.

Trained projections are kept in float32. They convert their inputs to float32 and their outputs to the model's dtype,
and are saved in the model's dtype.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import innermost
from plprune.pruning.plan import PruningPlan
from plprune.recovery.masters import keep_in_float32, saved_dtype


def unfreeze(model: PreTrainedModel, plan: PruningPlan | None) -> list[str]:
    """Freezes a model in place, except the weights and biases of its pruned consumers.

    Args:
        model: The model.
        plan: The plan that pruned it; without one, all consumers are trained.

    Returns:
        The names of the trained projections.

    Raises:
        ValueError: No projection has lost inputs.
    """
    model.requires_grad_(False)
    names = []
    for block in blocks_of(model):
        for path in consumers(block, plan):
            _unfreeze(innermost(block.part(path)))
            names.append(f"{block.path}.{path}")
    if not names:
        raise ValueError(
            "the plan has removed nothing that a projection reads (experts have none), so no consumer can be trained: "
            "set model.train to lora"
        )
    return names


def consumers(block: Block, plan: PruningPlan | None) -> list[str]:
    """Paths of the consumers in a block that a plan or its predecessors have pruned; without a plan, all consumers."""
    own = [group for group in block.all_groups if not group.kind.startswith("expert")]  # these are stacked
    by_kind = {group.kind: group.consumer.path for group in own}
    if plan is None:
        return list(dict.fromkeys(by_kind.values()))
    pruned = plan.pruned_groups()
    return list(dict.fromkeys(path for kind, path in by_kind.items() if f"blocks.{block.index}.{kind}" in pruned))


def _unfreeze(linear: nn.Linear) -> None:
    linear.requires_grad_(True)
    if keep_in_float32(linear):
        linear.register_forward_pre_hook(_convert_input)
        linear.register_forward_hook(_convert_output)


def _convert_input(linear: nn.Linear, args: tuple[Tensor, ...]) -> Tensor:
    return args[0].to(linear.weight.dtype)


def _convert_output(linear: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(saved_dtype(linear, "weight"))
