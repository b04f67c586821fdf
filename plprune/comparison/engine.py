"""Compares methods: every method at every sparsity on every model, with every seed, under one protocol.

Common work is done once: for each seed, one pass over the dense model collects the activation statistics that most
methods use. Every result is cached under everything that it depends on (weights, text, method with its settings,
protocol, and the source code that computes it), so that a stopped comparison continues where it stopped, and a new
method repeats no earlier work.

Any number of processes, started by torchrun or otherwise, can share one output folder, also from several machines: each
takes work that no other process has taken, and they communicate only through files.
"""

import dataclasses
import os
import time
from typing import Any

from plprune.comparison.bench import Bench, Cell, machine
from plprune.comparison.study import Study
from plprune.io.atomic import resolve_path, staged
from plprune.io.distributed import without_launcher
from plprune.io.progress import Progress
from plprune.report import NAME, check_replaceable, completed, write
from plprune.report.comparison import plots
from plprune.report.records import this_process, versions


def compare(study: Study, output: str | os.PathLike[str]) -> dict[str, Any]:
    """Computes the cells that the output's cache lacks, and writes a report after each.

    Of processes that torchrun has started, each computes cells that no other computes, and the first reports all.
    Failed cells are not cached, and each process may try them.

    Args:
        study: The settings.
        output: Folder of the cache, of `report.html` with `report.json`, and of the plots as SVG; a comparison in it
            is continued.

    Returns:
        The record, as in `report.json`; in other processes than the first, with the cells that they computed or read.

    Raises:
        ValueError: A model, text or task does not exist, or a setting is out of range.
    """
    study.check()
    output = resolve_path(output)
    page = output / NAME
    check_replaceable(page)
    cells: dict[tuple[int, int], list[Cell]] = {}  # by model and part
    start = time.perf_counter()

    def so_far(status: str) -> dict[str, Any]:
        return comparison_record(study, [cell for part in sorted(cells) for cell in cells[part]], status, start)

    with without_launcher() as rank, Progress(study.size, "comparing", "cell", quiet=rank > 0) as bar:
        for i, name in enumerate(study.models):
            for part, cell in Bench(study, name, output).cells(first=rank == 0):
                cells.setdefault((i, part), []).append(cell)
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


def comparison_record(study: Study, cells: list[Cell], status: str, start: float) -> dict[str, Any]:
    """The record of a report."""
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
        "versions": versions("plprune", "torch", "transformers", "peft", "lightning"),
        "cells": cells,
    }
