"""Removes rows and columns of projections, and values of other parameters.

Smaller parameters replace the old ones. All functions also work on the meta device.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from plprune.architecture.anatomy import Slice, by_producer
from plprune.architecture.modeling_plprune import Gather, Scatter, replace, set_count
from plprune.architecture.modules import Side, innermost, is_transposed, own_tensor, width, width_name


def cut(block: nn.Module, producers: Sequence[Slice], consumer: Slice, counts: Mapping[str, int], keep: Tensor) -> None:
    """Removes all units but some, and updates the attributes that depend on their number.

    Args:
        block: Changed in place.
        producers: The rows of each unit.
        consumer: The columns of each unit.
        counts: Attributes that the forward pass reads, and what each unit has of their values.
        keep: Indices of the units that stay.
    """
    gone = complement(keep, len(consumer.index))
    for (path, axis), index in by_producer(producers).items():
        remove_rows(block, path, axis, index[gone].flatten())
    columns = consumer.index[gone].flatten()
    if held(block, consumer.path) is not None:
        remove_rows(block, consumer.path, consumer.axis, columns)
    else:
        replace(block, consumer.path, remove(block.get_submodule(consumer.path), "in_features", columns))
    _recount(block, counts, len(gone))


def cut_within(
    block: nn.Module, producers: Sequence[Slice], consumer: Slice, counts: Mapping[str, int], keep: Tensor
) -> None:
    """Removes channels within experts, of each expert its own; arguments are those of :func:`cut`, but `keep`.

    Args:
        keep: Indices of the channels that stay of each expert, [experts, channels].
    """
    for (path, axis), index in by_producer([*producers, consumer]).items():
        tensor = cast(Tensor, held(block, path))
        rows = index[keep].flatten(1).sort().values.to(tensor.device)  # [experts, rows]
        shape = [rows.shape[1] if i == axis else n for i, n in enumerate(tensor.shape)]
        places = rows.view([n if i in (0, axis) else 1 for i, n in enumerate(shape)]).expand(shape)
        put(block, path, tensor.detach().gather(axis, places))
    _recount(block, counts, len(consumer.index) - keep.shape[1])


def _recount(block: nn.Module, counts: Mapping[str, int], gone: int) -> None:
    for path, each in counts.items():
        set_count(block, path, operator.attrgetter(path)(block) - each * gone)


def cut_values(block: nn.Module, producer: Slice, consumer: Slice, keep: Tensor) -> None:
    """Removes all value channels but some; the projections keep their outer widths."""
    gone = complement(keep, len(consumer.index))
    sides: tuple[tuple[Slice, Side], ...] = ((producer, "out_features"), (consumer, "in_features"))
    for part, side in sides:
        replace(block, part.path, vacate(block.get_submodule(part.path), side, part.index[gone].flatten()))


def remove_rows(block: nn.Module, path: str, axis: int, rows: Tensor) -> None:
    """Removes rows of the projection, norm or convolution at a path, or of a parameter along an axis."""
    tensor = held(block, path)
    if tensor is None:
        replace(block, path, remove(block.get_submodule(path), "out_features", rows))
        return
    keep = complement(rows, tensor.shape[axis]).to(tensor.device)
    put(block, path, tensor.detach().index_select(axis, keep))


def held(block: nn.Module, path: str) -> Tensor | None:
    """The parameter or buffer at a path; None if there is a module."""
    owner, _, name = path.rpartition(".")
    return own_tensor(block.get_submodule(owner), name)


def put(block: nn.Module, path: str, value: Tensor) -> None:
    """Replaces the values of a parameter or a buffer."""
    owner, _, name = path.rpartition(".")
    old = held(block, path)
    new = like(old, value) if isinstance(old, nn.Parameter) else value.contiguous()
    setattr(block.get_submodule(owner), name, new)


def complement(keep: Tensor, size: int) -> Tensor:
    """The indices below `size` that are not in `keep`, ascending.

    Example:
        >>> complement(torch.tensor([1, 3]), 4)
        tensor([0, 2])
    """
    return torch.ones(size, dtype=torch.bool).index_fill_(0, keep.cpu(), False).nonzero().flatten()


def like(old: Tensor, new: Tensor) -> nn.Parameter:
    """Makes a parameter of new values, with the dtype and device of an old one."""
    return nn.Parameter(new.to(old).contiguous(), requires_grad=old.requires_grad)


def take(module: nn.Module, side: Side, keep: Tensor) -> nn.Linear:
    """Keeps only some inputs or outputs of a projection, or some values of a norm."""
    linear, rows = cast(nn.Linear, module), side == "out_features"
    keep, bias = keep.to(linear.weight.device), getattr(linear, "bias", None)
    axis = int(rows == is_transposed(linear))
    linear.weight = like(linear.weight, linear.weight.detach().index_select(axis, keep))
    if rows and bias is not None:
        linear.bias = like(bias, bias.detach()[keep])
    if name := width_name(linear, side):
        setattr(linear, name, len(keep))
    return linear


def remove(module: nn.Module, side: Side, gone: Tensor) -> nn.Module:
    """Removes some inputs or outputs of a projection."""
    kept = complement(gone, width(module, side))
    if not isinstance(module, Gather | Scatter):
        return take(module, side, kept)
    index = module.index.cpu()
    linear = take(module.linear, side, torch.isin(index, kept).nonzero().flatten())
    return type(module)(linear, torch.isin(kept, index).nonzero().flatten().to(module.index.device), len(kept))


def vacate(module: nn.Module, side: Side, gone: Tensor) -> nn.Module:
    """Removes inputs or outputs of a projection, but keeps its outer width by a gather or scatter."""
    wrapper, full = {"in_features": Gather, "out_features": Scatter}[side], width(module, side)
    if not isinstance(module, wrapper):
        module = wrapper(cast(nn.Linear, module), _everything(module, full), full)
    assert isinstance(module, Gather | Scatter)
    stays = torch.isin(module.index.cpu(), gone, invert=True).nonzero().flatten()
    return wrapper(take(module.linear, side, stays), module.index[stays.to(module.index.device)], full)


def spread(linear: nn.Linear, side: Side, places: Tensor, size: int) -> nn.Linear:
    """Widens a projection to `size`: moves its inputs or outputs to `places`, with zeros elsewhere."""
    weight, axis = linear.weight.detach(), int((side == "out_features") == is_transposed(linear))
    shape = [size if i == axis else n for i, n in enumerate(weight.shape)]
    places = places.to(weight.device)
    linear.weight = like(linear.weight, weight.new_zeros(shape).index_copy(axis, places, weight))
    if side == "out_features" and linear.bias is not None:
        bias = linear.bias.detach()
        linear.bias = like(bias, bias.new_zeros(size).index_copy(0, places, bias))
    setattr(linear, cast(str, width_name(linear, side)), size)
    return linear


def _everything(module: nn.Module, full: int) -> Tensor:
    """All indices, on the weight's device; on the CPU if that is meta, as indices need values."""
    device = innermost(module).weight.device
    return torch.arange(full, device=None if device.type == "meta" else device)
