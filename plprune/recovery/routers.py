"""Full training of the routers of mixtures of experts, and of nothing else.

Trained weights are kept in float32. Routers compute with them rounded to the dtype in which they are saved, as some
compare and cast what they compute: what is trained is what is saved.
"""

import functools
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.recovery.masters import keep_in_float32, saved_dtype


def unfreeze(model: PreTrainedModel) -> list[str]:
    """Freezes a model in place, except its routers.

    Returns:
        The names of the trained parameters. Those that the family does not train, as biases that correct the choice of
        experts, stay frozen.

    Raises:
        ValueError: No block has a router.
    """
    names = [f"{block.path}.{name}" for block in blocks_of(model) for name in routers(block)]
    if not names:
        raise ValueError("the model has no mixture of experts, so it has no router to train: set model.train to lora")
    model.requires_grad_(False)
    owners: dict[str, nn.Module] = {}
    for name in names:
        model.get_parameter(name).requires_grad_(True)
        path = name.rpartition(".")[0]
        owners[path] = model.get_submodule(path)
    for module in owners.values():
        if keep_in_float32(module):
            cast(Any, module).forward = functools.partial(_rounded_forward, module)
    return names


def routers(block: Block) -> list[str]:
    """Names of the router's trained parameters in a block: what has an entry per expert, besides the experts."""
    if not block.expert_count:
        return []
    own, found = dict(block.module.named_parameters()), block.experts
    paths = [each.path for each in found.units.producers if not each.path.startswith(f"{found.path}.")]
    return [path for path in paths if path in own and own[path].requires_grad]


def _rounded_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs a module's own forward pass with its weights in their saved dtype."""
    names = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    own = vars(module)  # what is there hides a parameter of the same name
    for name in names:
        own[name] = getattr(module, name).to(saved_dtype(module, name))
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        for name in names:
            del own[name]
