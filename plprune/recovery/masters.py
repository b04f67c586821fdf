"""Trained weights that are kept in float32, and the dtype in which they are saved."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from plprune.architecture.attached import attach, attached


@dataclass(frozen=True)
class SavedDtypes:
    """Attached to a module with trained parameters in float32: the dtypes in which they are saved, by name."""

    by_name: dict[str, torch.dtype]


def keep_in_float32(module: nn.Module) -> bool:
    """Converts the trained parameters that a module itself has to float32.

    Returns:
        Whether any had another dtype, in which it will be saved.
    """
    own = module.named_parameters(recurse=False)
    trained = {name: p for name, p in own if p.requires_grad and p.dtype != torch.float32}
    if trained:
        attach(module, SavedDtypes({name: p.dtype for name, p in trained.items()}))
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return bool(trained)


def saved_dtype(module: nn.Module, name: str) -> torch.dtype:
    """The dtype in which a parameter of a module is saved."""
    saved, parameter = attached(module, SavedDtypes), module.get_parameter(name)
    return saved.by_name.get(name, parameter.dtype) if saved else parameter.dtype


@contextlib.contextmanager
def weights_in_saved_dtype(model: nn.Module) -> Iterator[None]:
    """Converts all weights to the dtypes in which they are saved, for the duration of the context."""
    owners = [(module, saved) for module in model.modules() if (saved := attached(module, SavedDtypes))]
    kept = [(module.get_parameter(name), dtype) for module, saved in owners for name, dtype in saved.by_name.items()]
    values = [parameter.data for parameter, _ in kept]
    for parameter, dtype in kept:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for (parameter, _), value in zip(kept, values, strict=True):
            parameter.data = value
