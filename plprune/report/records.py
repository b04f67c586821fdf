"""Collects the data of a report from a folder: a finished or running fit, a plan, parity tables, evaluations."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from plprune.architecture.blocks import IN_FFN, UNITS
from plprune.checkpoint.model_card import RECORD
from plprune.pruning.plan import FILE, PruningPlan, composed
from plprune.report.page import at

KINDS = ("run", "comparison", "sensitivity")
PARITY = "parity.json"
LOOKED_FOR = "report.json, plan.safetensors, or a JSON file of evaluate, compare or sensitivity"


def collect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a folder, with the parity tables and evaluations in it or one folder deeper.

    Args:
        path: The folder of a run, a folder that plprune has written a model to, or a JSON file of a record.

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
    return with_true_status(record)


def with_true_status(record: dict[str, Any]) -> dict[str, Any]:
    """The record, marked as stopped if it says that it is running but its process is gone."""
    process = at(record, "process")
    here = process.get("host") == platform.node() and os.name == "posix"  # elsewhere `os.kill` would end the process
    if record.get("status") != "running" or not here or _alive(process.get("pid")):
        return record
    return record | {"status": "stopped", "reason": "its process is gone"}


def this_process() -> dict[str, Any]:
    """The host and the number of this process, by which :func:`with_true_status` finds out whether it still runs."""
    return {"host": platform.node(), "pid": os.getpid()}


def versions(*names: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def title_of(record: dict[str, Any]) -> str:
    """The title of a run."""
    model = Path(str(record.get("model") or "")).name or "A model"
    method = at(record, "asked").get("method")
    return f"{model} pruned by {method}" if method else model


def of_plan(plan: PruningPlan) -> dict[str, Any]:
    """The part of a run's record that its plan holds: settings, sizes, blocks, versions, seeds, fingerprints."""
    first, origin = plan.chain()[0], plan.origin
    total, left = sum(first.before), sum(plan.after)
    prints = {"weights": first.origin.get("weights"), "calibration": origin.get("calibration"), "plan": plan.digest}
    return {
        "model": first.origin.get("model") or "",
        "asked": {"method": plan.method, "sparsity": plan.sparsity, "settings": plan.settings},
        "reached": {
            "sparsity": 1 - left / total,
            "sparsity_of_model": (total - left) / (total + plan.rest),
            "parameters": left + plan.rest,
            "block_parameters": left,
        },
        "blocks": _blocks(plan),
        "versions": origin.get("versions", {}),
        "seeds": {"calibration": origin["seed"]} if origin.get("seed") is not None else {},
        "fingerprints": {name: value for name, value in prints.items() if value},
    }


def _blocks(plan: PruningPlan) -> list[dict[str, Any]]:
    """Each block after all prunings, against what it was before the first."""
    kept: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    first = plan.chain()[0].before
    places = list(range(len(first)))  # for each block of the model, its index before the first pruning
    after, importance = [0] * len(first), [0.0] * len(first)
    for step in plan.chain():
        for name, index in step.keep.items():
            _, i, kind = name.split(".")
            name = f"blocks.{places[int(i)]}.{kind}"
            kept[name] = composed(kept[name], index) if name in kept else index
            sizes.setdefault(name, step.sizes[f"blocks.{i}.{kind}"])
        for i, place in enumerate(places):
            after[place], importance[place] = step.after[i], float(step.importance[i])
        places = [places[i] for i in step.remaining]
    gone = set(range(len(first))) - set(places)
    usual = {name.rpartition(".")[2]: size for name, size in sizes.items()}  # of blocks that were not pruned
    blocks = []
    for i, before in enumerate(first):
        names = {kind: f"blocks.{i}.{kind}" for kind in UNITS if kind in usual}
        units = {
            kind: [kept[name].shape[-1], sizes[name]] if name in kept else [usual[kind]] * 2
            for kind, name in names.items()
        }
        bare = units.get("whole_ffn", [1])[0] == 0
        left = {kind: i not in gone and not (bare and kind in IN_FFN) for kind in units}
        units = {kind: [count if left[kind] else 0, size] for kind, (count, size) in units.items()}
        block = {"kept": units, "parameters": [before, after[i]], "importance": importance[i]}
        if "attention" in names:
            heads = kept.get(names["attention"])
            whole = list(range(usual["attention"])) if heads is None else heads.tolist()
            block["heads"] = [] if i in gone else whole
        blocks.append(block)
    return blocks


def _record(path: Path) -> dict[str, Any] | None:
    """The record to begin with: the report of a run, a plan, or another record; None if there is none."""
    if path.is_file():
        record = _read(path)
        if record.get("kind") not in KINDS:
            raise ValueError(f"{path} holds no record of plprune: name one, or a folder")
        return record
    if (path / "report.json").exists():
        return _record(path / "report.json")
    if (path / FILE).exists():
        return _of_folder(path)
    others = (record for file in sorted(path.glob("*.json")) if (record := _read_any(file)).get("kind") in KINDS)
    if other := next(others, None):
        return other
    exported, planned = _newest(path, f"*/{FILE}"), _newest(path, f"plans/*/{FILE}")
    if exported:
        return _of_folder(exported.parent)
    if planned:
        return _of_folder(planned.parent) | {"status": "stopped", "reason": "there is only its plan"}
    return None


def _newest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), key=lambda file: file.stat().st_mtime, default=None)


def _with_plan(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record with the plan of the run, which is on disk before the report mentions it."""
    plan = _newest(folder, f"plans/*/{FILE}")
    if plan is None or record.get("blocks") or not record.get("asked"):
        return record
    planned = of_plan(PruningPlan.load(plan))
    if planned["asked"]["settings"] != at(record, "asked").get("settings"):
        return record  # the plan is that of an earlier run
    return planned | {name: value for name, value in record.items() if value}


def _of_folder(folder: Path) -> dict[str, Any]:
    """The record of a folder with a plan, with the notes of the run that wrote it."""
    record: dict[str, Any] = {"version": 1, "kind": "run", "status": "finished"}
    record |= of_plan(PruningPlan.load(folder))
    noted = _read_any(folder / RECORD)
    record["stages"] = {stage: {"perplexity": value} for stage, value in at(noted, "perplexity").items()}
    noted.pop("perplexity", None)
    return record | ({"noted": noted} if noted else {}) | {"title": title_of(record)}


def _with_evaluation(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record with the tasks, the speed and the perplexities of `plprune evaluate`."""
    files = [file for file in [*folder.glob("*.json"), *folder.glob("*/*.json")] if file.name != "report.json"]
    for evaluation in map(_read_any, sorted(files)):
        same = all(evaluation.get(key) == record.get(key) for key in ("title", "stages"))
        if evaluation.get("kind") != "run" or same:  # the latter is the record itself
            continue
        last = "recovered" if "recovered" in at(record, "stages") else "pruned"  # evaluate knows no recovery
        for key, place in (("tasks", "tasks"), ("speed", "speed"), ("stages", "evaluation")):
            if found := {last if stage == "pruned" else stage: each for stage, each in at(evaluation, key).items()}:
                record = record | {place: at(record, place) | found}
        more = ("protocol", "not_faster", "averages", "differences")
        record = record | {key: evaluation[key] for key in more if evaluation.get(key)}
    return record


def _with_parity(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    for file in (folder / PARITY, *sorted(folder.glob(f"*/{PARITY}")), folder.parent / PARITY):
        if parity := _read_any(file):
            return record | {"parity": parity}
    return record


def _read_any(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, as a folder may hold files of others."""
    try:
        return _read(file) if file.is_file() else {}
    except ValueError:
        return {}


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or no JSON ({error}): write it again") from error
    return record if isinstance(record, dict) else {}


def _alive(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, TypeError):  # the last two: it is no process's number
        return False
    except PermissionError:
        pass
    return True
