"""The parts of a report page: numbers, tables, charts, sections, and the document around them.

The templates hold all HTML, and escape what they are given. A page loads nothing from elsewhere. A number is a `data`
element, whose attributes are its exact value and the JSON pointer to it in the record, so that every number can be
checked against the JSON file beside the page.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from plprune.io.units import Form, format_value

Record = Mapping[str, Any]
MARK = 'name="generator" content="plprune"'
FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)
NAMES: dict[Form, tuple[str, ...]] = {  # fields by the form that their numbers are written in
    "count": ("parameters", "block_parameters", "target_parameters", "target_active_parameters"),
    "bytes": ("bytes", "peak", "saturated_peak", "weights", "target_memory"),
    "percent": ("sparsity", "sparsity_of_model", "reached", "fraction"),
    "score": ("value", "stderr", "average", "difference_stderr"),
    "signed": ("difference",),
}
FORMS: dict[str, Form] = {name: form for form, names in NAMES.items() for name in names}
LABELS = {
    "bits_per_byte": "bits per byte",
    "block_parameters": "parameters in blocks",
    "sparsity_of_model": "sparsity of the whole model",
    "bytes": "size of the weights",
    "tokens_per_second": "tokens/s",
    "target_parameters": "target: parameters",
    "target_memory": "target: memory",
    "target_active_parameters": "target: active parameters",
    "first_token": "first token, seconds",
    "reading": "reading, tokens/s",
    "writing": "writing, tokens/s",
    "saturated": "writing at saturation, tokens/s",
    "batch": "batch at saturation",
    "peak": "peak memory, batch 1",
    "saturated_peak": "peak memory, saturated",
}
KNOWN = {  # fields of a record that pages show in their places, or leave out on purpose
    *("version", "kind", "title", "status", "progress", "written", "reason", "process", "model", "protocol", "machine"),
    *("versions", "seeds", "fingerprints", "asked", "reached", "blocks", "stages", "loss", "tasks", "speed", "parity"),
    *("generated", "config", "evaluation", "models", "not_faster", "averages", "differences", "noted"),
    *("cells", "summary", "dense", "fractions"),
}
TEMPLATES = Environment(loader=PackageLoader("plprune.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
PIECES: Any = TEMPLATES.get_template("pieces.html").module  # its macros


class Section(NamedTuple):
    """A section of the page; it is omitted if its body is empty.

    Args:
        id: The target of links to it.
        title: Its heading.
        body: HTML.
        lead: An introduction.
    """

    id: str
    title: str
    body: str
    lead: str = ""


class Figure(NamedTuple):
    """A chart of the page.

    Args:
        svg: The chart; nothing is shown if it is empty.
        caption: A line below it.
        wide: Whether it takes the whole width.
    """

    svg: str
    caption: str = ""
    wide: bool = False


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turns whatever a malformed record causes into an error of one line.

    Raises:
        ValueError: The record is malformed.
    """
    try:
        yield
    except FAULTS as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise ValueError(f"the record is not as plprune writes them ({reason}): write it again") from error


def number(record: Any, *keys: str | int, form: Form | None = None) -> Markup:
    """The value at a path of the record: a number as a `data` element, another value in words, none as a dash."""
    value = _value(record, keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(_words(value))
    forms: list[Form] = [FORMS[key] for key in keys if isinstance(key, str) and key in FORMS]
    form = form or (forms or ["number"])[-1]
    text = "∞" if math.isinf(value) else format_value(value, form)
    return PIECES.number(text, repr(value), pointer(keys), form)


def with_error(record: Any, *keys: str | int, form: Form | None = None) -> Markup:
    """A score with its standard error."""
    score = at(record, *keys)
    text = number(record, *keys, "value", form=form)
    if score.get("value") is None or score.get("stderr") is None:
        return text
    return PIECES.note(text, Markup("± {}").format(number(record, *keys, "stderr")))


def with_range(value: Markup, low: Markup, high: Markup) -> Markup:
    """A number with the range that it is from."""
    return PIECES.note(value, Markup("({} to {})").format(low, high))


def joined(parts: Iterable[str], between: str = ", ") -> Markup:
    """Texts and HTML in one; a dash if there are none."""
    return Markup(between).join(parts) or Markup("-")


def pointer(keys: Iterable[str | int]) -> str:
    """The JSON pointer of a path.

    Example:
        >>> pointer(["tasks", "a/b", 0])
        '/tasks/a~1b/0'
    """
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def label(name: Any) -> str:
    """The name of a field, for people."""
    return LABELS.get(str(name), str(name).replace("_", " "))


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    style: str = "",
    wide: Sequence[int] = (),
) -> Markup:
    """A table that scrolls within its box; nothing if it has no rows.

    Args:
        head: Names of the columns.
        rows: Cells; the first of each row is its name.
        caption: The subject of the table.
        style: Its CSS class.
        wide: Indices of columns of running text.
    """
    rows = list(rows)
    return grouped_table(head, [("", rows)], caption, style, wide) if rows else Markup()


def grouped_table(
    head: Sequence[str],
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]],
    caption: str = "",
    style: str = "",
    wide: Sequence[int] = (),
) -> Markup:
    """A table as by :func:`html_table`, of groups of rows, each below its title."""
    return PIECES.table(head, groups, caption, style, wide)


def facts(record: Any, *keys: str | int) -> Markup:
    """A mapping of the record as names and values."""
    known = [name for name, value in at(record, *keys).items() if value not in (None, {}, [])]
    return PIECES.facts([(label(name), _nested(record, (*keys, name))) for name in known]) if known else Markup()


def fact_columns(record: Any, titles: Mapping[str, Sequence[str]]) -> Markup:
    """Mappings of the record side by side, each by its path below its title; missing ones are left out."""
    return columns([(title, facts(record, *keys)) for title, keys in titles.items() if at(record, *keys)])


def columns(parts: Sequence[tuple[str, str]]) -> Markup:
    """HTML side by side, each below its title."""
    return PIECES.columns(parts) if parts else Markup()


def at(record: Any, *keys: str | int) -> dict[str, Any]:
    """The mapping at a path of the record; empty if there is none."""
    value = _value(record, keys)
    return value if isinstance(value, dict) else {}


def figures(*charts: Figure) -> Markup:
    """Charts side by side, as far as there is room."""
    drawn = [chart for chart in charts if chart.svg]
    return PIECES.figures(drawn) if drawn else Markup()


def folded(summary: str, body: str) -> Markup:
    """HTML that is hidden until the summary is clicked."""
    return PIECES.folded(summary, body) if body else Markup()


def yaml_block(title: str, value: Any) -> Markup:
    """Nested settings as YAML, below a title; nothing if there are none."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return PIECES.code(title, text) if value else Markup()


def provenance(record: Record) -> Markup:
    """Versions, seeds and fingerprints."""
    return fact_columns(record, {name.capitalize(): (name,) for name in ("versions", "seeds", "fingerprints")})


def further(record: Record) -> Markup:
    """The fields of the record that no part of a page shows."""
    more = {key: value for key, value in record.items() if key not in KNOWN and value not in (None, {}, [], "")}
    return yaml_block("Further", more)


def document(
    record: Record, kind: str, untitled: str, what: str, tiles: Sequence[str], sections: Sequence[Section]
) -> str:
    """The whole page.

    Args:
        record: The record.
        kind: The kind of report, above the title.
        untitled: The title of a record that has none.
        what: The subject of the notice that it has not ended.
        tiles: The most important figures, as HTML.
        sections: The parts of the page.
    """
    return TEMPLATES.get_template("page.html").render(
        title=str(record.get("title") or untitled),
        eyebrow=kind,
        status=str(record.get("status") or ""),
        notice=_notice(record, what),
        tiles=[tile for tile in tiles if tile],
        sections=[section for section in sections if section.body],
    )


def _notice(record: Record, what: str) -> str:
    """A notice that the subject of the record has not ended; empty if it has."""
    status, progress = record.get("status"), at(record, "progress")
    if status not in ("running", "stopped"):
        return ""
    step, steps = (number(record, "progress", name) for name in ("step", "steps"))
    reached = Markup(" after {} of {} steps").format(step, steps) if "step" in progress else ""
    reason = f" ({record['reason']})" if record.get("reason") else ""
    word = "was still going" if status == "running" else "was stopped"
    when = f" when this was written, {record.get('written')}" if status == "running" else ""
    text = Markup("This {} {}{}{}{}. Below is what there is so far.")
    return text.format(what, word, reached, reason, when)


def _value(record: Any, keys: Iterable[str | int]) -> Any:
    """The value at a path of the record; None if there is none."""
    for key in keys:
        if isinstance(record, dict):
            record = record.get(key)
        else:
            record = record[key] if isinstance(record, list) and isinstance(key, int) else None
    return record


def _words(value: Any, inner: bool = False) -> str:
    """A value as text; mappings and lists within others are in brackets."""
    if not isinstance(value, Mapping | list | tuple):
        return format_value(value)
    pairs = value.items() if isinstance(value, Mapping) else [("", each) for each in value]
    text = ", ".join(f"{label(name)} {_words(each, True)}".strip() for name, each in pairs) or "-"
    return f"({text})" if inner else text


def _nested(record: Any, path: tuple[str | int, ...]) -> Markup:
    """A value of :func:`facts`; numbers within mappings and lists keep their paths."""
    value = _value(record, path)
    if isinstance(value, dict):
        return joined(Markup("{} {}").format(label(name), _nested(record, (*path, name))) for name in value)
    if isinstance(value, list):
        return joined(_nested(record, (*path, i)) for i in range(len(value)))
    return number(record, *path)
