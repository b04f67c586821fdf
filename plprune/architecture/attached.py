"""Attaches plprune's state to a module as one attribute, and reads it back by its type."""

from typing import TypeVar

from torch import nn

ATTRIBUTE = "plprune_state"
T = TypeVar("T")


def attach(module: nn.Module, state: object) -> None:
    """Attaches state to a module, instead of any that it had. It is copied with the module, and not saved."""
    setattr(module, ATTRIBUTE, state)


def attached(module: nn.Module, kind: type[T]) -> T | None:
    """The state that is attached to a module, or None if there is none of this type."""
    state = getattr(module, ATTRIBUTE, None)
    return state if isinstance(state, kind) else None
