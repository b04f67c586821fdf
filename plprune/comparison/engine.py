"""Methods side by side: every method at every sparsity on every model, with every seed, under one protocol.

What many of these have in common is computed once: the activations of the dense model, which decide most prunings, are
observed in one pass for each seed. Every result is kept under the content of what it was made from (weights, text,
method with its settings, protocol, and the source of all that computes it), so that a comparison that was stopped goes
on where it was, and a new method costs only itself.

Any number of processes can work in one folder, those that torchrun has started or others: each takes what nobody is at.
They send each other nothing, and may be on several machines that share the folder.
"""

import dataclasses
import os
import time
from importlib.metadata import version
from typing import Any

from plprune.comparison.bench import Bench, Cell, machine
from plprune.comparison.study import Study
from plprune.io.atomic import resolve_path, staged
from plprune.io.distributed import without_launcher
from plprune.io.progress import Progress
from plprune.report import NAME, check_replaceable, completed, write
from plprune.report.comparison import plots
from plprune.report.records import this_process


def compare(study: Study, output: str | os.PathLike[str]) -> dict[str, Any]:
    """Computes what is not in the output's cache yet, and reports after every cell.

    Of processes that torchrun has started, each computes what nobody has taken, and the first reports all. What could
    not be done is not kept, and each of them may try it.

    Args:
        study: What is compared.
        output: Folder of the cache, of `report.html` with `report.json`, and of the plots as SVG; what is there is
            kept, and gone on with.

    Returns:
        The record, as in `report.json`; in other processes than the first, of the cells that they came by.

    Raises:
        ValueError: A model, text or task is not there, or a setting is out of range.
    """
    study.check()
    output = resolve_path(output)
    page = output / NAME
    check_replaceable(page)
    found: dict[tuple[int, int], list[Cell]] = {}  # by model and part
    start = time.perf_counter()

    def so_far(status: str) -> dict[str, Any]:
        return record(study, [cell for place in sorted(found) for cell in found[place]], status, start)

    with without_launcher() as rank, Progress(study.size, "comparing", "cell", quiet=rank > 0) as bar:
        for i, name in enumerate(study.models):
            for part, cell in Bench(study, name, output).cells(first=rank == 0):
                found.setdefault((i, part), []).append(cell)
                bar.update()
                if rank == 0:
                    write(so_far("running"), page, overwrite=True)
    done = completed(so_far("finished"))
    if rank > 0:
        return done
    write(done, page, overwrite=True)
    for name, svg in plots(done).items():
        with staged(output / f"{name}.svg", overwrite=True) as temporary:
            temporary.write_text(svg, encoding="utf-8")
    return done


def record(study: Study, cells: list[Cell], status: str, start: float) -> dict[str, Any]:
    """What a report is made from."""
    protocol = {
        "text": ", ".join(study.sources),
        "calibration": {each.name: dataclasses.asdict(each) for each in study.calibrations},
        "recovery": {each.name: dataclasses.asdict(each) for each in study.recoveries},
        "tasks_limit": study.limit,
        "dtype": study.dtype or "as stored",
        "seeds": list(study.seeds),
    }
    return {
        "version": 1,
        "kind": "comparison",
        "title": "Comparison of " + ", ".join(dict.fromkeys(type(method).__name__ for method in study.methods)),
        "status": status,
        "process": this_process(),
        "progress": {"step": len(cells), "steps": study.size},
        "protocol": protocol | dataclasses.asdict(study.protocol),
        "machine": machine(),
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("plprune", "torch", "transformers", "peft", "lightning")},
        "cells": cells,
    }
