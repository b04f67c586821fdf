"""Finds the config of a model without some of its blocks, and the attributes in which modules keep a block's index.

Both are found by building the model from candidate configs, without weights, and comparing it with the deeper one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from plprune.architecture.probing import empty, rebuilt
from plprune.architecture.wrappers import text_config

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # keys of a config


@dataclass(frozen=True)
class Shorter:
    """What changes in a model when blocks leave it.

    Args:
        config: Keys of the config with their new values: the depth, and lists by layer.
        indices: Names of the attributes in which modules of a block keep its index.
    """

    config: dict[str, Any]
    indices: frozenset[str]


def shorter(kind: type[PreTrainedModel], config: PreTrainedConfig, blocks: str, kept: Sequence[int]) -> Shorter:
    """What changes when only some blocks stay.

    Args:
        kind: The model's class before pruning.
        config: Its config.
        blocks: Path of the list of blocks.
        kept: Indices of the blocks that stay, ascending.

    Raises:
        ValueError: No config gives the family's class these blocks, as where a block depends on its place.
    """
    key = kind, config.to_json_string(), tuple(kept)
    if key not in _FOUND:
        _FOUND[key] = _search(kind, config, blocks, kept)
    found = _FOUND[key]
    if found is None:
        raise ValueError(
            f"the config of a {config.model_type!r} model cannot express that blocks "
            f"{', '.join(str(i) for i in range(max(kept) + 1) if i not in kept) or 'at the end'} leave: leave out "
            "`drop_blocks`, or set `drop_attentions` instead"
        )
    return found


_FOUND: dict[tuple[type, str, tuple[int, ...]], Shorter | None] = {}


def _search(kind: type[PreTrainedModel], config: PreTrainedConfig, blocks: str, kept: Sequence[int]) -> Shorter | None:
    dense = empty(kind, config)
    for changes in _candidates(text_config(config).to_dict(), len(dense.get_submodule(blocks)), kept):  # type: ignore[arg-type]
        short = rebuilt(kind, config, changes)
        if short is not None and (indices := _indices(dense, short, blocks, kept)) is not None:
            return Shorter(changes, frozenset(indices))
    return None


def _candidates(values: Mapping[str, Any], depth: int, kept: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Values for the depth and lists by layer; then lists of layers too, and numbers of first layers."""
    plain: dict[str, Any] = {name: len(kept) for name in DEPTHS if values.get(name) == depth}
    lists = {name: list(value) for name, value in values.items() if isinstance(value, list | tuple)}
    plain |= {name: [value[i] for i in kept] for name, value in lists.items() if len(value) == depth}
    layers = {name: value for name, value in lists.items() if value and all(type(i) is int for i in value)}
    named = {
        name: [kept.index(i) for i in value if i in kept]
        for name, value in layers.items()
        if name not in plain and max(value) < depth
    }
    first = {n: sum(i < v for i in kept) for n, v in values.items() if type(v) is int and 0 < v < depth}
    for base in [plain, plain | named] if named else [plain]:
        yield base
        yield from (base | {name: count} for name, count in first.items() if name not in base)


def _indices(dense: nn.Module, short: nn.Module, blocks: str, kept: Sequence[int]) -> set[str] | None:
    """Attributes with the index of a block; None if the shorter model is not the deeper one without some blocks."""
    prefix, ours, found = f"{blocks}.", dict(short.named_modules()), set()
    new_index = {str(old): str(new) for new, old in enumerate(kept)}
    rest = (len(dense.get_submodule(blocks)), len(kept))  # type: ignore[arg-type]
    for name, module in dense.named_modules():
        numbers = rest
        if name.startswith(prefix):
            old, dot, path = name.removeprefix(prefix).partition(".")
            if old not in new_index:
                continue
            name, numbers = f"{prefix}{new_index[old]}{dot}{path}", (int(old), int(new_index[old]))
        other, whole = ours.pop(name, None), numbers is not rest
        same = other is not None and _same_tensors(module, other, whole)
        changed = _changed(module, other, numbers, whole) if other is not None and same else None
        if changed is None:
            return None
        found |= changed if whole else set()
    return None if ours else found


def _same_tensors(one: nn.Module, other: nn.Module, whole: bool) -> bool:
    """Whether two modules are of one type, with parameters of the same shapes, and equal buffers.

    Args:
        one: Of the deeper model.
        other: Of the shorter model.
        whole: Whether the latter needs all buffers of the former. Outside of the blocks it may lack some, as those of a
            kind of attention that no block has any more.
    """
    shapes = [{name: p.shape for name, p in module.named_parameters(recurse=False)} for module in (one, other)]
    buffers = [dict(module.named_buffers(recurse=False)) for module in (one, other)]
    return (
        type(one) is type(other)
        and shapes[0] == shapes[1]
        and (buffers[0].keys() == buffers[1].keys() if whole else buffers[0].keys() >= buffers[1].keys())
        and all(torch.equal(value, buffers[0][name]) for name, value in buffers[1].items())
    )


def _changed(before: nn.Module, after: nn.Module, numbers: tuple[int, int], whole: bool) -> set[str] | None:
    """The attributes that changed from the first number to the second; None if others changed, or left a whole one."""
    old, new = _constants(before), _constants(after)
    names = old.keys() | new.keys() if whole else new.keys()
    changed = {name for name in names if old.get(name) != new.get(name)}
    return changed if all((old.get(name), new.get(name)) == numbers for name in changed) else None


def _constants(module: nn.Module) -> dict[str, Any]:
    kinds = int | float | str | tuple
    return {k: v for k, v in vars(module).items() if isinstance(v, kinds) and not k.startswith("_")}


def renumber(block: nn.Module, indices: frozenset[str], old: int, new: int) -> None:
    """Gives all modules of a block its new index."""
    for module in block.modules():
        for name in indices & vars(module).keys():
            if getattr(module, name) == old:
                setattr(module, name, new)
