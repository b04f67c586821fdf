"""Amounts with their units, as people read and write them."""

import math
import re
from typing import Literal

Form = Literal["number", "count", "short", "percent", "bytes", "score", "signed"]
LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))  # a thousand million bytes are a GB


def format_value(value: object, form: Form = "number") -> str:
    """A number for people; all that is not a number as it is.

    Args:
        value: The number.
        form: `number` (four digits), `count` (all of it), `short` (134.5M), `percent` (of 1), `bytes`, `score`,
            `signed`.

    Example:
        >>> [shown(134515008, form) for form in ("number", "count", "short", "bytes")], shown(0.25, "percent")
        (['134,515,008', '134,515,008', '134.5M', '134.5 MB'], '25.0%')
    """
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if form == "percent":
        return f"{100 * value:.1f}%"
    if form in ("score", "signed"):
        return f"{value:{'+' if form == 'signed' else ''}.4f}"
    if form in ("short", "bytes"):
        size, prefix = next(((size, name) for size, name in LARGE if abs(value) >= 0.99995 * size), (1, ""))
        return f"{value / size:.4g}" + (f" {prefix.replace('B', 'G')}B" if form == "bytes" else prefix)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15) or abs(value) >= 1e4:
        return f"{round(value):,}"
    return f"{value:,.4g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def format_duration(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> duration(0.2), duration(75), duration(3 * 3600), duration(86400 * 20)
        ('1 s', '75 s', '3.0 hours', '20 days')
    """
    if seconds < 99.5:
        return f"{max(1, seconds):.0f} s"
    for name, size in (("minutes", 60), ("hours", 3600)):
        if seconds < 99.5 * size and (name == "hours" or seconds < 5400):
            return f"{seconds / size:.2g} {name}" if seconds / size >= 10 else f"{seconds / size:.1f} {name}"
    return f"{seconds / 86400:.0f} days"


PREFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "B": 3, "T": 4}


def parse_amount(given: int | float | str, name: str, unit: str = "") -> int:
    """A number that may be given with a prefix: K, M, B or G, T for powers of 1000, and Ki, Mi, Gi, Ti of 1024.

    Args:
        given: What was given.
        name: Of the setting, for the error.
        unit: What may follow the prefix.

    Raises:
        ValueError: It is no positive number.

    Example:
        >>> amount("5.0B", "target.parameters"), amount("8GiB", "target.memory", "B")
        (5000000000, 8589934592)
    """
    found = re.fullmatch(rf"([\d.]+(?:e\d+)?) *([KMGBT]?)(i?){unit and '(?:B)?'}", str(given).strip(), re.IGNORECASE)
    with_binary = bool(found and found[3])
    try:
        base = float(found[1]) if found else 0.0
    except ValueError:
        base = 0.0
    prefix = found[2].upper() if found else ""
    if prefix == "B" and unit:  # bytes
        prefix = ""
    if base <= 0 or (with_binary and (not unit or not prefix)) or not math.isfinite(base):
        like = "8GiB or 500MB" if unit else "5.0B, 100M or 100000000"
        raise ValueError(f"{name} is {given!r}, but it is an amount like {like}")
    return round(base * (1024 if with_binary else 1000) ** PREFIXES[prefix])
