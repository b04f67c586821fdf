"""The model card, the `README.md` of a saved folder: removed units, settings, perplexities and how to load the model.

It is written from the plan and from the record of the run.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from plprune.architecture.blocks import IN_FFN, UNITS
from plprune.architecture.modeling_plprune import OLDEST
from plprune.architecture.wrappers import auto_class
from plprune.io.tables import markdown_table
from plprune.pruning.plan import PruningPlan

CARD, RECORD = "README.md", "record.json"
UNKNOWN = "that of the base model, see its model card"


def write_card(folder: Path, plan: PruningPlan, record: dict[str, Any] | None = None, parity: str = "") -> None:
    """Writes a folder's model card, and its record as JSON.

    Args:
        folder: The folder.
        plan: The plan of the pruned model.
        record: Record of the run: `perplexity` by stage, `text`, `training`; `licence` of the base model.
        parity: A table of :mod:`plprune.export.parity`.
    """
    if record and any(record.values()):
        (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (folder / CARD).write_text(card(plan, record or {}, parity))


def record_of(folder: str | Path) -> dict[str, Any]:
    """The record of the run that wrote a folder; empty if the folder has none."""
    file = Path(folder) / RECORD
    return json.loads(file.read_text()) if file.exists() else {}


def card(plan: PruningPlan, record: dict[str, Any], parity: str = "") -> str:
    """The text of a model card."""
    family = plan.config.get("model_type", "")
    auto = auto_class(CONFIG_MAPPING[family]) if family in CONFIG_MAPPING else AutoModelForCausalLM
    name = Path(plan.chain()[0].origin.get("model") or "").name or family or "a model"
    parts = [
        _front(plan, record, auto),
        f"# {name}, pruned\n\n{_summary(plan)}{'' if auto is AutoModelForCausalLM else TOWERS}",
        "## What was removed\n\n" + "\n\n".join(_step(step) for step in plan.chain()),
        _quality(record),
        "## How to load it\n\n" + _loading(auto),
        f"## Checked\n\n{parity}" if parity else "",
        "## Where it comes from\n\n" + _origin(plan, record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


TOWERS = (
    " Only its text decoder was pruned, judged on text alone. All else, as towers that see and their projectors, is "
    "as it came."
)


def _loading(auto: type) -> str:
    if auto is AutoModelForCausalLM:
        return f"{LOADING}\n\n{ELSEWHERE}"
    return (
        LOADING.replace("AutoModelForCausalLM", auto.__name__)
        .replace("AutoTokenizer", "AutoProcessor")
        .replace("tokenizer =", "processor =")
    )


LOADING = """```python
from plprune import load_pruned  # pip install plprune

model = load_pruned("FOLDER")
```

Without plprune, by transformers OLDEST or newer alone; if the folder holds `modeling_plprune.py`, that file is run, so
read it first:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
```""".replace("OLDEST", OLDEST)
ELSEWHERE = """\
`vllm serve FOLDER --trust-remote-code` serves it.
`lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks ...` evaluates it. For llama.cpp
(`llama-cli -m FILE.gguf`), and for programs that read DeciLM: `plprune export FOLDER --to gguf,decilm --output OUT`."""


def _front(plan: PruningPlan, record: dict[str, Any], auto: type) -> str:
    licence = record.get("licence")
    task = "image-text-to-text" if auto is AutoModelForImageTextToText else "text-generation"
    lines = ["library_name: transformers", f"pipeline_tag: {task}", "tags: [plprune, pruned]"]
    model = plan.chain()[0].origin.get("model") or ""
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        lines.append(f"base_model: {model}")
    return "\n".join(["---", *([f"license: {licence}"] if licence else []), *lines, "---"])


def _summary(plan: PruningPlan) -> str:
    after = sum(plan.after) + plan.rest
    return (
        f"{after:,} parameters, of {sum(plan.chain()[0].before) + plan.rest:,} before. Pruned by plprune "
        f"{version('plprune')}."
    )


def _step(plan: PruningPlan) -> str:
    """Method, settings and a table of the blocks of one pruning."""
    by, given = plan.method, plan.settings
    if best := plan.origin.get("best"):
        by, given = f"{best['method']}, the best of {len(given['candidates'])} candidates,", best
    settings = ", ".join(f"`{name}: {value}`" for name, value in given.items() if name != "method")
    rows = [["block", "parameters left", "what stays"]]
    for i, (before, after) in enumerate(zip(plan.before, plan.after, strict=True)):
        rows.append([str(i), f"{after:,} of {before:,}", _kept(plan, i)])
    return f"By {by} ({settings}): {plan.reached:.1%} of the blocks' parameters.\n\n{markdown_table(rows)}"


def _kept(plan: PruningPlan, block: int) -> str:
    if block in plan.dropped:
        return "nothing"
    bare = f"blocks.{block}.whole_ffn" in plan.keep
    names = {u: f"blocks.{block}.{kind}" for kind, u in UNITS.items() if not (bare and kind in IN_FFN)}
    return ", ".join(
        f"{plan.keep[name].shape[-1]} of {plan.sizes[name]} {unit}" for unit, name in names.items() if name in plan.keep
    )


def _quality(record: dict[str, Any]) -> str:
    """Perplexities and training settings of the run."""
    if not record.keys() & {"perplexity", "training"}:
        return ""
    rows = record.get("perplexity", {})
    cells = [["", "perplexity"], *([name, f"{value:.2f}"] for name, value in rows.items())]
    lines = ["## What it cost", "", markdown_table(cells)] if rows else ["## Recovery", ""]
    if text := record.get("text"):
        lines += ["", "Measured on held-out text of the run: " + _listed(text) + "."] if rows else []
    if training := record.get("training"):
        lines += ["", "Recovered: " + _listed(training) + "."]
    return "\n".join(lines)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _origin(plan: PruningPlan, record: dict[str, Any]) -> str:
    origin = plan.origin
    versions = ", ".join(f"{name} {number}" for name, number in origin.get("versions", {}).items())
    calibration = "not recorded, as the method was called by itself and not by `plprune.prune`"
    if "tokens" in origin:
        seed, text = origin.get("seed"), origin.get("calibration")
        calibration = f"{origin['tokens']:,} tokens, fingerprint {text}, seed {seed}"
    return "\n".join(
        [
            f"- Base model: {plan.chain()[0].origin.get('model')}, weights {plan.chain()[0].origin.get('weights')}",
            f"- Licence: {record.get('licence') or UNKNOWN}",
            "- Calibration: " + calibration,
            f"- Plan {plan.digest}; {versions}",
        ]
    )
