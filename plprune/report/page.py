"""The pieces of a page: numbers, tables, sections, and the document around them. Nothing is loaded from elsewhere.

A number is written as `<data value="exact" data-path="/stages/dense/perplexity">20.31</data>`: the path is a JSON
pointer into the record, so that each can be checked against the JSON beside the page. All else that is given is
escaped.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader

from plprune.io.units import Form, format_value

Record = Mapping[str, Any]
MARK = '<meta name="generator" content="plprune">'
FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)
FORMS: dict[str, Form] = {  # how a field is written, by its name
    "parameters": "count",
    "block_parameters": "count",
    "target_parameters": "count",
    "bytes": "bytes",
    "peak": "bytes",
    "saturated_peak": "bytes",
    "weights": "bytes",
    "target_memory": "bytes",
    "sparsity": "percent",
    "sparsity_of_model": "percent",
    "reached": "percent",
    "fraction": "percent",
    "value": "score",
    "stderr": "score",
    "average": "score",
    "difference": "signed",
    "difference_stderr": "score",
}
LABELS = {
    "bits_per_byte": "bits per byte",
    "block_parameters": "parameters in blocks",
    "sparsity_of_model": "sparsity of the whole model",
    "bytes": "size of the weights",
    "tokens_per_second": "tokens/s",
    "target_parameters": "target: parameters",
    "target_memory": "target: memory",
    "first_token": "first token, seconds",
    "reading": "reading, tokens/s",
    "writing": "writing, tokens/s",
    "saturated": "writing at saturation, tokens/s",
    "batch": "batch at saturation",
    "peak": "peak memory, batch 1",
    "saturated_peak": "peak memory, saturated",
}
TEMPLATES = Environment(loader=PackageLoader("plprune.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


class Section(NamedTuple):
    """A part of the page; one without a body is left out.

    Args:
        id: By which a link finds it.
        title: Its heading.
        body: HTML.
        lead: What to know before reading on.
    """

    id: str
    title: str
    body: str
    lead: str = ""


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Says in one line that a record is not as we write them, whatever that leads to.

    Raises:
        ValueError: It is not.
    """
    try:
        yield
    except FAULTS as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise ValueError(f"the record is not as plprune writes them ({reason}): write it again") from error


def number(record: Any, *keys: str | int, form: Form | None = None) -> str:
    """A value of the record by its path; a number as `data`, all else escaped, and a dash where there is none."""
    value = _value(record, keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(said(value))
    names = [key for key in keys if isinstance(key, str)]
    usual: list[Form] = [FORMS[name] for name in names if name in FORMS]
    form = form or (usual or ["number"])[-1]
    text = "∞" if math.isinf(value) else format_value(value, form)
    return f'<data value="{value!r}" data-path="{escape(pointer(keys))}" data-form="{form}">{text}</data>'


def pointer(keys: Iterable[str | int]) -> str:
    """The JSON pointer of a path.

    Example:
        >>> pointer(["tasks", "a/b", 0])
        '/tasks/a~1b/0'
    """
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def said(value: Any) -> str:
    """A value in words, where it is not one number."""
    if isinstance(value, str | int | float) or value is None:
        return format_value(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{label(key)} {_plain(each)}" for key, each in value.items()) or "-"
    return ", ".join(_plain(each) for each in value) or "-"


def label(name: Any) -> str:
    """The name of a field, for people."""
    return LABELS.get(str(name), str(name).replace("_", " "))


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", style: str = "", wide: Sequence[int] = ()
) -> str:
    """Rows of cells that are HTML already; it scrolls within its own box.

    Args:
        head: Names of the columns, as text.
        rows: Cells; the first of each row is its name.
        caption: What the table shows.
        style: Its class.
        wide: Columns of running text.
    """
    body = "<tbody>" + "".join(row(cells, wide) for cells in rows) + "</tbody>"
    return framed(head, body, caption, style, wide)


def framed(head: Sequence[str], body: str, caption: str = "", style: str = "", wide: Sequence[int] = ()) -> str:
    """A table around rows, in a box that scrolls."""
    cells = "".join(
        f'<th scope="col"{_wide(i, wide)}>{escape(name)}</th>' if name else "<td></td>" for i, name in enumerate(head)
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    named = escape(caption or ", ".join(filter(None, head)))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{named}"><table class="{style}">{told}'
        f"<thead><tr>{cells}</tr></thead>{body}</table></div>"
    )


def row(cells: Sequence[str], wide: Sequence[int] = ()) -> str:
    """A row of a table."""
    rest = "".join(f"<td{_wide(i + 1, wide)}>{cell}</td>" for i, cell in enumerate(cells[1:]))
    return f'<tr><th scope="row">{cells[0]}</th>{rest}</tr>'


def facts(record: Any, *keys: str | int) -> str:
    """A mapping of the record as names and values."""
    place = at(record, *keys)
    there = [(name, (*keys, name)) for name, value in place.items() if value not in (None, {}, [])]
    items = "".join(f"<dt>{escape(label(name))}</dt><dd>{_inner(record, path)}</dd>" for name, path in there)
    return f"<dl>{items}</dl>" if items else ""


def at(record: Any, *keys: str | int) -> dict[str, Any]:
    """A mapping within the record; empty if it is not there."""
    found = _value(record, keys)
    return found if isinstance(found, dict) else {}


def figures(*charts: str) -> str:
    """Charts side by side, as far as there is room."""
    return f'<div class="figs">{"".join(charts)}</div>' if any(charts) else ""


def figure(svg: str, caption: str = "", wide: bool = False) -> str:
    """A chart with what is to be said of it."""
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{' class=wide' * wide}>{svg}{told}</figure>"


def tile(name: str, value: str, below: str = "") -> str:
    """One figure, large; value and what is below are HTML already."""
    return f'<div class="tile"><span>{escape(name)}</span><b>{value}</b><small>{below}</small></div>'


def folded(summary: str, body: str) -> str:
    """What only some want to read."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def as_yaml(value: Any) -> str:
    """Nested settings as YAML."""
    return f"<pre>{escape(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))}</pre>"


def document(title: str, eyebrow: str, status: str, notice: str, tiles: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: Of the run.
        eyebrow: What kind of report it is.
        status: finished, running or stopped.
        notice: What to know before reading on, as HTML.
        tiles: The figures that matter most, as HTML.
        sections: The parts of the page.
    """
    return TEMPLATES.get_template("page.html").render(
        title=title,
        eyebrow=eyebrow,
        status=status,
        notice=notice,
        tiles=tiles,
        sections=[section for section in sections if section.body],
    )


def _value(record: Any, keys: Iterable[str | int]) -> Any:
    """What is at a path of the record; None if there is nothing."""
    for key in keys:
        if isinstance(record, dict):
            record = record.get(key)
        else:
            record = record[key] if isinstance(record, list) and isinstance(key, int) else None
    return record


def _plain(value: Any) -> str:
    return f"({said(value)})" if isinstance(value, Mapping | list | tuple) else format_value(value)


def _inner(record: Any, path: tuple[str | int, ...]) -> str:
    """A value within facts: mappings and lists of numbers keep their paths."""
    value = _value(record, path)
    if isinstance(value, dict):
        return ", ".join(f"{escape(label(name))} {_inner(record, (*path, name))}" for name in value) or "-"
    if isinstance(value, list):
        return ", ".join(_inner(record, (*path, i)) for i in range(len(value))) or "-"
    return number(record, *path)


def _wide(column: int, wide: Sequence[int]) -> str:
    return ' class="w"' if column in wide else ""
