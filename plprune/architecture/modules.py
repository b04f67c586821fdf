"""Moves modules, replaces their forward passes, ties heads to embeddings, and reads projections of every kind as
[d_out, d_in] matrices.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from plprune.architecture.modeling_plprune import returned


def lacks_weights(model: nn.Module) -> bool:
    """Whether some parameters are on the meta device."""
    return any(p.is_meta for p in model.parameters())


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors on the meta device, as the stacked weights of experts may exceed memory before they move."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and not kwargs.get("device"):
            size = args[0] if args and isinstance(args[0], tuple | list) else args
            if all(isinstance(n, int) for n in size) and math.prod(size) > LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


LARGE = 1 << 24  # elements; no buffer has so many


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Builds models whose parameters are on the meta device, and whose buffers are computed on the CPU."""
    with init_empty_weights(include_buffers=False), no_init_weights(), _LargeOnMeta():
        yield


Side = Literal["in_features", "out_features"]


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves the module to `device` for the duration of the context."""
    before = next(module.parameters()).device
    if before == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(before)


@contextlib.contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replaces the modules' forward functions within the context."""
    before = [module.__dict__.get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        cast(Any, module).forward = forward
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                cast(Any, module).forward = forward


def passing(length: int) -> Callable[..., Any]:
    """A forward pass of a block that returns its input, in a tuple of some length unless that is 0."""
    return lambda *args, **kwargs: returned(args[0] if args else kwargs["hidden_states"], length)


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replaces the parameter or buffer with a dotted name, and keeps its `requires_grad`."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, last)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(owner, last, value)


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved with the weights, as what Gemma 4 multiplies blocks by; others follow from configs."""
    buffers = dict(module.named_buffers())
    return {name: buffers[name] for name in module.state_dict() if name in buffers}


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a module itself has by a name, if any."""
    return dict(module.named_parameters(recurse=False)).get(name)


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer that a module itself has by a name, if any."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}.get(name)


def tied(model: PreTrainedModel) -> bool:
    """Whether head and embedding share one parameter, whatever the config says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and cast(Any, head).weight is cast(Any, embedding).weight


def says_tied(config: PreTrainedConfig) -> bool:
    """Whether a config ties the head to the embedding; some have no word on it."""
    return bool(getattr(config, "tie_word_embeddings", False))


def tie(model: PreTrainedModel, to_embedding: bool) -> None:
    """Ties the head to the embedding, or gives it a separate parameter, and updates the config."""
    if tied(model) and not to_embedding:
        head = cast(Any, model.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = to_embedding
    model.tie_weights()


def innermost(module: nn.Module) -> nn.Linear:
    """The projection inside any gather, scatter or LoRA wrapper. Other modules are returned unchanged."""
    for name in ("linear", "base_layer"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return innermost(inner)
    return cast(nn.Linear, module)


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a linear layer, `Conv1D` included, that returns its outputs and nothing else."""
    return isinstance(module, nn.Linear | Conv1D) and (
        type(module).forward in (nn.Linear.forward, Conv1D.forward) or _returns_rows(type(module), module) is not False
    )


def multiplies_groups(module: nn.Module) -> bool:
    """Whether a linear layer of a class of its own multiplies groups of inputs by rows of their own."""
    plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return not plain and _returns_rows(type(module), module) is None


def _returns_rows(kind: type[nn.Module], module: nn.Module) -> bool | None:
    """Whether linear layers of a class return a tensor; None if they want inputs of another shape.

    Some routers are linear layers, and return experts and weights.
    """
    if kind not in _RETURNS:
        tried = cast(nn.Linear, copy.deepcopy(module).to("meta").eval())
        try:
            out = tried(torch.zeros(1, tried.in_features, dtype=tried.weight.dtype, device="meta"))
            _RETURNS[kind] = isinstance(out, Tensor)
        except Exception:  # as the shape is no such
            _RETURNS[kind] = None
    return _RETURNS[kind]


_RETURNS: dict[type[nn.Module], bool | None] = {}


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection stores its weight as [d_in, d_out]."""
    return isinstance(innermost(module), Conv1D)


def matrix(module: nn.Module) -> Tensor:  # [d_out, d_in]
    """The weight of a projection inside any wrapper, as a view if it is stored transposed."""
    weight = innermost(module).weight
    return weight.T if is_transposed(module) else weight


def width_name(module: nn.Module, side: Side) -> str | None:
    """The attribute with the number of a projection's inputs or outputs; None for a norm."""
    name = {"in_features": "nx", "out_features": "nf"}[side] if isinstance(module, Conv1D) else side
    return name if hasattr(module, name) else None


def width(module: nn.Module, side: Side) -> int:
    """The number of a projection's inputs or outputs, or of the values of a norm."""
    name = width_name(module, side)
    return len(matrix(module)) if name is None else getattr(module, name)


def kept_rows(module: nn.Module) -> Tensor:
    """Indices of the output channels that a projection computes: all, except for a scatter."""
    return cast(Tensor, module.index).cpu() if hasattr(module, "index") else torch.arange(width(module, "out_features"))


@contextlib.contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter], wanted: bool) -> Iterator[None]:
    """Includes parameters in gradients, or excludes them, within the context."""
    changed = [p for p in parameters if p.requires_grad != wanted]
    for p in changed:
        p.requires_grad_(wanted)
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(not wanted)


def detached(value: Tensor, meta: bool) -> Tensor:
    """A parameter's values; or their shape alone, on the meta device."""
    return value.detach().to("meta") if meta else value.detach()


def dense_weight(module: nn.Module) -> Tensor:  # [d_out, d_in]
    """A consumer's weight over all its inputs, with zeros for the inputs that a gather skips."""
    weight = matrix(module).detach()
    if not hasattr(module, "index"):
        return weight
    full = weight.new_zeros(len(weight), width(module, "in_features"))
    return full.index_copy_(1, cast(Tensor, module.index), weight)
