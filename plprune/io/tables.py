"""Tables as plain text and as Markdown."""

from collections.abc import Sequence
from itertools import zip_longest

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows, widths: Sequence[int], flush: str = "<") -> str:
    """A table in columns, at least one space apart.

    Args:
        rows: Cells by row; rows may differ in length.
        widths: The least width of each column; a column grows with its cells.
        flush: For each column `<` (flush left) or `>` (flush right); columns beyond its length are flush right.

    Example:
        >>> print(text_table([["model", "size"], ["dense", "1,000"]], [8, 5]))
        model     size
        dense    1,000
    """
    needed = [1 + max(map(len, cells)) for cells in zip_longest(*rows, fillvalue="")]
    columns = list(zip(f"{flush:><{len(needed)}}", map(max, widths, needed), strict=True))
    lines = [
        "".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=False)) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Rows) -> str:
    """A Markdown table, whose first row is the heading.

    Example:
        >>> print(markdown_table([["model", "size"], ["dense", "1,000"]]))
        | model | size |
        |---|---|
        | dense | 1,000 |
    """
    heading, *others = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([heading, "|" + "---|" * len(rows[0]), *others])
