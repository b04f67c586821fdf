"""Amounts with their units, as people read and write them."""

import math
import re


def duration(seconds: float) -> str:
    """A time as people write it.

    Example:
        >>> duration(75), duration(3675)
        ('01:15', '1:01:15')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


PREFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "B": 3, "T": 4}


def amount(given: int | float | str, name: str, unit: str = "") -> int:
    """A number that may be given with a prefix: K, M, B or G, T for powers of 1000, and Ki, Mi, Gi, Ti of 1024.

    Args:
        given: What was given.
        name: Of the setting, for the error.
        unit: What may follow the prefix.

    Raises:
        ValueError: It is no positive number.

    Example:
        >>> amount("5.0B", "target_parameters"), amount("8GiB", "target_memory", "B")
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


def shown(number: float, unit: str = "") -> str:
    """A number as people say it: in thousands, millions, billions; of bytes in powers of 1024.

    Example:
        >>> shown(4.98e9), shown(123), shown(8 * 1024**3, "B")
        ('4.98B', '123', '8.00 GiB')
    """
    base, prefixes = (1024, ["", "Ki", "Mi", "Gi", "Ti"]) if unit else (1000, ["", "K", "M", "B", "T"])
    power = 0
    while abs(number) >= 0.9995 * base and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    digits = f"{number:.0f}" if power == 0 else f"{number:.2f}" if abs(number) < 99.5 else f"{number:.0f}"
    return f"{digits} {prefixes[power]}{unit}" if unit else f"{digits}{prefixes[power]}"
