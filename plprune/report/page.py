"""The pieces of a page: numbers, tables, sections, and the document around them. Nothing is loaded from elsewhere.

A number is written as `<data value="exact" data-path="/stages/dense/perplexity">20.31</data>`: the path is a JSON
pointer into the record, so that each can be checked against the JSON beside the page. All else that is given is
escaped.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from plprune.io.units import Form, shown

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
STYLE = """
:root{color-scheme:light dark;--bg:#f5f4f0;--card:#fff;--ink:#1d2129;--mute:#5c6370;--rule:#e3e6ea;--soft:#f8f8f6;
--accent:#0072b2;--warn:#8a4b00;--warnbg:#fff3df;--good:#00654a;--goodbg:#e2f4ec}
@media (prefers-color-scheme:dark){:root{--bg:#0f1115;--card:#181b21;--ink:#e8eaee;--mute:#a3abb8;--rule:#2b303a;
--soft:#1e222a;--accent:#56b4e9;--warn:#ffc27a;--warnbg:#33260f;--good:#5fdcb2;--goodbg:#10302a}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:56px}footer{padding:32px 24px 56px;color:var(--mute);font-size:13px}
h1{font-size:clamp(28px,4.4vw,40px);line-height:1.15;letter-spacing:-.02em;margin:4px 0 12px;font-weight:680}
h2{font-size:22px;line-height:1.25;letter-spacing:-.01em;margin:0 0 6px;font-weight:650}
h3{font-size:16px;margin:28px 0 8px;font-weight:650}p{margin:0 0 14px;max-width:70ch}
a{color:var(--accent)}a:focus-visible,summary:focus-visible,.scroll:focus-visible,th button:focus-visible{
outline:2px solid var(--accent);outline-offset:2px}
.eyebrow{font-size:13px;letter-spacing:.06em;text-transform:uppercase;color:var(--mute);font-weight:600}
.lead{color:var(--mute);margin-bottom:16px}.pill{display:inline-block;padding:2px 10px;border-radius:99px;
font-size:13px;font-weight:600;background:var(--goodbg);color:var(--good);vertical-align:middle}
.pill.open{background:var(--warnbg);color:var(--warn)}
.notice{background:var(--warnbg);color:var(--warn);border-radius:10px;padding:12px 16px;margin:16px 0;max-width:none}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;margin:18px 0 4px}nav a{text-decoration:none;padding:4px 0}
nav a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,236px),1fr));gap:16px;margin:24px 0 8px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:16px 18px}
.tile b{display:block;font-size:26px;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:4px 0 2px}
.tile small,.tile span{font-size:13px;color:var(--mute)}
section{margin:44px 0 0;padding-top:26px;border-top:1px solid var(--rule)}section>*:last-child{margin-bottom:0}
.figs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:20px;margin:18px 0;
align-items:start}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:6px;overflow:hidden}
figure.wide{grid-column:1/-1}figure svg{display:block;width:100%;height:auto}figure svg.fluid{height:revert-layer}
figcaption{font-size:13px;color:var(--mute);padding:4px 12px 10px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:12px;margin:14px 0}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:14px}caption{text-align:left;color:var(--mute);font-size:13px;
padding:10px 14px 0}th,td{padding:8px 14px;text-align:right;white-space:nowrap;border-top:1px solid var(--rule)}
thead th,thead td{border-top:0}thead th{color:var(--mute);font-size:13px;font-weight:600;vertical-align:bottom}
th:first-child,td:first-child,td.w,th.w{text-align:left}tbody th{font-weight:500}td.w{white-space:normal;min-width:28ch}
tbody tr:not(.group) th{position:sticky;left:0;background:var(--card)}
tr.group th{background:var(--soft);font-weight:650;text-align:left}.best{font-weight:700}.best .s{font-weight:400}
.s{color:var(--mute)}.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
th button{all:unset;cursor:pointer}th button:hover{color:var(--ink)}th button::after{content:" ↕";opacity:.45}
dl{display:grid;grid-template-columns:fit-content(50%) 1fr;gap:6px 20px;margin:12px 0;font-size:14px}
dt{color:var(--mute);overflow-wrap:anywhere}dd{margin:0;min-width:0;overflow-wrap:anywhere}
.cols{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px 40px}
.said{display:flex;flex-wrap:wrap;gap:1px;background:var(--rule);border:1px solid var(--rule);border-radius:12px;
overflow:hidden;margin:16px 0}.said>div{flex:1 1 240px;background:var(--card);padding:14px 18px;font-size:14px}
.said .prompt{flex-basis:100%;background:var(--soft);font-weight:600}
.said q{quotes:none;white-space:pre-wrap;overflow-wrap:anywhere;display:block}.said h4{margin:0 0 4px;font-size:13px;
color:var(--mute);font-weight:600}
details{margin:14px 0}summary{cursor:pointer;color:var(--accent);font-size:14px;padding:4px 0}
pre{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 18px;overflow-x:auto;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:12px 0}
@media (max-width:600px){main,header,footer{padding-left:16px;padding-right:16px}header{padding-top:32px}
section{margin-top:32px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}th,td{padding:8px 10px}}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--mute:#444;--rule:#ccc;--soft:#f4f4f4;--accent:#0072b2}
nav,summary{display:none}figure,.tile,.said,tr{break-inside:avoid}.scroll,pre{overflow:visible}pre{white-space:pre-wrap}
details::details-content{content-visibility:visible;display:block}body{font-size:12px}}
"""
SCRIPT = """
document.querySelectorAll("table.sorts thead th").forEach((th,n)=>{const b=document.createElement("button");
b.textContent=th.textContent;th.replaceChildren(b);let up=1;b.onclick=()=>{th.closest("table").querySelectorAll("tbody")
.forEach(body=>{const rows=[...body.rows].filter(r=>!r.classList.contains("group"));const of=r=>{const c=r.cells[
th.cellIndex],d=c.querySelector("data");return d?+d.value:c.textContent};rows.sort((p,q)=>{const a=of(p),b=of(q);
return(a>b?1:a<b?-1:0)*up}).forEach(r=>body.append(r))});up=-up}})
"""


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
    text = "∞" if math.isinf(value) else shown(value, form)
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
        return shown(value)
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


def section(name: str, title: str, body: str, lead: str = "") -> str:
    """A part of the page, empty if it has no body."""
    if not body:
        return ""
    told = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{told}{body}</section>'


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


def document(title: str, eyebrow: str, status: str, notice: str, tiles: str, parts: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: Of the run.
        eyebrow: What kind of report it is.
        status: finished, running or stopped.
        notice: What to know before reading on, as HTML.
        tiles: The figures that matter most.
        parts: The sections.
    """
    parts = [part for part in parts if part]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in map(_heading, parts))
    pill = f'<span class="pill{" open" * (status != "finished")}">{escape(status)}</span>' if status else ""
    told = f'<p class="notice" role="status">{notice}</p>' if notice else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        + MARK
        + '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><span class="eyebrow">{escape(eyebrow)}</span> {pill}<h1>{escape(title)}</h1>{told}'
        f'<nav aria-label="Contents">{links}</nav>{f"<div class=tiles>{tiles}</div>" if tiles else ""}</header>'
        f"<main>{''.join(parts)}</main><footer>Written by plprune. The same content is in the JSON file beside this "
        f"page, every number to its last digit.</footer><script>{SCRIPT}</script></body></html>\n"
    )


def _heading(part: str) -> tuple[str, str]:
    name = part.split('id="', 1)[1].split('"', 1)[0]
    return name, part.split("<h2>", 1)[1].split("</h2>", 1)[0]


def _value(record: Any, keys: Iterable[str | int]) -> Any:
    """What is at a path of the record; None if there is nothing."""
    for key in keys:
        if isinstance(record, dict):
            record = record.get(key)
        else:
            record = record[key] if isinstance(record, list) and isinstance(key, int) else None
    return record


def _plain(value: Any) -> str:
    return f"({said(value)})" if isinstance(value, Mapping | list | tuple) else shown(value)


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
