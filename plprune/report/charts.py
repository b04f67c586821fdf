"""Charts as SVG strings: pure functions of numbers, without a plotting library, for the report and for files.

Each is complete in itself: it has a title and a description for those who cannot see it, follows a light or a dark
scheme, and never tells by colour alone. The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/),
which people with any kind of colour vision can tell apart, lighter ones of them on dark ground; lines differ by marker.

Where all of a chart is rectangles (`heat_map`, `block_picture`), places across are percentages: it takes any width
while its letters keep their size. The others scale as a whole.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from plprune.io.units import Form, shown

WIDTH, HEIGHT, MARGIN = 460, 300, 16

FLUID = 760  # pixels that a chart of rectangles is wide by itself

LETTER = 7.4  # pixels of a letter, about

STEPS = 9  # colours of a heat map

STYLE = (
    """
.plc{--g:#fff;--k:#1d2129;--m:#5c6370;--r:#e3e6ea;--o:#d5d9df;font:12px system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;color:var(--k);
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b8568f;--s4:#8a6d00;--s5:#5b5f97;--s6:#5c6370;
--h0:#f3f1ea;--h1:#dfe3df;--h2:#c3d3d8;--h3:#a3c1d1;--h4:#80adc9;--h5:#5a97bf;--h6:#377fb0;--h7:#1b6699;--h8:#084a78}
@media (prefers-color-scheme:dark){.plc{--g:#181b21;--k:#e8eaee;--m:#a3abb8;--r:#2b303a;--o:#3b424e;
--s0:#56b4e9;--s1:#ff9150;--s2:#2fc89b;--s3:#e59ac8;--s4:#d8bf4a;--s5:#a9adf0;--s6:#a3abb8;
--h0:#22262e;--h1:#243441;--h2:#264355;--h3:#28546b;--h4:#2b6783;--h5:#327d9f;--h6:#4096bc;--h7:#63b2d5;--h8:#a2d7ee}}
@media print{.plc{--g:#fff;--k:#1d2129;--m:#5c6370;--r:#e3e6ea;--o:#d5d9df}}
.plc text{fill:currentColor}.plc .ti{font-weight:600;font-size:13.5px}.plc .mu{color:var(--m)}
.plc .bg{fill:var(--g)}.plc .gr{stroke:var(--r);stroke-width:1}.plc .off{fill:var(--o)}
.plc .ln{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.plc .da{stroke-dasharray:5 4}
.plc .mk{stroke-width:1.8}.plc .ho{fill:var(--g)!important}
"""
    + "".join(f".plc .s{i}{{fill:var(--s{i});stroke:var(--s{i})}}.plc .ln.s{i}{{fill:none}}" for i in range(7))
    + ("".join(f".plc .h{i}{{fill:var(--h{i})}}" for i in range(STEPS)))
)

MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.6 4.6 3.6h-9.2z",
    "M0-5 5 0 0 5-5 0z",
    "M0 4.6-4.6-3.6h9.2z",
    "M-4.5-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
    "M0-5 1.5-1.6 5-1.4 2.3 1 3.2 4.6 0 2.6-3.2 4.6-2.3 1-5-1.4-1.5-1.6z",
)


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Args:
        name: What they belong to; series of one name have one colour.
        points: x and y of each.
        colour: Which colour and marker, counted from 0.
        kind: Which of several kinds of the same thing it is.
        hollow: Whether markers are hollow and lines dashed, as another kind has them filled.
        spread: The lowest and highest y of each point, where there are several measurements.
        joined: Whether a line connects them.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    kind: str = ""
    hollow: bool = False
    spread: Sequence[tuple[float, float]] = ()
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Args:
        label: The quantity and its unit.
        form: How its numbers are written, a form of `plprune.io.units.shown`.
        log: Whether equal steps are equal ratios.
    """

    label: str
    form: Form = "number"
    log: bool = False


@dataclass(frozen=True)
class Blocks:
    """What is left of each block.

    Args:
        kept: For each kind of unit, how many each block has and had.
        heads: Indices of the attention heads that each block has; drawn where they are not too many.
        importance: Of each block.
        ranks: The LoRA rank of each block.
    """

    kept: dict[str, list[tuple[int, int]]]
    heads: list[list[int]] = field(default_factory=list)
    importance: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


def finite(value: object) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round numbers within a range.

    Example:
        >>> ticks(0.3, 9.8), ticks(7, 900, log=True)
        ([2.0, 4.0, 6.0, 8.0], [10.0, 20.0, 50.0, 100.0, 200.0, 500.0])
    """
    if log and high / low > 3:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = (1, 2, 5) if last - first <= 3 else (1,)
        every = max(1, (last - first) // 6)
        powers = range(first, last + 1, every)
        return [tick for tick in (float(f"{m}e{p}") for p in powers for m in steps) if low <= tick <= high]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line(series: Sequence[Series], title: str, x: Axis, y: Axis, about: str = "") -> str:
    """Curves without markers."""
    return _plot(series, title, x, y, about, marked=False)


def scatter(series: Sequence[Series], title: str, x: Axis, y: Axis, about: str = "") -> str:
    """Points with markers, those of a series connected, and what they spread over."""
    return _plot(series, title, x, y, about, marked=True)


def bars(
    values: dict[str, float], title: str, about: str = "", form: Form = "number", colours: Sequence[int] = ()
) -> str:
    """A bar for each value, with the value beside it.

    Args:
        values: By name.
        title: Of the chart.
        about: What it shows, for those who cannot see it.
        form: How the values are written.
        colours: Of each bar; the first for all if not given.
    """
    left = min(170.0, MARGIN + 8 + LETTER * max(map(len, values), default=0))
    longest = max((v for v in values.values() if finite(v)), default=0) or 1
    room, drawn = WIDTH - left - 84, []
    for i, (name, value) in enumerate(values.items()):
        middle, length = 52 + 34 * i, room * max(0.0, value) / longest if finite(value) else 0
        colour = colours[i % len(colours)] if colours else 0
        drawn.append(_text(left - 8, middle + 4, name, "end"))
        drawn.append(
            f'<rect class="s{colour}" x="{left:.1f}" y="{middle - 10}" width="{max(length, 1):.1f}" height="20" rx="3" '
            f'data-value="{escape(str(value))}">{_tip(f"{name}: {shown(value, form)}")}</rect>'
        )
        drawn.append(_text(left + length + 8, middle + 4, shown(value, form)))
    return _svg("".join(drawn), title, about, 52 + 34 * len(values))


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
        rows: Their names.
        columns: Their names.
        title: Of the chart.
        about: What it shows, for those who cannot see it.
        form: How the values are written.
        above: If given, the colour follows the logarithm of how far a value is above it.
        label: What the columns are.
    """
    shade = _Shade([v for row in values for v in row if v is not None and finite(v)], above)
    left, top, tall = 22 + LETTER * max(map(len, rows), default=0), 68, 22 if len(rows) <= 12 else 16
    wide, cells = 1 / max(1, len(columns)), []
    for i, row in enumerate(values):
        for j, value in enumerate(row):  # a cell is a little too wide, and the next one covers what is too much
            colour = "bg" if value is None else f"h{shade(value)}"
            told = "" if value is None else _tip(f"{rows[i]}, {label} {columns[j]}: {shown(value, form)}")
            data = "" if value is None else f' data-value="{escape(str(value))}"'
            cells.append(
                f'<rect class="{colour}" {_across(wide * j, left)} y="{top + tall * i}" width="{100 * wide:.3f}%" '
                f'height="{tall}" stroke="var(--g)"{data}>{told}</rect>'
            )
    bottom = top + tall * len(rows)
    cells.append(f'<rect class="bg" {_across(1, left)} y="{top}" width="100%" height="{tall * len(rows)}"/>')
    names = "".join(_text(left - 8, top + tall * (i + 0.5) + 4, name, "end") for i, name in enumerate(rows))
    names += _text(left - 8, bottom + 17, label, "end", "mu") + _column_names(columns, bottom + 17, left)
    return _svg(shade.legend(form) + "".join(cells) + names, title, about, bottom + 30, fluid=True)


def block_picture(blocks: Blocks, title: str, about: str = "") -> str:
    """What each block, a column each from the first to the last, has kept and lost; its importance and LoRA rank."""
    panels, top = "", 74.0
    for kind, pairs in blocks.kept.items():
        full = max((had for _, had in pairs), default=0)
        cells = kind == "attention heads" and bool(blocks.heads) and full <= 40
        height = min(110, max(44, 12 * full)) if cells else 96
        panels += _text(MARGIN, top, f"{kind}, of {full:,}", "start", "mu")
        panels += _heads(pairs, blocks.heads, top + 8, height) if cells else _filled(kind, pairs, full, top + 8, height)
        top += height + 36
    for name, values, colour in (("importance", blocks.importance, 3), ("LoRA rank", blocks.ranks, 4)):
        if values:
            panels += _text(MARGIN, top, name, "start", "mu") + _columns(name, values, top + 8, 52, colour)
            top += 52 + 36
    count = max(map(len, [*blocks.kept.values(), blocks.importance, blocks.ranks]), default=0)
    panels += _column_names([str(i) for i in range(count)], top - 12)
    legend = "".join(
        f'<rect class="{colour}" x="{MARGIN + 78 * i}" y="36" width="11" height="11" rx="2" stroke="none"/>'
        + _text(MARGIN + 17 + 78 * i, 46, word)
        for i, (word, colour) in enumerate((("kept", "s0"), ("removed", "off")))
    )
    return _svg(legend + panels, title, about, top, fluid=True)


def _plot(series: Sequence[Series], title: str, x: Axis, y: Axis, about: str, marked: bool) -> str:
    series = [_drawable(each, x, y) for each in series]
    legend, rows = _legend([each for each in series if each.points], marked)
    left, right, top = 54.0, WIDTH - 18.0, 54.0 + 19 * rows
    bottom = top + HEIGHT - 98
    across = _Scale([px for each in series for px, _ in each.points], x, left + 8, right - 8)
    tall = [v for each in series for v in [*(py for _, py in each.points), *(v for pair in each.spread for v in pair)]]
    up = _Scale(tall, y, bottom - 6, top + 6)
    body = legend + _grid(across, up, (left, right, top, bottom))
    body += _text(MARGIN, 42, y.label + (", log scale" if y.log else ""), "start", "mu")
    body += _text(right, bottom + 36, x.label + (", log scale" if x.log else ""), "end", "mu")
    return _svg(body + "".join(_curve(each, across, up, marked) for each in series), title, about, bottom + 46)


class _Scale:
    """From numbers to places."""

    def __init__(self, values: Iterable[float], axis: Axis, start: float, end: float) -> None:
        known = list(values) or [1.0]
        self.low, self.high, self.axis = min(known), max(known), axis
        if self.low == self.high:
            margin = abs(self.low) / 10 or 1.0
            self.low, self.high = self.low - margin, self.high + margin
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        of = math.log if self.axis.log else float
        share = (of(value) - of(self.low)) / (of(self.high) - of(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return ticks(self.low, self.high, self.axis.log)


def _drawable(series: Series, x: Axis, y: Axis) -> Series:
    """The points of a series that are numbers, above 0 where a scale is logarithmic."""
    fine = [
        i
        for i, (px, py) in enumerate(series.points)
        if finite(px) and finite(py) and (px > 0 or not x.log) and (py > 0 or not y.log)
    ]
    spread = [series.spread[i] for i in fine] if series.spread else ()
    points = [series.points[i] for i in fine]
    return replace(series, points=points, spread=spread)


def _grid(across: _Scale, up: _Scale, box: tuple[float, float, float, float]) -> str:
    left, right, top, bottom = box
    drawn = []
    for tick in up.ticks():
        at = up(tick)
        drawn.append(f'<line class="gr" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(_text(left - 8, at + 4, shown(tick, up.axis.form), "end", "mu"))
    for tick in across.ticks():
        at = across(tick)
        drawn.append(f'<line class="gr" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
        drawn.append(_text(at, bottom + 17, shown(tick, across.axis.form), "middle", "mu"))
    return "".join(drawn)


def _curve(series: Series, across: _Scale, up: _Scale, marked: bool) -> str:
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
            tip = f"{name}: {shown(x, across.axis.form)}, {shown(y, up.axis.form)}"
            drawn.append(_marker(colour, series.hollow, px, py, tip, f' data-x="{x}" data-y="{y}"'))
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
            drawn.append(_marker(colour, hollow, at + 11, middle, shape=shape))
        drawn.append(_text(at + 28, middle + 4, name))
        at += wide
    return "".join(drawn), row + 1 if drawn else 0


def _marker(
    colour: int, hollow: bool, x: float, y: float, tip: str = "", data: str = "", shape: int | None = None
) -> str:
    outline = MARKERS[colour if shape is None else shape]
    return (
        f'<path class="mk s{colour}{" ho" * hollow}" transform="translate({x:.1f} {y:.1f})" d="{outline}"{data}>'
        f"{_tip(tip) if tip else ''}</path>"
    )


def _heads(pairs: Sequence[tuple[int, int]], heads: Sequence[Sequence[int]], top: float, height: float) -> str:
    """A cell for each head."""
    drawn, tall = [], height / max(1, *(had for _, had in pairs))
    for i, ((kept, had), present) in enumerate(zip(pairs, heads, strict=True)):
        tip = _tip(f"block {i}: {kept} of {had} heads kept")
        for head in range(had):
            colour = "s0" if head in present else "off"
            place = f'y="{top + tall * head + 1:.1f}" height="{tall - 2:.1f}"'
            drawn.append(f'<rect class="{colour}" {_column(i, len(pairs))} {place}>{tip}</rect>')
    return "".join(drawn)


def _filled(kind: str, pairs: Sequence[tuple[int, int]], full: int, top: float, height: float) -> str:
    """A column for each block, filled as far as it was kept."""
    drawn = []
    for i, (kept, had) in enumerate(pairs):
        tip = _tip(f"block {i}: {kept:,} of {had:,} {kind} kept")
        for colour, count in (("off", had), ("s0", kept)):
            tall = height * count / max(1, full)
            place = f'y="{top + height - tall:.1f}" height="{tall:.1f}" data-value="{count}"'
            drawn.append(f'<rect class="{colour}" {_column(i, len(pairs))} {place}>{tip}</rect>')
    return "".join(drawn)


def _columns(name: str, values: Sequence[float], top: float, height: float, colour: int) -> str:
    """A column for each value."""
    largest, drawn = max((v for v in values if finite(v)), default=0) or 1, []
    for i, value in enumerate(values):
        tall = height * max(0.02, value / largest) if finite(value) else 0
        place = f'y="{top + height - tall:.1f}" height="{tall:.1f}" data-value="{escape(str(value))}"'
        tip = _tip(f"block {i}: {name} {shown(value)}")
        drawn.append(f'<rect class="s{colour}" {_column(i, len(values))} {place}>{tip}</rect>')
    return "".join(drawn)


def _column_names(names: Sequence[str], y: float, left: float = MARGIN) -> str:
    every, wide = max(1, -(-len(names) // 16)), 1 / max(1, len(names))
    return "".join(
        f'<text class="mu" {_across(wide * (i + 0.5), left)} y="{y}" text-anchor="middle">{escape(name)}</text>'
        for i, name in enumerate(names)
        if i % every == 0
    )


def _column(i: int, count: int) -> str:
    """Where a column of several is, with a gap beside it."""
    return f'{_across(i / count, MARGIN)} width="{80 / count:.3f}%" rx="1.5" stroke="none"'


def _across(share: float, left: float, right: float = MARGIN) -> str:
    """A place between margins of so many pixels, whatever the width: the share of it, and then a shift."""
    return f'x="{100 * share:.3f}%" transform="translate({left - (left + right) * share:.2f} 0)"'


class _Shade:
    """From numbers to colours; infinity has the last."""

    def __init__(self, values: Sequence[float], above: float | None) -> None:
        self.low, self.high, self.above = min(values, default=0.0), max(values, default=1.0), above

    def __call__(self, value: float) -> int:
        if not finite(value):
            return STEPS - 1
        value, low, high = map(self._place, (value, self.low, self.high))
        return min(STEPS - 1, int(STEPS * (value - low) / (high - low))) if high > low else 0

    def legend(self, form: Form) -> str:
        note = "" if self.above is None else f" (log scale of what is above {shown(self.above, form)})"
        start, at = shown(self.low, form), MARGIN + LETTER * len(shown(self.low, form)) + 8
        cells = "".join(
            f'<rect class="h{i}" x="{at + 15 * i:.1f}" y="34" width="15" height="12" stroke="var(--o)"/>'
            for i in range(STEPS)
        )
        return _text(MARGIN, 44, start) + cells + _text(at + 15 * STEPS + 8, 44, shown(self.high, form) + note)

    def _place(self, value: float) -> float:
        return value if self.above is None else math.log(max(value - self.above, 0.001 * abs(self.above) + 1e-12))


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _svg(body: str, title: str, about: str, height: float, fluid: bool = False) -> str:
    own = hashlib.sha256((title + about + body).encode()).hexdigest()[:10]
    size = f'width="{FLUID}" height="{height:.0f}"' if fluid else f'viewBox="0 0 {WIDTH} {height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plc{" fluid" * fluid}" {size} role="img" '
        f'aria-labelledby="t{own} d{own}"><title id="t{own}">{escape(title)}</title>'
        f'<desc id="d{own}">{escape(about or title)}</desc><style>{STYLE}</style>'
        f'<rect class="bg" width="100%" height="100%" rx="8"/>{_text(MARGIN, 22, title, "start", "ti")}{body}</svg>'
    )
