"""The page of a sensitivity analysis: the perplexity with each sub-block pruned alone."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from plprune.io.units import format_value
from plprune.report.charts import heat_map
from plprune.report.page import (
    PIECES,
    Figure,
    Section,
    columns,
    document,
    facts,
    figures,
    folded,
    further,
    html_table,
    number,
    provenance,
)
from plprune.report.svg import finite

NAMES = {"attention": "attention", "ffn": "FFN"}
SHOWN = 5  # sub-blocks at each end
CAPTION = (
    "Rows: how much of the attention or the FFN of one block was removed. Darker, or in the dark lighter, is worse."
)


def page(record: dict[str, Any]) -> str:
    """The page of a record of the kind `sensitivity`."""
    cells = record.get("cells") or []
    chart = [Figure(_heat(record, cells), CAPTION, wide=True)] if cells else []
    everything = _table(record, range(len(cells)), "All sub-blocks", "sorts")
    sections = [
        Section("map", "Where it hurts", figures(*chart)),
        Section("ends", "Most and least sensitive", _ends(record, cells)),
        Section("all", "All in numbers", folded("Every sub-block", everything)),
        Section("protocol", "Protocol", facts(record, "protocol") + provenance(record) + further(record)),
    ]
    tiles = [PIECES.tile("Perplexity of the dense model", number(record, "dense"))] if "dense" in record else []
    tiles += [PIECES.tile("Model", str(record["model"]))] if record.get("model") else []
    return document(record, "Sensitivity", "Sensitivity", "measurement", tiles, sections)


def _heat(record: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """The heat map: blocks across, attention and FFN with each fraction down."""
    blocks = sorted({cell["block"] for cell in cells})
    pairs = sorted({(cell["kind"], cell["fraction"]) for cell in cells})
    of = {(c["kind"], c["fraction"], c["block"]): c.get("perplexity") for c in cells}
    values = [[of.get((*pair, block)) for block in blocks] for pair in pairs]
    rows = [f"{NAMES.get(kind, kind)} -{100 * fraction:.0f}%" for kind, fraction in pairs]
    about = f"The dense model has {format_value(record.get('dense'))}. " + " ".join(
        f"{name}: highest {format_value(max(known))} in block {blocks[row.index(max(known))]}."
        for name, row in zip(rows, values, strict=True)
        if (known := [v for v in row if v is not None and finite(v)])
    )
    title = "Perplexity when one sub-block is pruned alone"
    return heat_map(values, rows, [str(block) for block in blocks], title, about, above=record.get("dense"))


def _ends(record: dict[str, Any], cells: Sequence[dict[str, Any]]) -> Markup:
    """The sub-blocks that cost most and least at the largest fraction that was tried."""
    most = max((cell["fraction"] for cell in cells), default=None)
    measured = [i for i, c in enumerate(cells) if c["fraction"] == most and finite(c.get("perplexity"))]
    order = sorted(measured, key=lambda i: cells[i]["perplexity"])
    ends = {"Most sensitive": order[::-1][:SHOWN], "Least sensitive": order[:SHOWN]}
    return columns([("", _table(record, ids, name)) for name, ids in ends.items() if ids])


def _table(record: dict[str, Any], ids: Sequence[int], caption: str, style: str = "") -> Markup:
    rows = []
    for i in ids:
        cell = record["cells"][i]
        units = [number(record, "cells", i, name) for name in ("removed", "units") if name in cell]
        removed = Markup(" of ").join(units) or number(record, "cells", i, "fraction")
        part = NAMES.get(cell["kind"], str(cell["kind"]))
        rows.append([number(record, "cells", i, "block"), part, removed, number(record, "cells", i, "perplexity")])
    return html_table(["block", "part", "removed", "perplexity"], rows, caption, style)
