"""Trained weights that are kept in float32, and the dtype in which they are saved."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plprune.architecture.attached import attach, attached


@dataclass(frozen=True)
class SavedDtype:
    """Attached to a module whose trained parameters are kept in float32: the dtype in which they are saved."""

    dtype: torch.dtype


def keep_in_float32(module: nn.Module) -> bool:
    """Converts the trained parameters that a module itself has to float32.

    Returns:
        Whether they had another dtype, in which they will be saved.
    """
    trained = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype != torch.float32]
    for parameter in trained:
        attach(module, SavedDtype(parameter.dtype))
        parameter.data = parameter.data.float()
    return bool(trained)


def saved_dtype(module: nn.Module, parameter: Tensor) -> torch.dtype:
    """The dtype in which a parameter of a module is saved."""
    saved = attached(module, SavedDtype)
    return saved.dtype if saved and parameter.requires_grad else parameter.dtype


@contextlib.contextmanager
def weights_in_saved_dtype(model: nn.Module) -> Iterator[None]:
    """Converts all weights to the dtypes in which they are saved, for the duration of the context."""
    owners = [module for module in model.modules() if attached(module, SavedDtype)]
    trained = [(p, module) for module in owners for p in module.parameters(recurse=False)]
    values = [p.data for p, _ in trained]
    for parameter, module in trained:
        parameter.data = parameter.data.to(saved_dtype(module, parameter))
    try:
        yield
    finally:
        for (parameter, _), value in zip(trained, values, strict=True):
            parameter.data = value
