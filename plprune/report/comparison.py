"""The page of a comparison: methods side by side, for each model by itself.

Perplexities of models with different tokenizers do not compare, as they are per token; so each model has its own plots,
and models share one of bits per byte only.
"""

import json
from collections.abc import Sequence
from html import escape
from statistics import mean, stdev
from typing import Any

from plprune.report.charts import Series, heat_map, scatter
from plprune.report.page import (
    Section,
    at,
    document,
    facts,
    figure,
    figures,
    folded,
    framed,
    label,
    number,
    row,
    table,
    tile,
)
from plprune.report.run import notice, provenance, rest, with_error
from plprune.report.svg import Axis, finite

KNOWN = {"version", "kind", "title", "status", "progress", "written", "reason", "protocol", "machine", "cells"}
KNOWN |= {"summary", "versions", "seeds", "fingerprints", "process"}
FIGURES = ("perplexity", "bits_per_byte", "parameters", "block_parameters", "reached")
SHOWN = ("perplexity", "bits_per_byte", "parameters", "reached", "average", "tokens_per_second", "seconds_to_prune")
Row = dict[str, Any]


def page(record: dict[str, Any]) -> str:
    """The page of a record of the kind `comparison`."""
    rows = record.get("summary") or []
    models = list(dict.fromkeys(each["model"] for each in rows))
    parts = [_common(rows, models)] if len(models) > 1 else []
    for i, model in enumerate(models):
        own = _of_model([row for row in rows if row["model"] == model]).values()
        charts = figures(*(figure(svg, wide=' fluid"' in svg) for svg in own if svg))
        parts.append(Section(f"model-{i}", model, charts + _table(record, model)))
    parts += [
        Section("errors", "What could not be done", _errors(record)),
        Section("cells", "Every cell", folded("All in numbers", _cells(record))),
        Section("protocol", "Protocol", _protocol(record)),
    ]
    title, status = str(record.get("title") or "Comparison"), str(record.get("status") or "")
    return document(title, "Comparison", status, notice(record, "comparison"), _tiles(record, rows), parts)


def plots(record: dict[str, Any]) -> dict[str, str]:
    """The plots of a comparison as SVG, by a name that a file can have; made of a completed record."""
    rows, drawn = record.get("summary") or [], {}
    for model in dict.fromkeys(each["model"] for each in rows):
        own = [each for each in rows if each["model"] == model]
        for name, svg in _of_model(own).items():
            if svg:
                drawn[f"{_slug(model)}-{name}"] = svg
    return drawn


def summarised(cells: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each model, method with settings, sparsity and stage: means over seeds, and how far these spread."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if not cell.get("error"):
            key = (cell["model"], name_of(cell, cells), cell.get("sparsity") or 0.0, cell.get("stage"))
            groups.setdefault(key, []).append(cell)
    rows = []
    for (model, name, sparsity, stage), own in groups.items():
        row: Row = {"model": model, "name": name, "sparsity": sparsity, "stage": stage, "seeds": len(own)}
        row |= {"calibration": own[0]["calibration"]} if own[0].get("calibration") else {}
        for field in FIGURES:
            row |= _mean(field, [cell.get(field) for cell in own])
        row["texts"] = {text: _text([at(cell, "texts", text) for cell in own]) for text in at(own[0], "texts")}
        row |= _mean("seconds_to_prune", [at(cell, "seconds").get("prune") for cell in own])
        row |= _mean("tokens_per_second", [speed_of(cell.get("speed")) for cell in own])
        row["tasks"] = {task: _task([at(cell, "tasks", task) for cell in own]) for task in at(own[0], "tasks")}
        row |= _mean("average", [cell.get("average") for cell in own])
        row |= {"widths": own[0]["widths"]} if own[0].get("widths") else {}
        importance = own[0].get("importance")
        if importance and all(map(finite, importance)) and (middle := mean(importance)):
            row["importance_over_mean"] = [value / middle for value in importance]
        rows.append(row)
    return rows


def name_of(cell: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """The method, with the settings, and the calibration, by which it differs from others of the same class."""
    method, own = str(cell.get("method")), _settings(cell)
    others = [_settings(c) for c in cells if c.get("method") == cell.get("method") and c.get("settings")]
    unlike = [k for k in own if k != "sparsity" and len({json.dumps(o.get(k), sort_keys=True) for o in others}) > 1]
    return method + (f" ({', '.join(f'{key} {own[key]}' for key in unlike)})" if unlike else "")


def _settings(cell: dict[str, Any]) -> dict[str, Any]:
    calibration = {"calibration": cell["calibration"]} if cell.get("calibration") else {}
    return (cell.get("settings") or {}) | calibration


def speed_of(speed: Any) -> float | None:
    """Tokens written per second at batch 1; those read, where only these were measured."""
    for name in ("writing", "tokens_per_second", "reading"):
        value = (speed or {}).get(name)
        value = value.get("median") if isinstance(value, dict) else value
        if finite(value):
            return value
    return None


def _mean(field: str, values: Sequence[Any]) -> dict[str, Any]:
    known = [value for value in values if finite(value)]
    if not known:
        return {}
    middle = known[0] if len(set(known)) == 1 else mean(known)
    if min(known) == max(known):
        return {field: middle}
    return {field: middle, f"{field}_range": [min(known), max(known)], f"{field}_deviation": stdev(known)}


def _text(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is measured on a further text."""
    fields = ("perplexity", "bits_per_byte")
    return {k: v for field in fields for k, v in _mean(field, [each.get(field) for each in results]).items()}


def _task(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(results) == 1:
        names = ("metric", "value", "stderr", "difference", "difference_stderr", "group")
        return {name: results[0][name] for name in names if results[0].get(name) is not None}
    group = {"group": results[0]["group"]} if results[0].get("group") else {}
    return {"metric": results[0].get("metric")} | group | _mean("value", [result.get("value") for result in results])


def _of_model(rows: Sequence[Row]) -> dict[str, str]:
    """The plots of one model."""
    size, perplexity = Axis("parameters", "short"), Axis("perplexity", log=True)
    seen = ("parameters", "perplexity", "average", "tokens_per_second")
    has = {field: sum(finite(row.get(field)) for row in rows) > 1 for field in seen}
    drawn = {}
    if has["parameters"] and has["perplexity"]:
        drawn["perplexity"] = _by_method(rows, "parameters", "perplexity", "Perplexity against size", size, perplexity)
    if has["parameters"] and has["average"]:
        score = Axis("mean task score")
        drawn["tasks"] = _by_method(rows, "parameters", "average", "Tasks against size", size, score)
    if has["tokens_per_second"] and has["perplexity"]:
        rate = Axis("tokens/s, batch 1")
        title = "Speed against perplexity"
        drawn["speed"] = _by_method(rows, "tokens_per_second", "perplexity", title, rate, perplexity)
    for kind, what in (("attention", "Attention"), ("ffn", "FFN channels")):
        drawn[f"{kind}-widths"] = _widths(rows, kind, f"{what} kept, by block")
    drawn["importance"] = _importance(rows)
    return drawn


def _by_method(rows: Sequence[Row], x: str, y: str, title: str, across: Axis, up: Axis) -> str:
    """A line for each method and stage through its sparsities, and a point for the dense model."""
    series, dense = [], [row for row in rows if row["stage"] == "dense" and finite(row.get(x)) and finite(row.get(y))]
    for i, name in enumerate(_methods(rows)):
        for stage in (*_recoveries(rows)[:1], "pruned"):
            own = [row for row in rows if (row["name"], row["stage"]) == (name, stage)]
            own = sorted((r for r in own if finite(r.get(x)) and finite(r.get(y))), key=lambda row: row["sparsity"])
            points = [(row[x], row[y]) for row in own]
            ranges = [tuple(row.get(f"{y}_range") or (row[y], row[y])) for row in own]
            if points:
                series.append(Series(name, points, i, stage, stage == "pruned", ranges, x == "parameters"))
    series += [Series("dense", [(row[x], row[y]) for row in dense], 6, joined=False)] if dense else []
    return scatter(series, title, across, up, _told(series, across, up))


def _told(series: Sequence[Series], x: Axis, y: Axis) -> str:
    return "; ".join(f"{s.name} {s.kind}: {len(s.points)} points of {x.label} and {y.label}" for s in series)


def _widths(rows: Sequence[Row], kind: str, title: str) -> str:
    """A row of blocks for each method and sparsity, as shares of the widest that there is."""
    there = [row for row in rows if at(row, "widths").get(kind) and row["stage"] in ("pruned", "dense")]
    pruned = sorted((r for r in there if r["stage"] == "pruned"), key=lambda r: (r["name"], r["sparsity"]))
    if not pruned:
        return ""
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


def _common(rows: Sequence[Row], models: Sequence[str]) -> Section:
    """What models of different tokenizers can share: bits per byte."""
    series = []
    for i, model in enumerate(models):
        for stage in (*_recoveries(rows)[:1], "pruned"):
            own = [r for r in rows if r["model"] == model and r["stage"] in (stage, "dense")]
            points = [(r["parameters"], r["bits_per_byte"]) for r in own if {"parameters", "bits_per_byte"} <= r.keys()]
            if points and any(row["stage"] == stage for row in own):
                series.append(Series(model, points, i, stage, stage == "pruned", joined=False))
    lead = "Perplexity is per token and does not compare across tokenizers: each model has plots of its own below."
    if not series:
        return Section("all", "All models", f"<p>{lead}</p>")
    lead += " Bits per byte does compare."
    x, y = Axis("parameters", "short", log=True), Axis("bits per byte")
    return Section("all", "All models", figures(figure(scatter(series, "Bits per byte against size", x, y))), lead)


def _table(record: dict[str, Any], model: str) -> str:
    """Methods by sparsity; the lowest perplexity of each group is set in bold."""
    rows = record["summary"]
    ids = [i for i, row in enumerate(rows) if row["model"] == model]
    tasks = list(dict.fromkeys(t for i in ids for t, own in rows[i]["tasks"].items() if not own.get("group")))
    texts = list(dict.fromkeys(text for i in ids for text in rows[i]["texts"]))
    fields = [field for field in SHOWN if any(field in rows[i] for i in ids)]
    several = any(rows[i]["seeds"] > 1 for i in ids)
    further = (f"perplexity on {text}" for text in texts)
    head = ["method", "stage", *(["seeds"] if several else []), *map(_head, fields), *further, *tasks]
    columns = [*((field,) for field in fields), *(("texts", text, "perplexity") for text in texts)]
    stages, body = ["dense", "pruned", *_recoveries(rows)], ""
    for sparsity in sorted({rows[i]["sparsity"] for i in ids}):
        own = sorted(
            (i for i in ids if rows[i]["sparsity"] == sparsity),
            key=lambda i: (stages.index(rows[i]["stage"]), rows[i]["name"]),
        )
        best = {_best(rows, [i for i in own if rows[i]["stage"] == stage]) for stage in stages}
        title = f"{number(record, 'summary', own[0], 'sparsity')} of the blocks removed" if sparsity else "Dense"
        body += f'<tbody><tr class="group"><th colspan="{len(head)}" scope="colgroup">{title}</th></tr>'
        body += "".join(row(_line(record, i, columns, tasks, several, i in best)) for i in own) + "</tbody>"
    return framed(head, body, f"{model}: all methods; bold is the lowest perplexity of its kind", "sorts")


def _best(rows: Sequence[Row], ids: Sequence[int]) -> int | None:
    known = [i for i in ids if finite(rows[i].get("perplexity"))]
    return min(known, key=lambda i: rows[i]["perplexity"]) if len(known) > 1 else None


def _line(
    record: dict[str, Any], i: int, columns: Sequence[tuple[str, ...]], tasks: Sequence[str], several: bool, best: bool
) -> list[str]:
    row, cells = record["summary"][i], []
    for keys in columns:
        value = ranged(record, i, *keys)
        cells.append(f'<span class="best">{value}</span>' if best and keys == ("perplexity",) else value)
    seeds = [number(record, "summary", i, "seeds")] if several else []
    scores = [with_error(record, "summary", i, "tasks", task) for task in tasks]
    return [escape(row["name"]), escape(str(row["stage"])), *seeds, *cells, *scores]


def ranged(record: dict[str, Any], i: int, *keys: str) -> str:
    """A mean, with what the seeds spread over."""
    *place, field = ("summary", i, *keys)
    text = number(record, *place, field)
    if f"{field}_range" not in at(record, *place):
        return text
    form = "percent" if field == "reached" else "count" if "parameters" in keys[-1] else None
    low, high = (number(record, *place, f"{field}_range", j, form=form) for j in (0, 1))
    return f'{text} <span class="s">({low} to {high})</span>'


def _cells(record: dict[str, Any]) -> str:
    cells = record.get("cells") or []
    if not cells:
        return ""
    seconds = list(dict.fromkeys(name for cell in cells for name in at(cell, "seconds")))
    fields = [field for field in (*FIGURES, "seed") if any(cell.get(field) is not None for cell in cells)]
    rows = [
        [
            escape(name_of(cell, cells)),
            escape(str(cell["model"])),
            number(record, "cells", i, "sparsity"),
            escape(str(cell.get("stage"))),
            *(number(record, "cells", i, field) for field in fields),
            *(number(record, "cells", i, "seconds", name) for name in seconds),
        ]
        for i, cell in enumerate(cells)
    ]
    head = ["method", "model", "sparsity", "stage", *map(_head, fields), *(f"seconds: {name}" for name in seconds)]
    return table(head, rows, "Every cell", "sorts")


def _errors(record: dict[str, Any]) -> str:
    cells = list(enumerate(record.get("cells") or []))
    rows = [
        [
            escape(name_of(c, record["cells"])),
            escape(str(c["model"])),
            number(record, "cells", i, "sparsity"),
            escape(c["error"]),
        ]
        for i, c in cells
        if c.get("error")
    ]
    return table(["method", "model", "sparsity", "why"], rows, "Cells that failed", wide=[3]) if rows else ""


def _protocol(record: dict[str, Any]) -> str:
    columns = [
        f"<div><h3>{key.capitalize()}</h3>{facts(record, key)}</div>"
        for key in ("protocol", "machine")
        if at(record, key)
    ]
    return f'<div class="cols">{"".join(columns)}</div>' + provenance(record) + rest(record, KNOWN)


def _tiles(record: dict[str, Any], rows: Sequence[Row]) -> str:
    names = ", ".join(_methods(rows))
    return tile("Methods", escape(names)) if names else ""


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows if row["stage"] != "dense"))


def _recoveries(rows: Sequence[Row]) -> list[str]:
    """The stages that are no pruning, the one that is plotted first."""
    return list(dict.fromkeys(row["stage"] for row in rows if row["stage"] not in ("dense", "pruned")))


def _head(field: str) -> str:
    return {"average": "mean task score", "tokens_per_second": "tokens/s, batch 1"}.get(field, label(field))


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
