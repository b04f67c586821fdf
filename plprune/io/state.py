"""Nested lists and dictionaries of tensors, numbers and strings, in one safetensors file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

KEY = "plprune"
VERSION = "2"  # of the file format


def write_state(value: Any, file: Path) -> None:
    """Writes a nested value.

    Raises:
        ValueError: The value holds an object of a type that the format lacks.
    """
    tensors: dict[str, Tensor] = {}
    described = json.dumps(_described(value, tensors))
    save_file(tensors, file, metadata={KEY: described, "version": VERSION})


def read_state(file: Path, device: torch.device | None = None) -> Any:
    """Reads a value that :func:`write_state` wrote; `device` is for tensors that were not on the CPU.

    Raises:
        ValueError: The file is missing or damaged, or another version of plprune wrote it.
    """
    tensors = read_tensors(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("version") != VERSION:
        raise ValueError(f"{file} was written by another version of plprune: start again by --overwrite")
    return _restored(json.loads(metadata[KEY]), tensors, device or torch.device("cpu"))


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "cpu": value.device.type == "cpu"}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_described(v, tensors) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_described(k, tensors), _described(v, tensors)] for k, v in value.items()]}
    raise ValueError(
        f"a {type(value).__name__} cannot be saved for --resume: a statistic's state may hold tensors, numbers, "
        "strings, and lists and dictionaries of them"
    )


def _restored(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content), *_) = value.items()
    if kind == "tensor":
        tensor = tensors[content].clone()
        return tensor if value["cpu"] else tensor.to(device)
    if kind == "dict":
        return {_restored(k, tensors, device): _restored(v, tensors, device) for k, v in content}
    items = [_restored(v, tensors, device) for v in content]
    return tuple(items) if kind == "tuple" else items


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): start again by --overwrite") from error
