"""The names and tensors of a family's published checkpoints, where they are not those that a model computes with.

When transformers loads a checkpoint, it stacks the weights of experts, which lie there one by one, and renames tensors
of older models. Other programs read the checkpoint's tensors only, so a stock folder holds these.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

Read = Callable[[str], Tensor]  # a stored tensor by its name


class Source(NamedTuple):
    """What a tensor of a model is made from.

    Args:
        keys: Names of the stored tensors.
        shape: The shape of the result.
        make: Makes the tensor from those that its argument reads.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[Read], Tensor]


def published(structure: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of published checkpoints for a model's state dict, or for that of some blocks.

    Args:
        structure: A model of the family's own class in the same sizes; its weights are not read.
        state: Tensors by the model's names.
    """
    return revert_weight_conversion(structure, dict(state))


def sources(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """What each tensor of a model is made from, by its name, among stored tensors, by transformers' rules.

    Older files have other names, and add or omit the prefix of the base model.

    Args:
        model: The model; its weights are not read.
        shapes: Of the stored tensors, by their names. The result does not use those with no place in the model.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()
    found: dict[str, Source] = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if key in state:
            name, pattern = key, None
        if pattern is not None:
            groups.setdefault(name, []).append((pattern, key))
        elif name in state and (key == name or name not in shapes):
            found[name] = Source((key,), shapes[key], lambda read, key=key: read(key))
    for first, parts in groups.items():
        converter = next(each for each in converters if parts[0][0] in each.source_patterns)
        with contextlib.suppress(RuntimeError, ValueError):  # some are missing, so that the tensor is absent
            found |= _converted(model, converter, first, parts, shapes)
    return found


def _converted(
    model: PreTrainedModel,
    converter: WeightConverter,
    first: str,
    parts: list[tuple[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Source]:
    """The tensors of a model that are made from several stored ones together.

    Args:
        converter: Makes them.
        first: The name of the first of them.
        parts: Which of the converter's patterns each stored tensor matches, and its name.
    """

    def convert(read: Read) -> dict[str, Tensor]:
        own = copy.deepcopy(converter)
        for pattern, key in parts:
            own.add_tensor(first, key, pattern, read(key))  # type: ignore[arg-type]
        made = own.convert(first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    keys = tuple(key for _, key in parts)
    dry = convert(lambda key: torch.empty(shapes[key], device="meta"))
    return {n: Source(keys, tuple(v.shape), lambda read, n=n: convert(read)[n]) for n, v in dry.items()}
