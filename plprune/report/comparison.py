"""The page of a comparison: methods side by side, for each model by itself.

Perplexity is per token, so models with different tokenizers cannot be compared by it. Each model therefore has its own
plots; the only plot that models share is that of bits per byte.
"""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from plprune.report.charts import Series, heat_map, scatter
from plprune.report.page import (
    PIECES,
    Figure,
    Section,
    at,
    document,
    fact_columns,
    figures,
    folded,
    further,
    grouped_table,
    html_table,
    label,
    number,
    provenance,
    with_error,
    with_range,
)
from plprune.report.summary import FIGURES, Row, name_of
from plprune.report.svg import Axis, finite

SHOWN = ("perplexity", "bits_per_byte", "parameters", "reached", "average", "tokens_per_second", "seconds_to_prune")
PLOTS = {  # by name: x, y and the title; drawn where two rows or more have both
    "perplexity": ("parameters", "perplexity", "Perplexity against size"),
    "tasks": ("parameters", "average", "Tasks against size"),
    "speed": ("tokens_per_second", "perplexity", "Speed against perplexity"),
}
AXES = {
    "parameters": Axis("parameters", "short"),
    "perplexity": Axis("perplexity", log=True),
    "average": Axis("mean task score"),
    "tokens_per_second": Axis("tokens/s, batch 1"),
}


def page(record: dict[str, Any]) -> str:
    """The page of a record of the kind `comparison`."""
    rows = record.get("summary") or []
    models = list(dict.fromkeys(row["model"] for row in rows))
    sections = [_all_models(rows, models)] if len(models) > 1 else []
    for i, model in enumerate(models):
        charts = [Figure(svg, wide=' fluid"' in svg) for svg in _model_plots(rows, model).values()]
        sections.append(Section(f"model-{i}", model, figures(*charts) + _methods_table(record, model)))
    protocol = fact_columns(record, {"Protocol": ("protocol",), "Machine": ("machine",)})
    sections += [
        Section("errors", "What could not be done", _errors(record)),
        Section("cells", "Every cell", folded("All in numbers", _cells(record))),
        Section("protocol", "Protocol", protocol + provenance(record) + further(record)),
    ]
    names = ", ".join(_methods(rows))
    tiles = [PIECES.tile("Methods", names)] if names else []
    return document(record, "Comparison", "Comparison", "comparison", tiles, sections)


def plots(record: dict[str, Any]) -> dict[str, str]:
    """The plots of a completed record as SVG, by names that files can have."""
    rows, drawn = record.get("summary") or [], {}
    for model in dict.fromkeys(row["model"] for row in rows):
        stem = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in model)
        drawn |= {f"{stem}-{name}": svg for name, svg in _model_plots(rows, model).items() if svg}
    return drawn


def _all_models(rows: Sequence[Row], models: Sequence[str]) -> Section:
    """The section of all models, which share no plot but that of bits per byte."""
    series = []
    for i, model in enumerate(models):
        for stage in (*_recoveries(rows)[:1], "pruned"):
            own = [row for row in rows if row["model"] == model and row["stage"] in (stage, "dense")]
            points = [(r["parameters"], r["bits_per_byte"]) for r in own if {"parameters", "bits_per_byte"} <= r.keys()]
            if points and any(row["stage"] == stage for row in own):
                series.append(Series(model, points, i, stage, stage == "pruned", joined=False))
    lead = "Perplexity is per token and does not compare across tokenizers: each model has plots of its own below."
    if not series:
        return Section("all", "All models", PIECES.paragraph(lead))
    chart = scatter(series, "Bits per byte against size", Axis("parameters", "short", log=True), Axis("bits per byte"))
    return Section("all", "All models", figures(Figure(chart)), f"{lead} Bits per byte does compare.")


def _methods_table(record: dict[str, Any], model: str) -> Markup:
    """Methods by sparsity; the lowest perplexity of each sparsity and stage is bold."""
    rows = record["summary"]
    ids = [i for i, row in enumerate(rows) if row["model"] == model]
    tasks = list(dict.fromkeys(t for i in ids for t, score in rows[i]["tasks"].items() if not score.get("group")))
    texts = list(dict.fromkeys(text for i in ids for text in rows[i]["texts"]))
    fields = [field for field in SHOWN if any(field in rows[i] for i in ids)]
    seeds = ["seeds"] * any(rows[i]["seeds"] > 1 for i in ids)
    paths = [*((field,) for field in fields), *(("texts", text, "perplexity") for text in texts)]
    stages, groups = ["dense", "pruned", *_recoveries(rows)], []

    def cells(i: int, best: bool) -> list[str]:
        values = [_with_seeds(record, i, *path) for path in paths]
        if best:
            values[0] = PIECES.best(values[0])
        names = [rows[i]["name"], str(rows[i]["stage"]), *(number(record, "summary", i, name) for name in seeds)]
        return [*names, *values, *(with_error(record, "summary", i, "tasks", task) for task in tasks)]

    for sparsity in sorted({rows[i]["sparsity"] for i in ids}):
        own = [i for i in ids if rows[i]["sparsity"] == sparsity]
        own.sort(key=lambda i: (stages.index(rows[i]["stage"]), rows[i]["name"]))
        best = {_best(rows, [i for i in own if rows[i]["stage"] == stage]) for stage in stages}
        removed = Markup("{} of the blocks removed").format(number(record, "summary", own[0], "sparsity"))
        groups.append((removed if sparsity else "Dense", [cells(i, i in best) for i in own]))
    head = ["method", "stage", *seeds, *map(_head, fields), *(f"perplexity on {text}" for text in texts), *tasks]
    return grouped_table(head, groups, f"{model}: all methods; bold is the lowest perplexity of its kind", "sorts")


def _best(rows: Sequence[Row], ids: Sequence[int]) -> int | None:
    """The index of the row with the lowest perplexity; None if there is nothing to compare."""
    known = [i for i in ids if finite(rows[i].get("perplexity"))]
    return min(known, key=lambda i: rows[i]["perplexity"]) if len(known) > 1 else None


def _with_seeds(record: dict[str, Any], i: int, *keys: str) -> Markup:
    """A mean with its range over seeds."""
    *place, field = ("summary", i, *keys)
    text, ends = number(record, *place, field), f"{field}_range"
    if ends not in at(record, *place):
        return text
    form = "percent" if field == "reached" else "count" if field == "parameters" else None
    return with_range(text, *(number(record, *place, ends, j, form=form) for j in (0, 1)))


def _cells(record: dict[str, Any]) -> Markup:
    cells = record.get("cells") or []
    seconds = list(dict.fromkeys(name for cell in cells for name in at(cell, "seconds")))
    fields = [field for field in (*FIGURES, "seed") if any(cell.get(field) is not None for cell in cells)]
    rows = [
        [
            *_names(record, i),
            str(cell.get("stage")),
            *(number(record, "cells", i, field) for field in fields),
            *(number(record, "cells", i, "seconds", name) for name in seconds),
        ]
        for i, cell in enumerate(cells)
    ]
    head = ["method", "model", "sparsity", "stage", *map(_head, fields), *(f"seconds: {name}" for name in seconds)]
    return html_table(head, rows, "Every cell", "sorts")


def _errors(record: dict[str, Any]) -> Markup:
    cells = enumerate(record.get("cells") or [])
    rows = [[*_names(record, i), cell["error"]] for i, cell in cells if cell.get("error")]
    return html_table(["method", "model", "sparsity", "why"], rows, "Cells that failed", wide=[3])


def _names(record: dict[str, Any], i: int) -> list[str]:
    """The method, the model and the sparsity of a cell."""
    cell = record["cells"][i]
    return [name_of(cell, record["cells"]), str(cell["model"]), number(record, "cells", i, "sparsity")]


def _model_plots(rows: Sequence[Row], model: str) -> dict[str, str]:
    """The plots of one model by name; empty where there is nothing to draw."""
    own = [row for row in rows if row["model"] == model]
    known = {field for field in AXES if sum(finite(row.get(field)) for row in own) > 1}
    drawn = {name: _by_method(own, x, y, title) for name, (x, y, title) in PLOTS.items() if {x, y} <= known}
    for kind, what in (("attention", "Attention"), ("ffn", "FFN channels")):
        drawn[f"{kind}-widths"] = _widths(own, kind, f"{what} kept, by block")
    return drawn | {"importance": _importance(own)}


def _by_method(rows: Sequence[Row], x: str, y: str, title: str) -> str:
    """A line for each method and stage through its sparsities, and a point for the dense model."""
    known = [row for row in rows if finite(row.get(x)) and finite(row.get(y))]
    series = []
    for i, name in enumerate(_methods(rows)):
        for stage in (*_recoveries(rows)[:1], "pruned"):
            own = [row for row in known if (row["name"], row["stage"]) == (name, stage)]
            own.sort(key=lambda row: row["sparsity"])
            points = [(row[x], row[y]) for row in own]
            ranges = [tuple(row.get(f"{y}_range") or (row[y], row[y])) for row in own]
            if points:
                series.append(Series(name, points, i, stage, stage == "pruned", ranges, x == "parameters"))
    if dense := [(row[x], row[y]) for row in known if row["stage"] == "dense"]:
        series.append(Series("dense", dense, 6, joined=False))
    axes = AXES[x], AXES[y]
    about = f"points of {axes[0].label} and {axes[1].label}"
    return scatter(series, title, *axes, "; ".join(f"{s.name} {s.kind}: {len(s.points)} {about}" for s in series))


def _widths(rows: Sequence[Row], kind: str, title: str) -> str:
    """A heat map of widths: a row for each method and sparsity, a column for each block."""
    pruned = [row for row in rows if at(row, "widths").get(kind) and row["stage"] == "pruned"]
    if not pruned:
        return ""
    pruned.sort(key=lambda row: (row["name"], row["sparsity"]))
    names = [f"{row['name']} {100 * row['sparsity']:g}%" for row in pruned]
    blocks = [str(i) for i in range(max(len(row["widths"][kind]) for row in pruned))]
    values = [row["widths"][kind] for row in pruned]
    return heat_map(values, names, blocks, title, f"A row for each method and sparsity: {', '.join(names)}")


def _importance(rows: Sequence[Row]) -> str:
    """A line for each method, at its lowest sparsity; the mean of each is 1, as only ratios matter."""
    series = []
    for i, name in enumerate(_methods(rows)):
        own = [row for row in rows if row["name"] == name and "importance_over_mean" in row]
        if own:
            lowest = min(own, key=lambda row: row["sparsity"])["importance_over_mean"]
            series.append(Series(name, [*enumerate(lowest)], i))
    about = "Importance of each block by each method, divided by its mean"
    x, y = Axis("block", "count"), Axis("importance / mean")
    return scatter(series, "Block importance", x, y, about) if series else ""


def _methods(rows: Sequence[Row]) -> list[str]:
    """The names of the methods."""
    return list(dict.fromkeys(row["name"] for row in rows if row["stage"] != "dense"))


def _recoveries(rows: Sequence[Row]) -> list[str]:
    """The stages after recovery; the first of them is the one that is plotted."""
    return list(dict.fromkeys(row["stage"] for row in rows if row["stage"] not in ("dense", "pruned")))


def _head(field: str) -> str:
    return {"average": "mean task score", "tokens_per_second": "tokens/s, batch 1"}.get(field, label(field))
