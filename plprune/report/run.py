"""The page of a pruning run: its settings, what it removed, and the quality, speed and exports of the result."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from plprune.architecture.blocks import UNITS
from plprune.io.units import Form, format_value
from plprune.report.charts import Blocks, Series, bars, block_picture, line
from plprune.report.page import (
    PIECES,
    Figure,
    Section,
    at,
    columns,
    document,
    fact_columns,
    facts,
    figures,
    folded,
    further,
    html_table,
    joined,
    label,
    number,
    provenance,
    with_error,
    with_range,
    yaml_block,
)
from plprune.report.svg import Axis, finite

STAGES = {"dense": 6, "pruned": 1, "recovered": 2}  # in their order, with their colours
PARITY = {  # columns in their order, with their headings
    "format": "format",
    "program": "loaded again by",
    "difference": "largest difference of log-probabilities",
    "perplexity_ratio": "perplexity ratio",
    "same_text": "same text",
    "bytes": "size",
    "tokens_per_second": "tokens/s, generating",
    "refused": "refused",
    "note": "note",
}


def page(record: dict[str, Any]) -> str:
    """The page of a record of the kind `run`."""
    sections = [
        Section("asked", "Asked and reached", _asked(record)),
        Section("removed", "What was removed", _removed(record)),
        Section("quality", "Quality", _quality(record)),
        Section("tasks", "Tasks", _tasks(record)),
        Section("speed", "Speed", _speed(record)),
        Section("parity", "Parity", _parity(record), "Each format was loaded again by another program, and compared."),
        Section("text", "Text before and after", _continuations(record), "Continued greedily."),
        Section("configuration", "Configuration", _configuration(record)),
    ]
    return document(record, "Pruning run", "A run", "run", _tiles(record), sections)


def _tiles(record: dict[str, Any]) -> list[Markup]:
    tiles = []
    if "sparsity" in at(record, "reached"):
        given = at(record, "asked").get("sparsity") is not None
        below = Markup("{} asked").format(number(record, "asked", "sparsity")) if given else ""
        tiles.append(PIECES.tile("Removed from the blocks", number(record, "reached", "sparsity"), below))
    tiles.append(_progression(record, "Perplexity", "perplexity"))
    tiles.append(_progression(record, "Parameters", "parameters", "short"))
    tiles.append(_progression(record, "Tokens/s reading", "tokens_per_second"))
    return tiles


def _progression(record: dict[str, Any], title: str, key: str, form: Form = "number") -> Markup:
    """A tile with a figure of the last stage, and below it the figures of the stages before."""
    measured = [stage for stage in STAGES if at(record, "stages", stage).get(key) is not None]
    if not measured:
        return Markup()
    *before, last = measured
    if len({at(record, "stages", stage)[key] for stage in measured[1:]}) == 1:
        before = before[:1]  # parameters do not change by recovery
    texts = {stage: number(record, "stages", stage, key, form=form) for stage in measured}
    below = Markup(", ").join(Markup("{} {}").format(stage, texts[stage]) for stage in before)
    return PIECES.tile(f"{title}, {last}", texts[last], below)


def _asked(record: dict[str, Any]) -> Markup:
    model = PIECES.paragraph(f"Model: {record['model']}") if record.get("model") else Markup()
    return model + fact_columns(record, {"Asked": ("asked",), "Reached": ("reached",)})


def _removed(record: dict[str, Any]) -> Markup:
    blocks = [{"kept": {}} | block for block in record.get("blocks") or []]
    if not blocks:
        return Markup()
    kinds = [kind for kind in UNITS if any(kind in block["kept"] for block in blocks)]
    drawn = Blocks(
        {UNITS[k]: [tuple(b["kept"].get(k, (0, 0))) for b in blocks] for k in kinds},  # type: ignore[misc]
        [block.get("heads") or [] for block in blocks] if any("heads" in block for block in blocks) else [],
        [block["importance"] for block in blocks if block.get("importance") is not None],
        [block["rank"] for block in blocks if block.get("rank") is not None],
    )
    about = "; ".join(
        f"{UNITS[k]}: "
        + ", ".join(f"block {i} keeps {b['kept'][k][0]} of {b['kept'][k][1]}" for i, b in enumerate(blocks))
        for k in kinds
        if all(k in block["kept"] for block in blocks)
    )
    caption = "A column for each block, from the first (left) to the last. Importance: only ratios matter."
    picture = Figure(block_picture(drawn, "Blocks, kept and removed", about), caption, wide=True)
    return figures(picture) + folded("All blocks in numbers", _blocks(record, blocks, kinds))


def _blocks(record: dict[str, Any], blocks: Sequence[dict[str, Any]], kinds: Sequence[str]) -> Markup:
    def ratio(i: int, *keys: str, order: Sequence[int]) -> Markup:
        left, whole = (number(record, "blocks", i, *keys, j, form="count") for j in order)
        return Markup("{} of {}").format(left, whole)

    head = ["block", *(f"{UNITS[kind]} kept" for kind in kinds), "parameters left", "importance", "LoRA rank"]
    rows = []
    for i, block in enumerate(blocks):
        units = [ratio(i, "kept", kind, order=(0, 1)) if kind in block["kept"] else "-" for kind in kinds]
        left = ratio(i, "parameters", order=(1, 0)) if block.get("parameters") else "-"
        rows.append([str(i), *units, left, *(number(record, "blocks", i, name) for name in ("importance", "rank"))])
    return html_table(head, rows, "Units and parameters that each block keeps")


def _quality(record: dict[str, Any]) -> Markup:
    figures_by_stage = {stage: at(record, "stages", stage).get("perplexity") for stage in _stages(record, "stages")}
    values = {stage: float(v) for stage, v in figures_by_stage.items() if v is not None and finite(v)}
    charts, loss = [], record.get("loss") or []
    if values:
        about = ", ".join(f"{stage} {format_value(value)}" for stage, value in values.items())
        colours = [STAGES.get(stage, 0) for stage in values]
        charts.append(Figure(bars(values, "Perplexity, lower is better", about, colours=colours)))
    if loss:
        series = [Series("training loss", [(step, value) for step, value in loss], 0)]
        about = f"{len(loss)} logged steps, loss {format_value(loss[0][1])} first and {format_value(loss[-1][1])} last"
        charts.append(Figure(line(series, "Training loss", Axis("step", "count"), Axis("loss"), about)))
    steps = [[number(record, "loss", i, 0), number(record, "loss", i, 1)] for i in range(len(loss))]
    losses = folded("The loss in numbers", html_table(["step", "loss"], steps, "Training loss"))
    evaluated = _measured(record, "evaluation", "As plprune evaluate found it, by its own protocol")
    return figures(*charts) + _measured(record, "stages") + losses + evaluated


def _measured(record: dict[str, Any], key: str, caption: str = "") -> Markup:
    """A table of measurements, a row for each stage."""
    stages = _stages(record, key)
    fields = list(dict.fromkeys(field for stage in stages for field in at(record, key, stage)))
    rows = [
        [PIECES.stage(stage, STAGES.get(stage, 0)), *(number(record, key, stage, field) for field in fields)]
        for stage in stages
    ]
    heads = [{"tokens_per_second": "tokens/s, reading"}.get(field, label(field)) for field in fields]
    return html_table(["stage", *heads], rows, caption)


def _tasks(record: dict[str, Any]) -> Markup:
    stages, paired = _stages(record, "tasks"), bool(at(record, "differences"))
    rows = []
    for task in dict.fromkeys(task for stage in stages for task in at(record, "tasks", stage)):
        metrics = {at(record, "tasks", stage, task).get("metric") for stage in stages} - {None}
        scores = [with_error(record, "tasks", stage, task) for stage in stages]
        difference = [with_error(record, "differences", task, form="signed")] * paired
        rows.append([_indented(record, task, stages), ", ".join(sorted(map(str, metrics))), *scores, *difference])
    if at(record, "averages"):
        means = [with_error(record, "averages", stage) for stage in stages]
        difference = [with_error(record, "averages", "difference", form="signed")] * paired
        rows.append(["mean", "", *means, *difference])
    head = ["task", "metric", *stages, *["paired difference"] * paired]
    return html_table(head, rows, "Scores with standard errors")


def _indented(record: dict[str, Any], task: str, stages: Sequence[str]) -> str:
    """The name of a task, after a mark for each group that it is in."""
    groups = {name: of.get("group") for stage in stages for name, of in at(record, "tasks", stage).items()}
    marks, above = "", groups.get(task)
    while above is not None:
        marks, above = marks + "↳ ", groups.get(above)
    return marks + task


def _speed(record: dict[str, Any]) -> Markup:
    stages, reasons = _stages(record, "speed"), record.get("not_faster") or []
    fields = list(dict.fromkeys(key for stage in stages for key in at(record, "speed", stage)))
    rows = [[label(field), *(_quartiles(record, "speed", stage, field) for stage in stages)] for field in fields]
    why = [number(record, "not_faster", i) for i in range(len(reasons))]
    speeds = html_table(["", *stages], rows, "Medians, with quartiles in brackets")
    return speeds + (PIECES.bullets("Why it is not faster", why) if why else "")


def _quartiles(record: dict[str, Any], *keys: str) -> Markup:
    """A median with its quartiles; any other figure as it is."""
    figure = at(record, *keys)
    if "median" in figure:
        return with_range(*(number(record, *keys, name) for name in ("median", "low", "high")))
    if figure:
        return joined(Markup("{} {}").format(label(name), number(record, *keys, name)) for name in figure)
    return number(record, *keys)


def _parity(record: dict[str, Any]) -> Markup:
    parity = at(record, "parity")
    exports = parity.get("rows") or []
    fields = [field for field in PARITY if any(each.get(field) not in (None, "", []) for each in exports)]
    fields += [field for field in dict.fromkeys(key for each in exports for key in each) if field not in PARITY]
    forms: dict[str, Form] = {"difference": "number"}  # of tasks it is signed
    rows = [
        [number(record, "parity", "rows", i, field, form=forms.get(field)) for field in fields]
        for i in range(len(exports))
    ]
    wide = [i for i, field in enumerate(fields) if field in ("refused", "note")]
    others = [key for key, value in parity.items() if key != "rows" and isinstance(value, dict)]
    heads = [PARITY.get(field, label(field)) for field in fields]
    details = columns([(label(key).capitalize(), facts(record, "parity", key)) for key in others])
    return html_table(heads, rows, "Formats", wide=wide) + details


def _continuations(record: dict[str, Any]) -> Markup:
    samples = record.get("generated") or []
    pairs = [(s.get("prompt", ""), [(name, s[name]) for name in s if name != "prompt"]) for s in samples]
    return PIECES.continuations(pairs) if pairs else Markup()


def _configuration(record: dict[str, Any]) -> Markup:
    stages = [name for name, value in at(record, "protocol").items() if isinstance(value, dict)]
    protocols = {f"Protocol, {name}": ("protocol", name) for name in stages}
    evaluated = fact_columns(record, protocols | {"Models": ("models",), "Noted by the run": ("noted",)})
    return provenance(record) + evaluated + yaml_block("Settings", record.get("config")) + further(record)


def _stages(record: dict[str, Any], key: str) -> list[str]:
    """The stages that a field of the record has, in their order."""
    values = at(record, key)
    others = [stage for stage in values if stage not in STAGES and isinstance(values[stage], dict)]
    return [stage for stage in STAGES if values.get(stage)] + others
