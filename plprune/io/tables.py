"""Tables as text: for a terminal, and in Markdown."""

from collections.abc import Sequence
from itertools import zip_longest

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows, widths: Sequence[int], flush: str = "<") -> str:
    """Rows in columns.

    Args:
        rows: Cells; a row may be shorter than others.
        widths: Of each column at least; one is wider where its cells need it.
        flush: `<` for each column that is flush left, `>` for one that is flush right, as those behind the last are.

    Example:
        >>> print(aligned([["model", "size"], ["dense", "1,000"]], [8, 5]))
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
    """Rows in Markdown, the first of them as the heading.

    Example:
        >>> print(markdown([["model", "size"], ["dense", "1,000"]]))
        | model | size |
        |---|---|
        | dense | 1,000 |
    """
    heading, *others = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([heading, "|" + "---|" * len(rows[0]), *others])
