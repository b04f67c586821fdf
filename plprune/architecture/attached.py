"""Attaches plprune's states to a module as one attribute, and reads them back by their types."""

from typing import TypeVar

from torch import nn

ATTRIBUTE = "plprune_state"
T = TypeVar("T")


def attach(module: nn.Module, state: object) -> None:
    """Attaches state to a module, instead of any of its type. It is copied with the module, and not saved."""
    setattr(module, ATTRIBUTE, {**getattr(module, ATTRIBUTE, {}), type(state): state})


def attached(module: nn.Module, kind: type[T]) -> T | None:
    """The state that is attached to a module, or None if there is none of this type."""
    states = getattr(module, ATTRIBUTE, {}).values()
    return next((state for state in states if isinstance(state, kind)), None)
