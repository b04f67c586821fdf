"""What settings must be: each check refuses with one line that says what to give."""

import dataclasses
import math
from typing import Any


def check_sizes(**sizes: int | None) -> None:
    """Raises ValueError for a size that cannot be."""
    for name, size in sizes.items():
        if size is not None and not 1 <= size < 2**31:
            raise ValueError(f"{name} is {size}, but must be at least 1 and less than 2**31")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that not every generator takes."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}, but must be at least 0 and less than 2**32")


def check_max_dropped(max_dropped: float) -> None:
    """Raises ValueError for a share of rows that cannot be."""
    if not 0 <= max_dropped <= 1:
        raise ValueError(f"max_dropped is {max_dropped}, but it is a share of rows in [0, 1]")


def check_non_negative(**rates: float) -> None:
    """Raises ValueError for a rate that cannot be."""
    for name, value in rates.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but must be a number that is not negative")


def check_required(settings: Any, within: str = "") -> None:
    """Makes sure that every setting of a dataclass that needs a value has one: parsers let null through to any type.

    Args:
        settings: The dataclass.
        within: What the names in a message begin with.

    Raises:
        ValueError: A setting has none.
    """
    for each in dataclasses.fields(settings):
        if getattr(settings, each.name) is None and "None" not in str(each.type) and "Optional" not in str(each.type):
            raise ValueError(f"{within}{each.name} has no value: give one, or leave it out if it has a default")
