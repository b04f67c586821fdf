"""Reads the safetensors files of a folder, indexes them, and checks them after a save.

A model counts as saved if the files, read back, equal memory byte for byte, and if the structures that `config.json`
and the plan describe have exactly these tensors.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from plprune.architecture.modules import says_tied, tie, tied
from plprune.checkpoint.published import Source, sources
from plprune.checkpoint.stock_config import config_from, pruned_skeleton, skeleton
from plprune.io.units import format_value
from plprune.pruning.journal import NotFinite
from plprune.pruning.plan import FILE, PruningPlan

log = logging.getLogger(__name__)
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
LONG = 1 << 30  # bytes above which reading back takes a while
CHUNK = 1 << 24  # bytes that are copied at once
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class TensorEntry(NamedTuple):
    """Where a tensor is stored, its dtype (None if it holds no floats) and its shape."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]


Entries = Mapping[str, TensorEntry]  # tensors by their stored names


def listed_files(folder: Path, single: str = SINGLE) -> list[Path]:
    """The files with a folder's weights, as transformers finds them.

    Args:
        folder: The folder.
        single: The name of a file that holds all weights; if it does not exist, an index lists the files.

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


def tensor_entries(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """Lists the tensors of safetensors files.

    Raises:
        ValueError: A file is missing or damaged.
    """
    entries = {}
    for file in files:
        with open_safetensors(file) as reader:
            for name in reader.keys():  # noqa: SIM118
                part = reader.get_slice(name)
                entries[name] = TensorEntry(file, (FLOATS | FP8).get(part.get_dtype()), tuple(part.get_shape()))
    return entries


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Opens a safetensors file.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing, truncated or corrupted ({error}): get or save the model again") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, memory-mapped for as long as the tensor lives."""
    with open_safetensors(file) as reader:
        return reader.get_tensor(name)


def align(path: Path) -> None:
    """Moves the values of tensors in a safetensors file to multiples of 64 bytes, as they may be used where they lie.

    Kernels of experts compute with unaligned weights by another way, whose last bits differ. Tensors of other lengths,
    as biases of routers, come last.
    """
    with path.open("rb") as old:
        size = int.from_bytes(old.read(8), "little")
        header = json.loads(old.read(size))
        places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        order = sorted(places, key=lambda name: ((places[name][1] - places[name][0]) % 64 != 0, places[name]))
        end = 0
        for name in order:
            length = places[name][1] - places[name][0]
            header[name]["data_offsets"] = [end, end := end + length]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        aligned = path.with_name(f"{path.name}.aligned")
        with aligned.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                start, stop = places[name]
                old.seek(8 + size + start)
                for left in range(stop - start, 0, -CHUNK):
                    new.write(old.read(min(left, CHUNK)))
    aligned.replace(path)


def write_index(folder: Path, names: Sequence[str]) -> None:
    """Writes which file holds which tensor; without it, vLLM reads every safetensors file as weights, the plan too."""
    files = [folder / name for name in names]
    index = {
        "metadata": {"total_size": sum(file.stat().st_size for file in files)},
        "weight_map": {name: entry.file.name for name, entry in tensor_entries(files).items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def without_tied(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with one name for each parameter: of tied ones, that of the embedding, wherever the head stands."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    heads = model.get_expanded_tied_weights_keys(all_submodels=True)
    second = {name for each in names.values() for name in sorted(each, key=lambda name: name in heads)[1:]}
    return {name: value for name, value in state.items() if name not in second}


def has_untied_head(folder: Path, model: PreTrainedModel) -> bool:
    """Whether a folder's output head differs from its embedding, though its configuration ties them."""
    files = listed_files(folder)
    if not model.get_expanded_tied_weights_keys(all_submodels=True) or not all(file.exists() for file in files):
        return False
    entries = tensor_entries(files)
    return _head_differs(model, entries, sources(model, _shapes(entries)))


def _head_differs(model: PreTrainedModel, entries: Entries, found: Mapping[str, Source]) -> bool:
    def stored(name: str) -> Tensor | None:
        return found[name].make(lambda key: read_tensor(entries[key].file, key)) if name in found else None

    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    return any(are_untied(stored(head), stored(embedding)) for head, embedding in pairs.items())


def _shapes(entries: Entries) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in entries.items()}


def are_untied(head: Tensor | None, embedding: Tensor | None) -> bool:
    """Whether both tensors exist, and differ."""
    return head is not None and embedding is not None and not torch.equal(head, embedding)


def check_saved(folder: Path, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Checks that a folder loads as the model that is in memory.

    Args:
        folder: The folder that was written.
        model: The model, of which only the structure is used.
        tensors: Its weights and indices, by name.

    Raises:
        ValueError: A value is not finite, or `config.json` or the plan describe another structure.
        OSError: The files differ from memory.
    """
    entries, described = tensor_entries(listed_files(folder)), _skeleton_of_config(folder)
    found = sources(described, _shapes(entries))
    _check_structure(entries, found, described, tied(model), "config.json")
    if (folder / FILE).exists():
        structure = pruned_skeleton(PruningPlan.load(folder))
        own = sources(structure, _shapes(entries))
        tie(structure, says_tied(structure.config) and not _head_differs(structure, entries, own))
        _check_structure(entries, own, structure, tied(model), FILE)
    check_values(folder, tensors, found)


def check_values(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], found: Mapping[str, Source] = MappingProxyType({})
) -> None:
    """Checks that a folder holds these tensors, byte for byte, all finite, and no others except zero biases.

    Args:
        folder: The folder.
        tensors: By their names in the model.
        found: What these are made from, where names or tensors differ in the folder.

    Raises:
        ValueError: A value is not finite, or there is another tensor.
        OSError: The files differ from memory.
    """
    files = listed_files(folder)
    entries, size = tensor_entries(files), sum(file.stat().st_size for file in files)
    left = dict(entries)

    def read(name: str) -> Tensor:
        left.pop(name, None)
        return read_tensor(entries[name].file, name)

    if size > LONG:
        log.info("reading %s back to compare the files with memory", format_value(size, "bytes"))
    for name, tensor in tensors:
        check_finite(name, tensor)
        stored = found[name].make(read) if name in found else read(name) if name in entries else None
        if stored is None or not _same_bytes(stored, tensor.detach().cpu()):
            raise OSError(f"{name} differs between the disk and memory: nothing was saved; check the disk")
    for name, entry in left.items():
        if not name.endswith(".bias") or read_tensor(entry.file, name).any():
            raise ValueError(f"{name} was written, but the model does not have it: nothing was saved")


def check_finite(name: str, tensor: Tensor) -> None:
    """Checks that a tensor to be saved holds no NaN and no infinity.

    Raises:
        NotFinite: It does.
    """
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise NotFinite(
            f"{name} is not finite, it holds NaN or infinity: nothing was saved; prune or train again in float32 or "
            "bfloat16, or at a lower learning rate"
        )


def _skeleton_of_config(folder: Path) -> PreTrainedModel:
    """The model without weights that transformers builds from a folder's `config.json`."""
    try:
        model = skeleton(config_from(PreTrainedConfig.get_config_dict(folder)[0]))  # which holds infinities as words
    except (AttributeError, RuntimeError) as error:  # it names parts that the family does not have
        raise ValueError(f"config.json fits no model ({error}): nothing was saved; merge the adapters first") from error
    tie(model, says_tied(model.config))
    return model


def _check_structure(
    entries: Entries, found: Mapping[str, Source], structure: PreTrainedModel, tied_head: bool, by: str
) -> None:
    """Checks that the structure, as described `by` a file of the folder, has exactly the tensors in the folder."""
    expected = without_tied(structure, structure.state_dict())
    for name, value in expected.items():
        shape = found[name].shape if name in found else "absent"
        if shape != tuple(value.shape):
            raise ValueError(f"{name} is {tuple(value.shape)} by {by} and {shape} in the weights: nothing was saved")
    used = {key for name in expected for key in found[name].keys}
    surplus = [name for name in entries if name not in used and not (by == FILE and name.endswith(".bias"))]
    if surplus:
        raise ValueError(f"{by} has no place for {surplus[0]}: nothing was saved; merge the adapters first")
    if tied(structure) != tied_head:
        raise ValueError(
            f"by {by} the output head is {'not ' if tied_head else ''}tied to the embedding: nothing was saved"
        )


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
