"""Records of what is in a folder: what a run has written so far, a plan, tables of parity, evaluations."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from plprune.checkpoint.model_card import RECORD
from plprune.pruning.plan import FILE, PruningPlan
from plprune.report.page import at

KINDS = ("run", "comparison", "sensitivity")
PARITY = "parity.json"
LOOKED_FOR = "report.json, plan.safetensors, or a JSON file of evaluate, compare or sensitivity"


def found(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of what is in a folder, with the parity and the evaluation that lie there or one folder deeper.

    Args:
        path: The folder of a run, one that plprune has written a model to, or a JSON file of a record.

    Raises:
        ValueError: There is nothing to report, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: name the folder of a run, or a JSON file that plprune has written")
    record = _record(path)
    if record is None:
        raise ValueError(f"nothing to report in {path}: there is no {LOOKED_FOR}")
    if record["kind"] == "run" and path.is_dir():
        record = _with_parity(_with_evaluation(_with_plan(record, path), path), path)
    return as_it_is(record)


def as_it_is(record: dict[str, Any]) -> dict[str, Any]:
    """The record, stopped if it says that it is running but its process is no longer there."""
    process = at(record, "process")
    here = process.get("host") == platform.node() and os.name == "posix"  # elsewhere the same call would end it
    if record.get("status") != "running" or not here or _alive(process.get("pid")):
        return record
    return record | {"status": "stopped", "reason": "its process is gone"}


def of_process() -> dict[str, Any]:
    """By which to know whether this process is still there."""
    return {"host": platform.node(), "pid": os.getpid()}


def of_plan(plan: PruningPlan) -> dict[str, Any]:
    """What a plan says of a run: asked, reached, blocks, versions, seeds, fingerprints."""
    first, origin = plan.chain()[0], plan.origin
    total, left = sum(first.before), sum(plan.after)
    asked = {"method": plan.method, "sparsity": plan.sparsity, "settings": plan.settings}
    return {
        "model": first.origin.get("model") or "",
        "asked": asked,
        "reached": {
            "sparsity": 1 - left / total,
            "sparsity_of_model": (total - left) / (total + plan.rest),
            "parameters": left + plan.rest,
            "block_parameters": left,
        },
        "blocks": _blocks(plan),
        "versions": origin.get("versions", {}),
        "seeds": {"calibration": origin["seed"]} if origin.get("seed") is not None else {},
        "fingerprints": {
            name: value
            for name, value in (
                ("weights", first.origin.get("weights")),
                ("calibration", origin.get("calibration")),
                ("plan", plan.digest),
            )
            if value
        },
    }


def versions(*names: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def title_of(record: dict[str, Any]) -> str:
    """What to call a run."""
    model = Path(str(record.get("model") or "")).name or "A model"
    method = (record.get("asked") or {}).get("method")
    return f"{model} pruned by {method}" if method else model


def _blocks(plan: PruningPlan) -> list[dict[str, Any]]:
    """Each block as it is after all prunings, against what it was before the first."""
    kept: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for step in plan.chain():
        for name, index in step.keep.items():
            kept[name] = kept[name][index] if name in kept else index
            sizes.setdefault(name, step.sizes[name])
    usual = {name.rpartition(".")[2]: size for name, size in sizes.items()}  # of blocks that a method left alone
    blocks = []
    for i, (before, after) in enumerate(zip(plan.chain()[0].before, plan.after, strict=True)):
        names = {kind: f"blocks.{i}.{kind}" for kind in ("attention", "value", "ffn") if kind in usual}
        pairs = {
            kind: [len(kept[name]), sizes[name]] if name in kept else [usual[kind]] * 2 for kind, name in names.items()
        }
        block = {"kept": pairs, "parameters": [before, after], "importance": float(plan.importance[i])}
        if "attention" in names:
            own = kept.get(names["attention"])
            block["heads"] = list(range(usual["attention"])) if own is None else own.tolist()
        blocks.append(block)
    return blocks


def _record(path: Path) -> dict[str, Any] | None:
    """What there is to begin with: the report of a run, a plan, another record."""
    if path.is_file():
        record = _read(path)
        if record.get("kind") not in KINDS:
            raise ValueError(f"{path} holds no record of plprune: name one, or a folder")
        return record
    if (path / "report.json").exists():
        return _record(path / "report.json")
    if (path / FILE).exists():
        return _of_folder(path)
    others = [record for file in sorted(path.glob("*.json")) if (record := _tried(file)).get("kind") in KINDS]
    if others:
        return others[0]
    exported, planned = _newest(path, f"*/{FILE}"), _newest(path, f"plans/*/{FILE}")
    if exported:
        return _of_folder(exported.parent)
    if planned:
        return _of_folder(planned.parent) | {"status": "stopped", "reason": "there is only its plan"}
    return None


def _newest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), key=lambda file: file.stat().st_mtime, default=None)


def _with_plan(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record with the plan of the run, which is there before its report says so."""
    plan = _newest(folder, f"plans/*/{FILE}")
    if plan is None or record.get("blocks") or not record.get("asked"):
        return record
    known = of_plan(PruningPlan.load(plan))
    if known["asked"]["settings"] != at(record, "asked").get("settings"):
        return record  # that of an earlier run
    return known | {name: value for name, value in record.items() if value}


def _of_folder(folder: Path) -> dict[str, Any]:
    """The record of a folder with a plan, and what the run that wrote it noted down."""
    record: dict[str, Any] = {"version": 1, "kind": "run", "status": "finished"}
    record |= of_plan(PruningPlan.load(folder))
    noted = _tried(folder / RECORD)
    record["stages"] = {stage: {"perplexity": value} for stage, value in at(noted, "perplexity").items()}
    noted.pop("perplexity", None)
    return record | ({"noted": noted} if noted else {}) | {"title": title_of(record)}


def _with_evaluation(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record with the tasks, the speed and the perplexities of `plprune evaluate`."""
    files = [file for file in [*folder.glob("*.json"), *folder.glob("*/*.json")] if file.name != "report.json"]
    judged = [each for file in sorted(files) if (each := _tried(file)).get("kind") == "run"]
    for each in judged:
        if each.get("title") == record.get("title") and each.get("stages") == record.get("stages"):
            continue  # it is the record itself
        last = "recovered" if "recovered" in at(record, "stages") else "pruned"  # evaluate knows no recovery
        names = {"pruned": last}
        for key in ("tasks", "speed", "stages"):
            if of := {names.get(stage, stage): value for stage, value in at(each, key).items()}:
                name = "evaluation" if key == "stages" else key
                record = record | {name: at(record, name) | of}
        more = {key: each[key] for key in ("protocol", "not_faster", "averages", "differences") if each.get(key)}
        record = record | more
    return record


def _with_parity(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    for file in (folder / PARITY, *sorted(folder.glob(f"*/{PARITY}")), folder.parent / PARITY):
        if parity := _tried(file):
            return record | {"parity": parity}
    return record


def _tried(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, as not all that lies in a folder is ours."""
    try:
        return _read(file) if file.is_file() else {}
    except ValueError:
        return {}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or no JSON ({error}): write it again") from error
    return found if isinstance(found, dict) else {}


def _alive(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, TypeError):  # the last two: it is no process's number
        return False
    except PermissionError:
        pass
    return True
