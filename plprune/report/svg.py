"""The parts of a chart: its frame, text and markers, and the scales that map numbers to positions.

The colours, in `templates/chart.css`, are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with
any kind of colour vision can tell apart; a dark page has lighter shades of them.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from plprune.io.units import Form, format_value

WIDTH, HEIGHT, MARGIN = 460, 300, 16
FLUID = 760  # width in pixels of a chart of rectangles that stands alone
LETTER = 7.4  # approximate width of a letter in pixels
STEPS = 9  # colours of a heat map

STYLE = resources.files("plprune.report").joinpath("templates", "chart.css").read_text(encoding="utf-8")
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.6 4.6 3.6h-9.2z",
    "M0-5 5 0 0 5-5 0z",
    "M0 4.6-4.6-3.6h9.2z",
    "M-4.5-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
    "M0-5 1.5-1.6 5-1.4 2.3 1 3.2 4.6 0 2.6-3.2 4.6-2.3 1-5-1.4-1.5-1.6z",
)


def finite(value: object) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Axis:
    """The quantity along an axis.

    Args:
        label: The quantity and its unit.
        form: How its numbers are written, as for `plprune.io.units.format_value`.
        log: Whether the scale is logarithmic.
    """

    label: str
    form: Form = "number"
    log: bool = False


class Scale:
    """Maps numbers to positions along an axis."""

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


class Shade:
    """Maps numbers to the colours of a heat map; infinity has the last."""

    def __init__(self, values: Sequence[float], above: float | None) -> None:
        self.low, self.high, self.above = min(values, default=0.0), max(values, default=1.0), above

    def __call__(self, value: float) -> int:
        if not finite(value):
            return STEPS - 1
        value, low, high = map(self._place, (value, self.low, self.high))
        return min(STEPS - 1, int(STEPS * (value - low) / (high - low))) if high > low else 0

    def legend(self, form: Form) -> str:
        note = "" if self.above is None else f" (log scale of what is above {format_value(self.above, form)})"
        start, at = format_value(self.low, form), MARGIN + LETTER * len(format_value(self.low, form)) + 8
        cells = "".join(
            f'<rect class="h{i}" x="{at + 15 * i:.1f}" y="34" width="15" height="12" stroke="var(--o)"/>'
            for i in range(STEPS)
        )
        return words(MARGIN, 44, start) + cells + words(at + 15 * STEPS + 8, 44, format_value(self.high, form) + note)

    def _place(self, value: float) -> float:
        return value if self.above is None else math.log(max(value - self.above, 0.001 * abs(self.above) + 1e-12))


def marker(
    colour: int, hollow: bool, x: float, y: float, tip: str = "", data: str = "", shape: int | None = None
) -> str:
    """The marker of a point, filled or hollow; its shape is that of its colour if not given."""
    outline = MARKERS[colour if shape is None else shape]
    return (
        f'<path class="mk s{colour}{" ho" * hollow}" transform="translate({x:.1f} {y:.1f})" d="{outline}"{data}>'
        f"{tooltip(tip) if tip else ''}</path>"
    )


def column_names(names: Sequence[str], y: float, left: float = MARGIN) -> str:
    """The names below columns, as many as fit."""
    every, wide = max(1, -(-len(names) // 16)), 1 / max(1, len(names))
    return "".join(
        f'<text class="mu" {place_across(wide * (i + 0.5), left)} y="{y}" text-anchor="middle">{escape(name)}</text>'
        for i, name in enumerate(names)
        if i % every == 0
    )


def bar(i: int, count: int, top: float, height: float, style: str, tip: str, value: object = None) -> str:
    """A bar in the i-th of several columns, with a gap beside it."""
    data = "" if value is None else f' data-value="{escape(str(value))}"'
    place = f'{place_across(i / count, MARGIN)} y="{top:.1f}" width="{80 / count:.3f}%" height="{height:.1f}"'
    return f'<rect class="{style}" {place} rx="1.5" stroke="none"{data}>{tooltip(tip)}</rect>'


def place_across(share: float, left: float, right: float = MARGIN) -> str:
    """The x at a share of the width between two margins in pixels, whatever the width."""
    return f'x="{100 * share:.3f}%" transform="translate({left - (left + right) * share:.2f} 0)"'


def words(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    """Text at a place."""
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def tooltip(text: str) -> str:
    """The text that shows when the pointer rests on a mark."""
    return f"<title>{escape(text)}</title>"


def drawing(body: str, title: str, about: str, height: float, fluid: bool = False) -> str:
    """The whole chart, with its title, a description for people who cannot see it, and its style."""
    key = hashlib.sha256((title + about + body).encode()).hexdigest()[:10]
    size = f'width="{FLUID}" height="{height:.0f}"' if fluid else f'viewBox="0 0 {WIDTH} {height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plc{" fluid" * fluid}" {size} role="img" '
        f'aria-labelledby="t{key} d{key}"><title id="t{key}">{escape(title)}</title>'
        f'<desc id="d{key}">{escape(about or title)}</desc><style>{STYLE}</style>'
        f'<rect class="bg" width="100%" height="100%" rx="8"/>{words(MARGIN, 22, title, "start", "ti")}{body}</svg>'
    )
