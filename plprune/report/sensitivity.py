"""The page of a sensitivity: the perplexity when one sub-block is pruned and nothing else."""

from html import escape
from typing import Any

from plprune.io.units import format_value
from plprune.report.charts import heat_map
from plprune.report.page import Section, document, facts, figure, figures, folded, number, table, tile
from plprune.report.run import notice, provenance, rest
from plprune.report.svg import finite

KNOWN = {"version", "kind", "title", "status", "progress", "written", "reason", "model", "protocol", "dense"}
KNOWN |= {"fractions", "cells", "versions", "seeds", "fingerprints"}
NAMES = {"attention": "attention", "ffn": "FFN"}
SHOWN = 5  # sub-blocks at each end


def page(record: dict[str, Any]) -> str:
    """The page of a record of the kind `sensitivity`."""
    parts = [
        Section("map", "Where it hurts", _map(record)),
        Section("ends", "Most and least sensitive", _ends(record)),
        Section("all", "All in numbers", folded("Every sub-block", _all(record))),
        Section("protocol", "Protocol", facts(record, "protocol") + provenance(record) + rest(record, KNOWN)),
    ]
    tiles = tile("Perplexity of the dense model", number(record, "dense")) if "dense" in record else ""
    tiles += tile("Model", escape(str(record["model"]))) if record.get("model") else ""
    title, status = str(record.get("title") or "Sensitivity"), str(record.get("status") or "")
    return document(title, "Sensitivity", status, notice(record, "measurement"), tiles, parts)


def heat(record: dict[str, Any]) -> str:
    """The heat map: blocks across, attention and FFN with each fraction down."""
    cells = record.get("cells") or []
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


def _map(record: dict[str, Any]) -> str:
    if not record.get("cells"):
        return ""
    caption = (
        "Rows: how much of the attention or the FFN of one block was removed. Darker, or in the dark lighter, is worse."
    )
    return figures(figure(heat(record), caption, wide=True))


def _ends(record: dict[str, Any]) -> str:
    """The sub-blocks that cost most and least when all of them goes, or as much as was tried."""
    cells = record.get("cells") or []
    most = max((cell["fraction"] for cell in cells), default=None)
    found = [i for i, c in enumerate(cells) if c["fraction"] == most and finite(c.get("perplexity"))]
    order = sorted(found, key=lambda i: cells[i]["perplexity"])
    if not order:
        return ""
    both = (("Most sensitive", order[::-1][:SHOWN]), ("Least sensitive", order[:SHOWN]))
    return '<div class="cols">' + "".join(f"<div>{_table(record, ids, name)}</div>" for name, ids in both) + "</div>"


def _all(record: dict[str, Any]) -> str:
    return _table(record, range(len(record.get("cells") or [])), "All sub-blocks", "sorts")


def _table(record: dict[str, Any], ids: Any, caption: str, style: str = "") -> str:
    cells, rows = record.get("cells") or [], []
    for i in ids:
        units = [number(record, "cells", i, name) for name in ("removed", "units") if name in cells[i]]
        removed = " of ".join(units) or number(record, "cells", i, "fraction")
        part = escape(NAMES.get(cells[i]["kind"], str(cells[i]["kind"])))
        rows.append([number(record, "cells", i, "block"), part, removed, number(record, "cells", i, "perplexity")])
    return table(["block", "part", "removed", "perplexity"], rows, caption, style) if rows else ""
