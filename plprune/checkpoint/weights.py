"""The weights in a folder: safetensors files, the index of what is where, and the proof that they are what was judged.

A model counts as saved when what is on the disk was read back and is, byte for byte, what is in memory, and when the
structures that readers build from the folder's own `config.json` and plan ask for these tensors and no others.
"""

import contextlib
import json
import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform

from plprune.architecture.modules import tie, tied
from plprune.checkpoint.stock_config import config_from, pruned_skeleton, skeleton
from plprune.io.units import format_value
from plprune.pruning.journal import NotFinite
from plprune.pruning.plan import FILE, PruningPlan

log = logging.getLogger(__name__)
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
LONG = 1 << 30  # bytes: reading them back takes a while


def files(folder: Path, single: str = SINGLE) -> list[Path]:
    """The files with a folder's weights, those that transformers reads; none if there are none.

    Args:
        folder: The folder.
        single: The name of a file that holds all of them; where it is not, an index lists those that do.

    Raises:
        ValueError: The index is damaged.
    """
    index = folder / f"{single}.index.json"
    if (folder / single).exists():
        return [folder / single]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{index} is damaged: get the model again") from error


def contents(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Where each weight of a folder is, and its shape.

    Raises:
        ValueError: A file is missing or damaged.
    """
    found = {}
    for file in files(folder):
        with opened(file) as reader:
            for name in reader.keys():  # noqa: SIM118
                found[name] = file, tuple(reader.get_slice(name).get_shape())
    return found


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing, truncated or corrupted ({error}): get or save the model again") from error


def mapped(file: Path, key: str) -> Tensor:
    """One tensor of a file, memory-mapped: the map goes with the tensor."""
    with opened(file) as reader:
        return reader.get_tensor(key)


def write_index(folder: Path, names: list[str]) -> None:
    """Says which file holds what; without it, vLLM takes every safetensors file for weights, the plan too."""
    places, size = {}, 0
    for name in names:
        with opened(folder / name) as reader:
            places |= dict.fromkeys(reader.keys(), name)
        size += (folder / name).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def renamings(model: PreTrainedModel) -> list[WeightTransform]:
    """How a model's parameters were called in older files."""
    return [t.reverse_transform() for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]


def key_of(name: str, there: Collection[str], model: PreTrainedModel, others: list[WeightTransform]) -> str:
    """What files call a parameter: older ones lack the prefix of the base model, or have it where others do not."""
    prefix = f"{model.base_model_prefix}."
    keys = [name, name.removeprefix(prefix), prefix + name, *(r.rename_source_key(name)[0] for r in others)]
    return next((key for key in keys if key in there), name)


def once(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state without the second names of parameters that a model has in two places."""
    second = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {name: value for name, value in state.items() if name not in second}


def has_own_head(folder: Path, model: PreTrainedModel) -> bool:
    """Whether a folder's weights hold an output head that is not the embedding, though its configuration ties them."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not pairs or not all(file.exists() for file in files(folder)):
        return False
    there, others = contents(folder), renamings(model)

    def stored(name: str) -> Tensor | None:
        key = key_of(name, there, model, others)
        return mapped(there[key][0], key) if key in there else None

    return any(differ(stored(head), stored(embedding)) for head, embedding in pairs.items())


def differ(head: Tensor | None, embedding: Tensor | None) -> bool:
    """Whether both are there, and are not the same."""
    return head is not None and embedding is not None and not torch.equal(head, embedding)


def check_saved(folder: Path, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Makes sure that whoever reads a folder gets the model that is in memory.

    Args:
        folder: What was written.
        model: What was to be written: its structure.
        tensors: Its weights and indices, by name.

    Raises:
        ValueError: A value is not finite, or `config.json` or the plan speak of another structure.
        OSError: The disk does not hold what was written.
    """
    _check_structure(folder, _described_by(folder), tied(model), "config.json")
    if (folder / FILE).exists():
        structure = pruned_skeleton(PruningPlan.load(folder))
        tie(structure, structure.config.tie_word_embeddings and not has_own_head(folder, structure))
        _check_structure(folder, structure, tied(model), FILE)
    check_values(folder, tensors)


def check_values(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Makes sure that a folder holds these tensors, byte for byte, all finite, and besides them zero biases at most.

    Raises:
        ValueError: A value is not finite.
        OSError: The disk does not hold what was written.
    """
    left, size = contents(folder), sum(file.stat().st_size for file in files(folder))
    if size > LONG:
        log.info("reading %s back, to compare them with what is in memory", format_value(size, "bytes"))
    for name, tensor in tensors:
        check_finite(name, tensor)
        file, _ = left.pop(name, (None, None))
        if file is None or not _same(mapped(file, name), tensor.detach().cpu()):
            raise OSError(f"{name} is not on the disk as it is in memory: nothing was saved; check the disk")
    for name, (file, _) in left.items():
        if not name.endswith(".bias") or mapped(file, name).any():
            raise ValueError(f"{name} was written, which the model does not have: nothing was saved")


def check_finite(name: str, tensor: Tensor) -> None:
    """Makes sure that there is no NaN and no infinity in what is to be saved.

    Raises:
        NotFinite: There is.
    """
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise NotFinite(
            f"{name} is not finite, it holds NaN or infinity: nothing was saved; prune or train again in float32 or "
            "bfloat16, or at a lower learning rate"
        )


def _described_by(folder: Path) -> PreTrainedModel:
    """The structure that `config.json` gives a model, as transformers builds it."""
    try:
        model = skeleton(config_from(json.loads((folder / "config.json").read_text())))
    except (AttributeError, RuntimeError) as error:  # it speaks of parts that the family does not have
        raise ValueError(f"config.json fits no model ({error}): nothing was saved; merge the adapters first") from error
    tie(model, model.config.tie_word_embeddings)
    return model


def _check_structure(folder: Path, structure: PreTrainedModel, one_head: bool, by: str) -> None:
    """Compares what one of a folder's descriptions asks for with what the folder holds."""
    there = {name: shape for name, (_, shape) in contents(folder).items()}
    asked = once(structure, structure.state_dict())
    for name, value in asked.items():
        shape = there.get(name, "absent")
        if shape != tuple(value.shape):
            raise ValueError(f"{name} is {tuple(value.shape)} by {by} and {shape} in the weights: nothing was saved")
    surplus = [name for name in there if name not in asked and not (by == FILE and name.endswith(".bias"))]
    if surplus:
        raise ValueError(f"{by} has no place for {surplus[0]}: nothing was saved; merge the adapters first")
    if tied(structure) != one_head:
        raise ValueError(f"by {by} the output head is {'' if one_head else 'not '}of its own: nothing was saved")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same in every byte."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
