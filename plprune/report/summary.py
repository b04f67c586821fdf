"""Summarises a comparison: the mean and range of each measurement over the seeds."""

import json
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from plprune.report.page import at
from plprune.report.svg import finite

QUALITY = ("perplexity", "bits_per_byte")
FIGURES = (*QUALITY, "parameters", "block_parameters", "reached")
Row = dict[str, Any]


def summarised(cells: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each model, method with its settings, sparsity and stage: means over seeds, and their ranges."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if not cell.get("error"):
            key = (cell["model"], name_of(cell, cells), cell.get("sparsity") or 0.0, cell.get("stage"))
            groups.setdefault(key, []).append(cell)
    names = ("model", "name", "sparsity", "stage")
    return [dict(zip(names, key, strict=True)) | _row(group) for key, group in groups.items()]


def name_of(cell: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """The method, with the settings and the calibration in which it differs from others of the same class."""
    method, settings = str(cell.get("method")), _settings(cell)
    others = [_settings(c) for c in cells if c.get("method") == cell.get("method") and c.get("settings")]
    differing = [
        f"{key} {value}"
        for key, value in settings.items()
        if key != "sparsity" and len({json.dumps(other.get(key), sort_keys=True) for other in others}) > 1
    ]
    return method + (f" ({', '.join(differing)})" if differing else "")


def _row(cells: Sequence[dict[str, Any]]) -> Row:
    """The summary of cells that differ in their seeds only."""
    first = cells[0]
    row: Row = {"seeds": len(cells)} | ({"calibration": first["calibration"]} if first.get("calibration") else {})
    row |= _means(FIGURES, cells)
    row["texts"] = {text: _means(QUALITY, [at(cell, "texts", text) for cell in cells]) for text in at(first, "texts")}
    row |= _mean("seconds_to_prune", [at(cell, "seconds").get("prune") for cell in cells])
    row |= _mean("tokens_per_second", [_tokens_per_second(cell.get("speed")) for cell in cells])
    row["tasks"] = {task: _task([at(cell, "tasks", task) for cell in cells]) for task in at(first, "tasks")}
    row |= _means(["average"], cells) | ({"widths": first["widths"]} if first.get("widths") else {})
    importance = first.get("importance")
    if importance and all(map(finite, importance)) and (middle := mean(importance)):
        row["importance_over_mean"] = [value / middle for value in importance]
    return row


def _settings(cell: dict[str, Any]) -> dict[str, Any]:
    calibration = {"calibration": cell["calibration"]} if cell.get("calibration") else {}
    return (cell.get("settings") or {}) | calibration


def _tokens_per_second(speed: Any) -> float | None:
    """Tokens written per second at batch 1; tokens read per second where only these were measured."""
    for name in ("writing", "tokens_per_second", "reading"):
        value = (speed or {}).get(name)
        value = value.get("median") if isinstance(value, dict) else value
        if finite(value):
            return value
    return None


def _means(fields: Sequence[str], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for field in fields:
        means |= _mean(field, [result.get(field) for result in results])
    return means


def _mean(field: str, values: Sequence[Any]) -> dict[str, Any]:
    """The mean of the known values of a field, with range and standard deviation if they differ."""
    known = [value for value in values if finite(value)]
    if not known:
        return {}
    low, high = min(known), max(known)
    if low == high:
        return {field: known[0]}
    return {field: mean(known), f"{field}_range": [low, high], f"{field}_deviation": stdev(known)}


def _task(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The score on a task: with its standard error for one seed, and with the range over several."""
    if len(results) == 1:
        names = ("metric", "value", "stderr", "difference", "difference_stderr", "group")
        return {name: results[0][name] for name in names if results[0].get(name) is not None}
    group = {"group": results[0]["group"]} if results[0].get("group") else {}
    return {"metric": results[0].get("metric")} | group | _means(["value"], results)
