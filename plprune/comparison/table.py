"""The table of a comparison in Markdown."""

from typing import Any

from plprune.io.tables import markdown_table
from plprune.report.page import at
from plprune.report.summary import name_of, summarised

MEASURES = (  # title, keys in a row of a report's summary, format
    ("perplexity", ("perplexity",), ".2f"),
    ("bits per byte", ("bits_per_byte",), ".3f"),
    ("tasks", ("average",), ".3f"),
)

Column = tuple[str, str, tuple[str, ...], str]  # title, stage, keys, format


def comparison_table(record: dict[str, Any]) -> str:
    """A line for each method and sparsity, with means and ranges over seeds, and the errors of failed cells below."""
    summary, rows = summarised(record["cells"]), {}
    for row in summary:
        stage = "pruned" if row["stage"] == "dense" else row["stage"]
        rows.setdefault((row["model"], row["name"], f"{row['sparsity']:.1%}"), {})[stage] = row
    columns = [column for column in _columns(summary) if any(_figure(own, *column[1:]) for own in rows.values())]
    header = ["model", "method", "sparsity", *(title for title, *_ in columns)]
    lines = [[*key, *(_figure(own, *column[1:]) for column in columns)] for key, own in rows.items()]
    failed = [cell for cell in record["cells"] if cell.get("error")]
    errors = {f"- {name_of(c, record['cells'])} at {c['sparsity']:.1%}: {c['error']}" for c in failed}
    return "\n".join([markdown_table([header, *lines]), *sorted(errors)])


def _columns(summary: list[dict[str, Any]]) -> list[Column]:
    """All possible columns; of measurements, one for each stage."""
    stages = dict.fromkeys(["pruned", *(row["stage"] for row in summary if row["stage"] != "dense")])
    texts = dict.fromkeys(name for row in summary for name in row["texts"])
    first, *others = MEASURES
    further = [(f"perplexity on {name}", ("texts", name, "perplexity"), ".2f") for name in texts]
    measured = [
        (f"{title}, pruned" if stage == "pruned" else stage, stage, keys, form)
        for title, keys, form in (first, *further, *others)
        for stage in stages
    ]
    return [
        ("parameters", "pruned", ("parameters",), ",.0f"),
        ("seconds to prune", "pruned", ("seconds_to_prune",), ".1f"),
        *measured,
        ("tokens/s, writing", "pruned", ("tokens_per_second",), ".1f"),
    ]


def _figure(rows: dict[str, dict[str, Any]], stage: str, keys: tuple[str, ...], form: str) -> str:
    place, field = at(rows.get(stage, {}), *keys[:-1]), keys[-1]
    low, high = place.get(f"{field}_range", (None, None))
    seeds = "" if low is None else f" ({low:{form}} to {high:{form}})"
    return f"{place[field]:{form}}{seeds}" if field in place else ""
