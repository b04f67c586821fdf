"""Charts: the numbers are where they should be, and the files stand alone."""

import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from plprune.io.units import Form, format_value
from plprune.report.charts import Blocks, Series, bars, block_picture, heat_map, line, scatter
from plprune.report.svg import HEIGHT, WIDTH, Axis, ticks

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [(100.0, 30.0), (80.0, 45.0), (60.0, 200.0)]
SERIES = [
    Series("CFSP", POINTS, 0, "recovered", spread=[(29, 31), (40, 50), (190, 210)]),
    Series("CFSP", [(x, 2 * y) for x, y in POINTS], 0, "pruned", hollow=True),
    Series("dense", [(120.0, 20.0)], 6, joined=False),
]
BLOCKS = Blocks({"kv heads": [(2, 3), (0, 3)], "FFN channels": [(10, 16), (16, 16)]}, [[0, 2], []], [1.0, 2.0], [4, 8])
CHARTS = {
    "line": line([Series("loss", [(1, 3.0), (2, 2.5)])], "Loss & more", Axis("step"), Axis("loss")),
    "scatter": scatter(SERIES, "Size", Axis("parameters", "short"), Axis("perplexity", log=True)),
    "bars": bars({"dense": 20.0, "<pruned>": 40.0, "none": math.inf}, "Perplexity"),
    "heat": heat_map([[1.0, None], [4.0, math.inf]], ["ffn", "attention"], ["0", "1"], "Sensitivity", above=0.9),
    "blocks": block_picture(BLOCKS, "Blocks", "What is left"),
}
every_chart = pytest.mark.parametrize("svg", CHARTS.values(), ids=CHARTS)


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def with_data(svg: str, name: str = "data-value") -> list[ET.Element]:
    return [each for each in parsed(svg).iter() if name in each.attrib]


@every_chart
def test_a_chart_is_a_file_of_its_own(svg: str) -> None:
    root = parsed(svg)
    assert root.tag == f"{SVG}svg"
    assert not re.search(r"(href|src|url\()", svg)
    assert "prefers-color-scheme:dark" in svg
    named = root.attrib["aria-labelledby"].split()
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert description is not None
    assert named == [title.attrib["id"], description.attrib["id"]]
    assert title.text
    assert description.text


@every_chart
def test_letters_follow_the_colour_of_the_text(svg: str) -> None:
    assert ".plc text{fill:currentColor}" in svg
    assert not any("fill" in each.attrib for each in parsed(svg).iter(f"{SVG}text"))


def test_points_are_where_their_numbers_are() -> None:
    marks = with_data(CHARTS["scatter"], "data-x")
    assert len(marks) == 7

    def place(mark: ET.Element) -> tuple[float, float]:
        found = re.search(r"translate\((\S+) (\S+)\)", mark.attrib["transform"])
        assert found is not None
        return float(found[1]), float(found[2])

    places = {(float(m.attrib["data-x"]), float(m.attrib["data-y"])): place(m) for m in marks}
    (x1, y1), (x2, y2) = places[60.0, 400.0], places[120.0, 20.0]
    for (x, y), (px, py) in places.items():  # linear across, logarithmic up
        assert px == pytest.approx(x1 + (x - 60) / 60 * (x2 - x1), abs=0.11)
        assert py == pytest.approx(y1 + math.log(y / 400) / math.log(20 / 400) * (y2 - y1), abs=0.11)
        assert 0 < px < WIDTH
        assert 0 < py < HEIGHT + 50


def test_kinds_differ_by_more_than_colour() -> None:
    svg = CHARTS["scatter"]
    assert svg.count(" da") >= 2  # the line and its legend
    assert svg.count(" ho") >= 4
    shapes = {mark.attrib["d"] for mark in with_data(svg, "data-x")}
    assert len(shapes) == 2


def test_what_cannot_be_drawn_is_left_out() -> None:
    points = [(1.0, 2.0), (2.0, math.inf), (3.0, -1.0), (4.0, math.nan)]
    svg = scatter([Series("a", points)], "t", Axis("x"), Axis("y", log=True))
    assert [mark.attrib["data-y"] for mark in with_data(svg, "data-x")] == ["2.0"]
    assert parsed(line([], "nothing", Axis("x"), Axis("y"))) is not None


def test_what_is_no_number_is_escaped() -> None:
    evil: Any = "'\"><script>"
    blocks = Blocks({"FFN channels": [(1, 2)]}, importance=[evil], ranks=[evil])
    drawn = (bars({"a": evil}, "t"), heat_map([[evil]], ["a"], ["b"], "t"), block_picture(blocks, "t"))
    assert not any("<script" in svg for svg in drawn)
    assert all(parsed(svg) is not None for svg in drawn)


def test_bars_are_as_long_as_their_numbers() -> None:
    marks = with_data(CHARTS["bars"])
    assert [float(mark.attrib["data-value"]) for mark in marks] == [20.0, 40.0, math.inf]
    widths = [float(mark.attrib["width"]) for mark in marks]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.11)
    assert "&lt;pruned&gt;" in CHARTS["bars"]


def test_a_heat_map_has_a_cell_for_each_number_and_the_largest_is_darkest() -> None:
    marks = with_data(CHARTS["heat"])
    assert [(mark.attrib["data-value"], mark.attrib["class"]) for mark in marks] == [
        ("1.0", "h0"),
        ("4.0", "h8"),
        ("inf", "h8"),
    ]


def test_blocks_show_what_was_kept() -> None:
    root = parsed(CHARTS["blocks"])
    tips = [title.text for title in root.iter(f"{SVG}title")]
    assert tips.count("block 0: 2 of 3 heads kept") == 3
    assert "block 0: 10 of 16 FFN channels kept" in tips
    cells = [
        each.attrib["class"] for each in root.iter(f"{SVG}rect") if "3 heads" in (each.findtext(f"{SVG}title") or "")
    ]
    assert cells == ["s0", "off", "s0", "off", "off", "off"]
    of = {mark.attrib["data-value"]: float(mark.attrib["height"]) for mark in with_data(CHARTS["blocks"])}
    assert of["10"] / of["16"] == pytest.approx(10 / 16, abs=0.001)
    assert of["4"] / of["8"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.0, "number", "0"),
        (20.3149, "number", "20.31"),
        (1234.56, "number", "1,235"),
        (5e-4, "number", "0.0005"),
        (2.5e-5, "number", "2.50e-05"),
        (123456.7, "number", "123,457"),
        (134_515_008, "short", "134.5M"),
        (5e9, "short", "5B"),
        (12, "short", "12"),
        (134_515_008, "count", "134,515,008"),
        (-0.0125, "percent", "-1.2%"),
        (2_500_000_000, "bytes", "2.5 GB"),
        (0.5, "score", "0.5000"),
        (0.5, "signed", "+0.5000"),
        (None, "number", "-"),
        (True, "number", "yes"),
        ("FLAP", "number", "FLAP"),
        (math.inf, "number", "inf"),
    ],
)
def test_numbers_are_written_for_people(value: Any, form: Form, text: str) -> None:
    assert format_value(value, form) == text


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (21.3, 21.4, False), (1e8, 1.4e8, True), (2, 9e6, True)]
)
def test_ticks_are_few_and_within(low: float, high: float, log: bool) -> None:
    found = ticks(low, high, log)
    assert 2 <= len(found) <= 9
    assert all(low <= tick <= high for tick in found)
    assert found == sorted(set(found))
