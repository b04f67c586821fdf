"""A section in a process of its own, with what it measures in a file as soon as it is there."""

import argparse
import functools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from plprune.io.atomic import staged
from plprune.io.tables import text_table
from plprune.io.units import format_value
from tests.benchmarks.gpu.decode import decode
from tests.benchmarks.gpu.models import Cells, called
from tests.benchmarks.gpu.plan import plan
from tests.benchmarks.gpu.pruning import pruning
from tests.benchmarks.gpu.quality import quality
from tests.benchmarks.gpu.recovery import recovery

Section = Callable[[argparse.Namespace, torch.device, dict[str, Any]], Cells]
SECTIONS: dict[str, tuple[Section, float]] = {  # with seconds
    "pruning": (pruning, 170),
    "recovery": (recovery, 110),
    "quality": (quality, 170),
    "plan": (plan, 30),
    "decode": (decode, 110),
}


def measure(section: str, args: argparse.Namespace) -> None:
    """Measures what of a section is not in the file yet, in this process."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = {name: value for name, value in vars(args).items() if name not in ("sections", "output", "limit")}
    made_with = {"device": called(device), "torch": torch.__version__, "arguments": sizes}
    record = read(args.output)
    own = record.setdefault(section, made_with | {"cells": {}})
    if own | made_with != own:
        raise ValueError(f"{section} in {args.output} was measured elsewhere or otherwise: give another folder")
    own["cells"] = known = {name: cell for name, cell in own["cells"].items() if is_measured(cell)}
    try:
        cells = {name: work for name, work in SECTIONS[section][0](args, device, record).items() if name not in known}
    except (ValueError, OSError) as error:
        cells = {section: functools.partial(failing, error)}
    known |= {name: {"missing": "not reached"} for name in cells}
    for name, work in cells.items():
        known[name] = {"missing": "cut short"}
        write(record, args.output)
        try:
            known[name] = work()
        except Exception as error:
            known[name] = {"missing": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        print(f"{section}, {name}: {known[name]}", flush=True)
    write(record, args.output)


def failing(error: Exception) -> dict[str, Any]:
    raise error


def is_measured(cell: dict[str, Any]) -> bool:
    return "missing" not in cell


def read(folder: Path) -> dict[str, Any]:
    file = folder / "gpu.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write(record: dict[str, Any], folder: Path) -> None:
    with staged(folder / "gpu.json", overwrite=True) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def within(section: str, args: argparse.Namespace, limit: float) -> None:
    """Measures a section in a process that ends in time, even if it hangs, and frees what it had of the GPU."""
    with tempfile.TemporaryDirectory() as room, patch.dict(os.environ, TMPDIR=room):  # what is cut leaves files
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(section, args))
        process.start()
        process.join(limit)
        cut = process.is_alive()
        process.kill()
        process.join()
    if process.exitcode:
        print(f"{section} {f'was cut after {limit:g} seconds' if cut else 'failed'}", flush=True)


def table(record: dict[str, Any]) -> str:
    """All that was measured, a part for each section; what was not, below it."""
    parts = []
    for section, own in record.items():
        measured = {name: cell for name, cell in own["cells"].items() if is_measured(cell)}
        keys = [k for k in dict.fromkeys(k for cell in measured.values() for k in cell) if k != "measured"]
        rows = [[f"{section}, {own['device']}", *keys]]
        rows += [
            [name, *(format_value(cell[key]) if key in cell else "" for key in keys)] for name, cell in measured.items()
        ]
        lines = [f"{name}: {cell['missing']}" for name, cell in own["cells"].items() if not is_measured(cell)]
        parts.append("\n".join([text_table(rows, [0] * len(rows[0])), *lines]))
    return "\n\n".join(parts)
