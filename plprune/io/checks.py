"""Checks of settings: each raises ValueError with one line that says what to give."""

import dataclasses
import math
from typing import Any


def check_sizes(**sizes: int | None) -> None:
    """Checks sizes and counts; None stands for a size that is not given."""
    for name, size in sizes.items():
        if size is not None and not 1 <= size < 2**31:
            raise ValueError(f"{name} is {size}, but must be at least 1 and less than 2**31")


def check_seed(seed: int) -> None:
    """Checks a seed against the range that every random generator accepts."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}, but must be at least 0 and less than 2**32")


def check_max_dropped(max_dropped: float) -> None:
    """Checks the share of rows that may be dropped."""
    if not 0 <= max_dropped <= 1:
        raise ValueError(f"max_dropped is {max_dropped}, but it is a share of rows in [0, 1]")


def check_non_negative(**values: float) -> None:
    """Checks rates and the like, which must be finite and at least 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but must be a number that is not negative")


def check_shares(**shares: float) -> None:
    """Checks fractions of which something must be left."""
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"`{name}` is {share}, but must be above 0 and at most 1")


def check_required(settings: Any, within: str = "") -> None:
    """Checks that no setting of a dataclass is None unless its type allows it: parsers accept null for any type.

    The message names the setting, with `within` as its prefix.
    """
    for each in dataclasses.fields(settings):
        if getattr(settings, each.name) is None and "None" not in str(each.type) and "Optional" not in str(each.type):
            raise ValueError(f"{within}{each.name} has no value: give one, or leave it out if it has a default")
