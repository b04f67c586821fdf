"""The page of one run: what was asked, what was reached, what it cost."""

from collections.abc import Sequence
from html import escape
from typing import Any

from plprune.architecture.blocks import UNITS
from plprune.io.units import Form, format_value
from plprune.report.charts import Blocks, Series, bars, block_picture, line
from plprune.report.page import (
    Section,
    as_yaml,
    at,
    document,
    facts,
    figure,
    figures,
    folded,
    label,
    number,
    table,
    tile,
)
from plprune.report.svg import Axis, finite

STAGES = ("dense", "pruned", "recovered")
STAGE_COLOURS = {"dense": 6, "pruned": 1, "recovered": 2}
KNOWN = {"version", "kind", "title", "status", "progress", "written", "asked", "reached", "blocks", "stages", "loss"}
KNOWN |= {
    "tasks",
    "speed",
    "parity",
    "generated",
    "config",
    "versions",
    "seeds",
    "fingerprints",
    "reason",
    "model",
    "process",
    "evaluation",
    "models",
    "protocol",
}
KNOWN |= {"not_faster", "averages", "differences", "noted"}
PARITY = ("format", "program", "difference", "same_text", "bytes", "tokens_per_second", "refused", "note")


def page(record: dict[str, Any]) -> str:
    """The page of a record of the kind `run`."""
    parts = [
        Section("asked", "Asked and reached", _asked(record)),
        Section("removed", "What was removed", _removed(record)),
        Section("quality", "Quality", _quality(record)),
        Section("tasks", "Tasks", _tasks(record)),
        Section("speed", "Speed", _speed(record)),
        Section("parity", "Parity", _parity(record), "Each format was loaded again by another program, and compared."),
        Section("text", "Text before and after", _generated(record), "Continued greedily."),
        Section("configuration", "Configuration", _configuration(record)),
    ]
    status = str(record.get("status") or "")
    title = str(record.get("title") or "A run")
    return document(title, "Pruning run", status, notice(record, "run"), _tiles(record), parts)


def notice(record: dict[str, Any], what: str) -> str:
    """What to say first of something that has not ended, as HTML."""
    status, progress = record.get("status"), at(record, "progress")
    if status not in ("running", "stopped"):
        return ""
    step, steps = (number(record, "progress", name) for name in ("step", "steps"))
    reached = f" after {step} of {steps} steps" if "step" in progress else ""
    reason = f" ({escape(str(record['reason']))})" if record.get("reason") else ""
    word = "was still going" if status == "running" else "was stopped"
    when = f"when this was written, {escape(str(record.get('written')))}" if status == "running" else ""
    return f"This {what} {word}{reached}{reason} {when}. ".replace(" .", ".") + "Below is what there is so far."


def _tiles(record: dict[str, Any]) -> str:
    tiles, asked = [], at(record, "asked")
    if "sparsity" in at(record, "reached"):
        words = f"{number(record, 'asked', 'sparsity')} asked" if asked.get("sparsity") is not None else ""
        tiles.append(tile("Removed from the blocks", number(record, "reached", "sparsity"), words))
    tiles.append(_progression(record, "Perplexity", "perplexity"))
    tiles.append(_progression(record, "Parameters", "parameters", "short"))
    tiles.append(_progression(record, "Tokens/s reading", "tokens_per_second"))
    return "".join(tiles)


def _progression(record: dict[str, Any], title: str, key: str, form: Form = "number") -> str:
    """A figure from the first stage to the last."""
    there = [name for name in STAGES if at(record, "stages", name).get(key) is not None]
    if not there:
        return ""
    *before, last = there
    if len({at(record, "stages", name)[key] for name in there[1:]}) == 1:
        before = before[:1]  # parameters do not change by recovery
    below = ", ".join(f"{name} {number(record, 'stages', name, key, form=form)}" for name in before)
    return tile(f"{title}, {last}", number(record, "stages", last, key, form=form), below)


def _asked(record: dict[str, Any]) -> str:
    columns = [
        f"<div><h3>{title}</h3>{facts(record, key)}</div>"
        for title, key in (("Asked", "asked"), ("Reached", "reached"))
        if at(record, key)
    ]
    model = f"<p>Model: {escape(str(record['model']))}</p>" if record.get("model") else ""
    return model + f'<div class="cols">{"".join(columns)}</div>' if columns or model else ""


def _removed(record: dict[str, Any]) -> str:
    blocks = record.get("blocks") or []
    if not blocks:
        return ""
    kinds = [kind for kind in UNITS if any(kind in (block.get("kept") or {}) for block in blocks)]
    drawn = Blocks(
        {UNITS[k]: [tuple((b.get("kept") or {}).get(k, (0, 0))) for b in blocks] for k in kinds},  # type: ignore[misc]
        [block.get("heads") or [] for block in blocks] if any("heads" in block for block in blocks) else [],
        [block["importance"] for block in blocks if block.get("importance") is not None],
        [block["rank"] for block in blocks if block.get("rank") is not None],
    )
    about = "; ".join(
        f"{UNITS[k]}: "
        + ", ".join(f"block {i} keeps {b['kept'][k][0]} of {b['kept'][k][1]}" for i, b in enumerate(blocks))
        for k in kinds
        if all(k in (block.get("kept") or {}) for block in blocks)
    )
    caption = "A column for each block, from the first (left) to the last. Importance: only ratios matter."
    return figures(figure(block_picture(drawn, "Blocks, kept and removed", about), caption, wide=True)) + folded(
        "All blocks in numbers", _blocks(record, blocks, kinds)
    )


def _blocks(record: dict[str, Any], blocks: Sequence[dict[str, Any]], kinds: Sequence[str]) -> str:
    head = ["block", *(f"{UNITS[kind]} kept" for kind in kinds), "parameters left", "importance", "LoRA rank"]
    rows = []
    for i, block in enumerate(blocks):
        units = [
            " of ".join(number(record, "blocks", i, "kept", kind, j, form="count") for j in (0, 1))
            if kind in (block.get("kept") or {})
            else "-"
            for kind in kinds
        ]
        left = " of ".join(number(record, "blocks", i, "parameters", j, form="count") for j in (1, 0))
        rest = [number(record, "blocks", i, name) for name in ("importance", "rank")]
        rows.append([str(i), *units, left if block.get("parameters") else "-", *rest])
    return table(head, rows, "Units and parameters that each block keeps")


def _quality(record: dict[str, Any]) -> str:
    stages, loss = _stages(record, "stages"), record.get("loss") or []
    charts, found = "", {s: at(record, "stages", s).get("perplexity") for s in stages}
    values = {stage: float(value) for stage, value in found.items() if value is not None and finite(value)}
    if values:
        colours = [STAGE_COLOURS.get(stage, 0) for stage in values]
        charts += figure(bars(values, "Perplexity, lower is better", _listed(values), colours=colours))
    if loss:
        series = [Series("training loss", [(step, value) for step, value in loss], 0)]
        about = f"{len(loss)} logged steps, loss {format_value(loss[0][1])} first and {format_value(loss[-1][1])} last"
        charts += figure(line(series, "Training loss", Axis("step", "count"), Axis("loss"), about))
    steps = [[number(record, "loss", i, 0), number(record, "loss", i, 1)] for i in range(len(loss))]
    told = folded("The loss in numbers", table(["step", "loss"], steps, "Training loss")) if loss else ""
    judged = _measured(record, "evaluation", "As plprune evaluate found it, by its own protocol")
    return figures(charts) + _measured(record, "stages") + told + judged


def _measured(record: dict[str, Any], key: str, caption: str = "") -> str:
    stages = _stages(record, key)
    fields = list(dict.fromkeys(field for stage in stages for field in at(record, key, stage)))
    rows = [[_stage(stage), *(number(record, key, stage, field) for field in fields)] for stage in stages]
    heads = [{"tokens_per_second": "tokens/s, reading"}.get(field, label(field)) for field in fields]
    return table(["stage", *heads], rows, caption) if rows else ""


def _tasks(record: dict[str, Any]) -> str:
    stages, differences = _stages(record, "tasks"), at(record, "differences")
    names = list(dict.fromkeys(task for stage in stages for task in at(record, "tasks", stage)))
    rows = []
    for name in names:
        metrics = {at(record, "tasks", stage, name).get("metric") for stage in stages} - {None}
        scores = [with_error(record, "tasks", stage, name) for stage in stages]
        paired = [with_error(record, "differences", name, form="signed")] if differences else []
        rows.append([_name(record, name, stages), escape(", ".join(sorted(map(str, metrics)))), *scores, *paired])
    if at(record, "averages"):
        means = [with_error(record, "averages", stage) for stage in stages]
        rows.append(
            [
                "mean",
                "",
                *means,
                *([with_error(record, "averages", "difference", form="signed")] if differences else []),
            ]
        )
    head = ["task", "metric", *stages, *(["paired difference"] if differences else [])]
    return table(head, rows, "Scores with standard errors") if rows else ""


def _name(record: dict[str, Any], name: str, stages: Sequence[str]) -> str:
    """What a task is called, after a mark for each group that it is in."""
    groups = {task: of.get("group") for stage in stages for task, of in at(record, "tasks", stage).items()}
    marks, above = "", groups.get(name)
    while above is not None:
        marks, above = marks + "↳ ", groups.get(above)
    return marks + escape(name)


def with_error(record: dict[str, Any], *keys: str | int, form: Form | None = None) -> str:
    """A score with its standard error."""
    found = at(record, *keys)
    if found.get("value") is None:
        return "-"
    less = f' <span class="s">± {number(record, *keys, "stderr")}</span>' if found.get("stderr") is not None else ""
    return number(record, *keys, "value", form=form) + less


def _speed(record: dict[str, Any]) -> str:
    stages = _stages(record, "speed")
    fields = list(dict.fromkeys(key for stage in stages for key in at(record, "speed", stage)))
    rows = [[escape(label(field)), *(spread(record, "speed", stage, field) for stage in stages)] for field in fields]
    why = "".join(f"<li>{number(record, 'not_faster', i)}</li>" for i in range(len(record.get("not_faster") or [])))
    return (table(["", *stages], rows, "Medians, with quartiles in brackets") if rows else "") + (
        f"<h3>Why it is not faster</h3><ul>{why}</ul>" if why else ""
    )


def spread(record: dict[str, Any], *keys: str | int) -> str:
    """A figure with its quartiles, or as it is."""
    found = at(record, *keys[:-1]).get(keys[-1])  # type: ignore[arg-type]
    if not isinstance(found, dict):
        return number(record, *keys)
    if "median" not in found:
        return ", ".join(f"{escape(label(name))} {number(record, *keys, name)}" for name in found) or "-"
    low, high = (number(record, *keys, name) for name in ("low", "high"))
    return f'{number(record, *keys, "median")} <span class="s">({low} to {high})</span>'


def _parity(record: dict[str, Any]) -> str:
    parity = at(record, "parity")
    rows = parity.get("rows") or []
    there = [f for f in PARITY if any(line.get(f) not in (None, "", []) for line in rows)]
    there += [f for f in dict.fromkeys(key for line in rows for key in line) if f not in PARITY]
    heads = {"program": "loaded again by", "difference": "largest difference of log-probabilities", "bytes": "size"}
    heads |= {"same_text": "same text", "tokens_per_second": "tokens/s, generating"}
    cells = [[_parity_cell(record, i, field) for field in there] for i in range(len(rows))]
    wide = [i for i, field in enumerate(there) if field in ("refused", "note")]
    columns = [
        f"<div><h3>{escape(label(key).capitalize())}</h3>{facts(record, 'parity', key)}</div>"
        for key, value in parity.items()
        if key != "rows" and isinstance(value, dict)
    ]
    rest = f'<div class="cols">{"".join(columns)}</div>' if columns else ""
    return (table([heads.get(f, label(f)) for f in there], cells, "Formats", wide=wide) if rows else "") + rest


def _parity_cell(record: dict[str, Any], i: int, field: str) -> str:
    form = "number" if field == "difference" else None
    return number(record, "parity", "rows", i, field, form=form)


def _generated(record: dict[str, Any]) -> str:
    drawn = []
    for each in record.get("generated") or []:
        names = [name for name in each if name != "prompt"]
        said = "".join(f"<div><h4>{escape(n)}</h4><q>{escape(str(each[n]))}</q></div>" for n in names)
        drawn.append(f'<div class="said"><div class="prompt">{escape(str(each.get("prompt", "")))}</div>{said}</div>')
    return "".join(drawn)


def _configuration(record: dict[str, Any]) -> str:
    config = f"<h3>Settings</h3>{as_yaml(record['config'])}" if record.get("config") else ""
    return provenance(record) + _protocol(record) + config + rest(record, KNOWN)


def _protocol(record: dict[str, Any]) -> str:
    """How `plprune evaluate` judged, for each model or once for all."""
    stages = [name for name, value in at(record, "protocol").items() if isinstance(value, dict)]
    columns = [f"<div><h3>Protocol, {escape(name)}</h3>{facts(record, 'protocol', name)}</div>" for name in stages]
    columns += [f"<div><h3>Models</h3>{facts(record, 'models')}</div>"] if at(record, "models") else []
    columns += [f"<div><h3>Noted by the run</h3>{facts(record, 'noted')}</div>"] if at(record, "noted") else []
    return f'<div class="cols">{"".join(columns)}</div>' if columns else ""


def provenance(record: dict[str, Any]) -> str:
    """Versions, seeds and fingerprints."""
    columns = [
        f"<div><h3>{key.capitalize()}</h3>{facts(record, key)}</div>"
        for key in ("versions", "seeds", "fingerprints")
        if at(record, key)
    ]
    return f'<div class="cols">{"".join(columns)}</div>' if columns else ""


def rest(record: dict[str, Any], known: set[str]) -> str:
    """What a record has besides."""
    more = {key: value for key, value in record.items() if key not in known and value not in (None, {}, [], "")}
    return "<h3>Further</h3>" + as_yaml(more) if more else ""


def _stages(record: dict[str, Any], key: str) -> list[str]:
    there = at(record, key)
    return [s for s in STAGES if there.get(s)] + [s for s in there if s not in STAGES and isinstance(there[s], dict)]


def _stage(name: str) -> str:
    colour = STAGE_COLOURS.get(name, 0)
    return f'<span class="key plc" style="background:var(--s{colour})"></span>{escape(name)}'


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {format_value(value)}" for name, value in values.items())
