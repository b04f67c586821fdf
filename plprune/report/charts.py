"""Charts as SVG strings, for pages and for files: pure functions of numbers, without a plotting library.

Each chart stands alone: it has a title and a description for people who cannot see it, follows the light or dark
scheme of the reader, and distinguishes nothing by colour alone. Charts of rectangles (`heat_map`, `block_picture`)
place them by percentages, so that they take any width while letters keep their size; the others scale as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

from plprune.architecture.blocks import UNITS
from plprune.io.units import Form, format_value
from plprune.report.svg import (
    HEIGHT,
    LETTER,
    MARGIN,
    WIDTH,
    Axis,
    Scale,
    Shade,
    bar,
    column_names,
    drawing,
    finite,
    marker,
    place_across,
    ticks,
    tooltip,
    words,
)


@dataclass(frozen=True)
class Series:
    """Points of one name and kind.

    Args:
        name: Shown in the legend; series of one name have one colour.
        points: x and y of each.
        colour: Index of the colour and marker.
        kind: Distinguishes series of one name, such as pruned and recovered.
        hollow: Whether markers are hollow and lines dashed.
        spread: The lowest and highest y of each point, where there are several measurements.
        joined: Whether a line connects the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    kind: str = ""
    hollow: bool = False
    spread: Sequence[tuple[float, float]] = ()
    joined: bool = True


@dataclass(frozen=True)
class Blocks:
    """The units that each block keeps.

    Args:
        kept: By kind of unit, how many each block keeps, and how many it had.
        heads: Indices of the attention heads that each block keeps; drawn one by one up to 40 heads.
        importance: Of each block; empty if unknown.
        ranks: The LoRA rank of each block; empty if unknown.
    """

    kept: dict[str, list[tuple[int, int]]]
    heads: list[list[int]] = field(default_factory=list)
    importance: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


def line(series: Sequence[Series], title: str, x: Axis, y: Axis, about: str = "") -> str:
    """Curves without markers."""
    return _plot(series, title, x, y, about, marked=False)


def scatter(series: Sequence[Series], title: str, x: Axis, y: Axis, about: str = "") -> str:
    """Points with markers and ranges, those of a series connected."""
    return _plot(series, title, x, y, about, marked=True)


def bars(
    values: dict[str, float], title: str, about: str = "", form: Form = "number", colours: Sequence[int] = ()
) -> str:
    """A bar for each value, with the value beside it.

    Args:
        values: By name.
        title: Title of the chart.
        about: Description for people who cannot see it.
        form: How the values are written.
        colours: Index of each bar's colour; the first for all if not given.
    """
    left = min(170.0, MARGIN + 8 + LETTER * max(map(len, values), default=0))
    longest = max((v for v in values.values() if finite(v)), default=0) or 1
    room, drawn = WIDTH - left - 84, []
    for i, (name, value) in enumerate(values.items()):
        middle, length = 52 + 34 * i, room * max(0.0, value) / longest if finite(value) else 0
        colour = colours[i % len(colours)] if colours else 0
        drawn.append(words(left - 8, middle + 4, name, "end"))
        drawn.append(
            f'<rect class="s{colour}" x="{left:.1f}" y="{middle - 10}" width="{max(length, 1):.1f}" height="20" rx="3" '
            f'data-value="{escape(str(value))}">{tooltip(f"{name}: {format_value(value, form)}")}</rect>'
        )
        drawn.append(words(left + length + 8, middle + 4, format_value(value, form)))
    return drawing("".join(drawn), title, about, 52 + 34 * len(values))


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    about: str = "",
    form: Form = "number",
    above: float | None = None,
    label: str = "block",
) -> str:
    """A coloured cell for each value; those that are missing are left out.

    Args:
        values: Of each row, by column.
        rows: Names of the rows.
        columns: Names of the columns.
        title: Title of the chart.
        about: Description for people who cannot see it.
        form: How the values are written.
        above: If given, colours follow the logarithm of the distance of a value above it.
        label: The name of the columns' axis.
    """
    shade = Shade([v for row in values for v in row if v is not None and finite(v)], above)
    left, top, tall = 22 + LETTER * max(map(len, rows), default=0), 68, 22 if len(rows) <= 12 else 16
    wide, cells = 1 / max(1, len(columns)), []
    for i, row in enumerate(values):
        for j, value in enumerate(row):  # a cell is a little too wide, and the next one covers the rest
            colour = "bg" if value is None else f"h{shade(value)}"
            tip = "" if value is None else tooltip(f"{rows[i]}, {label} {columns[j]}: {format_value(value, form)}")
            data = "" if value is None else f' data-value="{escape(str(value))}"'
            cells.append(
                f'<rect class="{colour}" {place_across(wide * j, left)} y="{top + tall * i}" width="{100 * wide:.3f}%" '
                f'height="{tall}" stroke="var(--g)"{data}>{tip}</rect>'
            )
    bottom = top + tall * len(rows)
    cells.append(f'<rect class="bg" {place_across(1, left)} y="{top}" width="100%" height="{tall * len(rows)}"/>')
    names = "".join(words(left - 8, top + tall * (i + 0.5) + 4, name, "end") for i, name in enumerate(rows))
    names += words(left - 8, bottom + 17, label, "end", "mu") + column_names(columns, bottom + 17, left)
    return drawing(shade.legend(form) + "".join(cells) + names, title, about, bottom + 30, fluid=True)


def block_picture(blocks: Blocks, title: str, about: str = "") -> str:
    """A column for each block: the units that it keeps and has lost, its importance and its LoRA rank."""
    panels, top = "", 74.0
    for kind, pairs in blocks.kept.items():
        full = max((had for _, had in pairs), default=0)
        cells = kind == UNITS["attention"] and bool(blocks.heads) and full <= 40
        height = min(110, max(44, 12 * full)) if cells else 96
        panels += words(MARGIN, top, f"{kind}, of {full:,}", "start", "mu")
        panels += _heads(pairs, blocks.heads, top + 8, height) if cells else _filled(kind, pairs, full, top + 8, height)
        top += height + 36
    for name, values, colour in (("importance", blocks.importance, 3), ("LoRA rank", blocks.ranks, 4)):
        if values:
            panels += words(MARGIN, top, name, "start", "mu") + _columns(name, values, top + 8, 52, colour)
            top += 52 + 36
    count = max(map(len, [*blocks.kept.values(), blocks.importance, blocks.ranks]), default=0)
    panels += column_names([str(i) for i in range(count)], top - 12)
    legend = "".join(
        f'<rect class="{colour}" x="{MARGIN + 78 * i}" y="36" width="11" height="11" rx="2" stroke="none"/>'
        + words(MARGIN + 17 + 78 * i, 46, word)
        for i, (word, colour) in enumerate((("kept", "s0"), ("removed", "off")))
    )
    return drawing(legend + panels, title, about, top, fluid=True)


def _plot(series: Sequence[Series], title: str, x: Axis, y: Axis, about: str, marked: bool) -> str:
    series = [_drawable(each, x, y) for each in series]
    legend, rows = _legend([each for each in series if each.points], marked)
    left, right, top = 54.0, WIDTH - 18.0, 54.0 + 19 * rows
    bottom = top + HEIGHT - 98
    across = Scale([px for each in series for px, _ in each.points], x, left + 8, right - 8)
    tall = [v for each in series for v in [*(py for _, py in each.points), *(v for pair in each.spread for v in pair)]]
    up = Scale(tall, y, bottom - 6, top + 6)
    body = legend + _grid(across, up, (left, right, top, bottom))
    body += words(MARGIN, 42, y.label + (", log scale" if y.log else ""), "start", "mu")
    body += words(right, bottom + 36, x.label + (", log scale" if x.log else ""), "end", "mu")
    return drawing(body + "".join(_curve(each, across, up, marked) for each in series), title, about, bottom + 46)


def _drawable(series: Series, x: Axis, y: Axis) -> Series:
    """The series without points that are not finite, or not positive where a scale is logarithmic."""

    def fits(value: float, axis: Axis) -> bool:
        return finite(value) and (value > 0 or not axis.log)

    drawn = [i for i, (px, py) in enumerate(series.points) if fits(px, x) and fits(py, y)]
    spread = [series.spread[i] for i in drawn] if series.spread else ()
    return replace(series, points=[series.points[i] for i in drawn], spread=spread)


def _grid(across: Scale, up: Scale, box: tuple[float, float, float, float]) -> str:
    left, right, top, bottom = box
    drawn = []
    for tick in ticks(up.low, up.high, up.axis.log):
        at = up(tick)
        drawn.append(f'<line class="gr" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(words(left - 8, at + 4, format_value(tick, up.axis.form), "end", "mu"))
    for tick in ticks(across.low, across.high, across.axis.log):
        at = across(tick)
        drawn.append(f'<line class="gr" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
        drawn.append(words(at, bottom + 17, format_value(tick, across.axis.form), "middle", "mu"))
    return "".join(drawn)


def _curve(series: Series, across: Scale, up: Scale, marked: bool) -> str:
    colour, drawn = series.colour % 7, []
    places = [(across(px), up(py)) for px, py in series.points]
    if series.joined and len(places) > 1:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        drawn.append(f'<polyline class="ln s{colour}{" da" * series.hollow}" points="{path}"/>')
    for (px, _), (low, high) in zip(places, series.spread, strict=False):
        if low < high:
            drawn.append(f'<path class="ln s{colour}" d="M{px:.1f} {up(low):.1f}V{up(high):.1f}"/>')
    if marked or len(places) == 1:
        for (px, py), (x, y) in zip(places, series.points, strict=True):
            name = ", ".join(filter(None, (series.name, series.kind)))
            tip = f"{name}: {format_value(x, across.axis.form)}, {format_value(y, up.axis.form)}"
            drawn.append(marker(colour, series.hollow, px, py, tip, f' data-x="{x}" data-y="{y}"'))
    return "".join(drawn)


def _legend(series: Sequence[Series], marked: bool) -> tuple[str, int]:
    """The names of series and their kinds, in rows, and how many rows."""
    names = {each.name: (each.colour % 7, False, each.joined) for each in series}
    kinds = {each.kind: (6, each.hollow, each.joined) for each in series if each.kind}
    items = [*(names.items() if len(names) > 1 else []), *(kinds.items() if len(kinds) > 1 else [])]
    drawn, at, row = [], float(MARGIN), 0
    for name, (colour, hollow, joined) in items:
        wide = 28 + LETTER * len(name) + 12
        if at + wide > WIDTH and at > MARGIN:
            at, row = float(MARGIN), row + 1
        middle = 60 + 19 * row
        if joined:
            drawn.append(f'<path class="ln s{colour}{" da" * hollow}" d="M{at:.1f} {middle}h22"/>')
        if marked:
            shape = 0 if name in kinds else colour
            drawn.append(marker(colour, hollow, at + 11, middle, shape=shape))
        drawn.append(words(at + 28, middle + 4, name))
        at += wide
    return "".join(drawn), row + 1 if drawn else 0


def _heads(pairs: Sequence[tuple[int, int]], heads: Sequence[Sequence[int]], top: float, height: float) -> str:
    """A cell for each head."""
    drawn, tall = [], height / max(1, *(had for _, had in pairs))
    for i, ((kept, had), present) in enumerate(zip(pairs, heads, strict=True)):
        tip = f"block {i}: {kept} of {had} heads kept"
        for head in range(had):
            style = "s0" if head in present else "off"
            drawn.append(bar(i, len(pairs), top + tall * head + 1, tall - 2, style, tip))
    return "".join(drawn)


def _filled(kind: str, pairs: Sequence[tuple[int, int]], full: int, top: float, height: float) -> str:
    """A column for each block, filled by the share that it keeps."""
    drawn = []
    for i, (kept, had) in enumerate(pairs):
        tip = f"block {i}: {kept:,} of {had:,} {kind} kept"
        for style, count in (("off", had), ("s0", kept)):
            tall = height * count / max(1, full)
            drawn.append(bar(i, len(pairs), top + height - tall, tall, style, tip, count))
    return "".join(drawn)


def _columns(name: str, values: Sequence[float], top: float, height: float, colour: int) -> str:
    """A column for each value."""
    largest, drawn = max((v for v in values if finite(v)), default=0) or 1, []
    for i, value in enumerate(values):
        tall = height * max(0.02, value / largest) if finite(value) else 0
        tip = f"block {i}: {name} {format_value(value)}"
        drawn.append(bar(i, len(values), top + height - tall, tall, f"s{colour}", tip, value))
    return "".join(drawn)
