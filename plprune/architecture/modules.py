"""The modules of a block: where they are, what they are tied to, and their weights as matrices."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def lacks_weights(model: nn.Module) -> bool:
    """Whether this process has the structure of a model only."""
    return any(p.is_meta for p in model.parameters())


Side = Literal["in_features", "out_features"]


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


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a module another parameter under a dotted name."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, last, nn.Parameter(value, requires_grad=getattr(owner, last).requires_grad))


def tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the embedding: by the parameters, whatever the configuration says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and cast(Any, head).weight is cast(Any, embedding).weight


def tie(model: PreTrainedModel, to_embedding: bool) -> None:
    """Makes the output head the embedding or a parameter of its own, and has the configuration say so."""
    if tied(model) and not to_embedding:
        head = cast(Any, model.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = to_embedding
    model.tie_weights()


def innermost(module: nn.Module) -> nn.Linear:
    """The projection itself, inside a gather or scatter, and below LoRA; it may be a `Conv1D`, or a norm."""
    for name in ("linear", "base_layer"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return innermost(inner)
    return cast(nn.Linear, module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection stores its weight as [d_in, d_out]."""
    return isinstance(innermost(module), Conv1D)


def matrix(module: nn.Module) -> Tensor:  # [d_out, d_in]
    """The weight of a projection, inside whatever is around it; a view of it where it is stored transposed."""
    weight = innermost(module).weight
    return weight.T if is_transposed(module) else weight


def width_name(module: nn.Module, side: Side) -> str | None:
    """The attribute in which a projection has the number of its inputs or outputs; a norm has none."""
    name = {"in_features": "nx", "out_features": "nf"}[side] if isinstance(module, Conv1D) else side
    return name if hasattr(module, name) else None


def width(module: nn.Module, side: Side) -> int:
    """How many inputs or outputs a projection has; of a norm, how many values it scales."""
    name = width_name(module, side)
    return len(matrix(module)) if name is None else getattr(module, name)


def kept_rows(module: nn.Module) -> Tensor:
    """The output channels that a projection computes: all of them, unless it is a scatter."""
    return cast(Tensor, module.index).cpu() if hasattr(module, "index") else torch.arange(width(module, "out_features"))


def dense_weight(module: nn.Module) -> Tensor:  # [d_out, d_in]
    """A consumer's weight over all its inputs, with zeros for those that a gather leaves out."""
    weight = matrix(module).detach()
    if not hasattr(module, "index"):
        return weight
    full = weight.new_zeros(len(weight), width(module, "in_features"))
    return full.index_copy_(1, cast(Tensor, module.index), weight)
