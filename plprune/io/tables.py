"""Tables for a terminal."""

from collections.abc import Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """Rows in columns, the first flush left, the others right.

    Args:
        rows: Cells; a row may be shorter than others.
        widths: Of each column at least; one is wider where its cells need it.

    Example:
        >>> print(aligned([["model", "size"], ["dense", "1,000"]], [8, 5]))
        model     size
        dense    1,000
    """
    needed = [1 + max(map(len, cells)) for cells in zip_longest(*rows, fillvalue="")]
    first, *others = map(max, widths, needed)
    lines = [
        f"{row[0]:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], others, strict=False))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
