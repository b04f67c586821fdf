"""Numbers with units: formatting for people, and parsing of what people write."""

import math
import re
from typing import Literal

Form = Literal["number", "count", "short", "percent", "bytes", "score", "signed"]
LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))  # for bytes, B is written G


def format_value(value: object, form: Form = "number") -> str:
    """A number as text; other values as `str` writes them.

    Args:
        value: The number.
        form: `number` (four digits), `count` (all digits), `short` (134.5M), `percent` (1 is 100%), `bytes`, `score`
            (four decimals), `signed` (a score with its sign).

    Example:
        >>> [format_value(134515008, form) for form in ("number", "short", "bytes")], format_value(0.25, "percent")
        (['134,515,008', '134.5M', '134.5 MB'], '25.0%')
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
    """A time in seconds, minutes, hours or days.

    Example:
        >>> format_duration(0.2), format_duration(75), format_duration(3 * 3600), format_duration(86400 * 20)
        ('1 s', '75 s', '3.0 hours', '20 days')
    """
    if seconds < 99.5:
        return f"{max(1, seconds):.0f} s"
    for name, size in (("minutes", 60), ("hours", 3600)):
        if seconds < 99.5 * size and (name == "hours" or seconds < 5400):
            return f"{seconds / size:.2g} {name}" if seconds / size >= 10 else f"{seconds / size:.1f} {name}"
    return f"{seconds / 86400:.0f} days"


PREFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "B": 3, "T": 4}  # powers of 1000, or of 1024 with an i


def parse_amount(given: int | float | str, name: str, unit: str = "") -> int:
    """A positive number of parameters or bytes, written with or without a prefix: 5.0B, 100M, 8GiB.

    Args:
        given: The number as the user wrote it.
        name: The name of the setting, for the error.
        unit: "B" for bytes, which may follow the prefix; only bytes take the prefixes Ki, Mi, Gi and Ti.

    Raises:
        ValueError: `given` is not a positive amount.

    Example:
        >>> parse_amount("5.0B", "target.parameters"), parse_amount("8GiB", "target.memory", "B")
        (5000000000, 8589934592)
    """
    pattern = rf"([\d.]+(?:e\d+)?) *([KMGBT]?)(i?){unit and '(?:B)?'}"
    found = re.fullmatch(pattern, str(given).strip(), re.IGNORECASE)
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    prefix, binary = (found[2].upper(), bool(found[3])) if found else ("", False)
    if prefix == "B" and unit:  # bytes, not billions
        prefix = ""
    if not 0 < value < math.inf or (binary and not (unit and prefix)):
        like = "8GiB or 500MB" if unit else "5.0B, 100M or 100000000"
        raise ValueError(f"{name} is {given!r}, but it is an amount like {like}")
    return round(value * (1024 if binary else 1000) ** PREFIXES[prefix])
