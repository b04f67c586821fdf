"""What more windows do for LearnedGates, and what millions of tokens recover: perplexity of a real model.

Every cell is kept in the folder by what it is made from, as `plprune compare` does.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from plprune import CFSP, Distillation, LearnedGates, LoRA, PruningMethod
from plprune.comparison.bench import Bench, Cell
from plprune.comparison.study import CalibrationText, Study, Training
from plprune.evaluation.perplexity import Protocol
from tests.benchmarks.gpu.models import Cells

BATCH = 32  # windows of a step
WAYS: dict[str, dict[str, Any]] = {
    "importance": {"lora": LoRA(by="importance")},
    "uniform": {"lora": LoRA(by="uniform")},
    "damage": {"lora": LoRA(by="damage")},
    "consumers": {"train": "consumers"},
    "distilled": {"distill": Distillation()},
    "all": {"train": "all", "learning_rate": 1e-4},
    "all, distilled": {"train": "all", "learning_rate": 1e-4, "distill": Distillation()},
}


def quality(args: argparse.Namespace, device: torch.device, record: dict[str, Any]) -> Cells:
    def study(method: PruningMethod, windows: int, *sparsities: float, recover: int = 0) -> Study:
        length, steps = args.length // 4, recover // (BATCH * (args.length // 4))
        ways = [
            Training(args.train, steps, length, BATCH, name=f"{way}, {recover / 1e6:g}M tokens", **settings)
            for way, settings in WAYS.items()
        ]
        return Study(
            [args.model], [method], sparsities, [args.wikitext, args.books],
            [CalibrationText(args.train, windows, length)], join="\n\n", dtype="bfloat16", device=device,
            protocol=Protocol(args.length // 2, max_windows=args.windows), recover=ways if recover else None,
        )  # fmt: skip

    few, *more = args.tokens
    studies = [study(CFSP(), 128, 0.25, recover=few)]
    studies += [study(LearnedGates(), windows, 0.25, 0.5) for windows in args.gates]
    studies += [study(CFSP(), 128, 0.25, recover=tokens) for tokens in more]
    cells: Cells = {}
    for each in studies:
        each.check()
        found = following(functools.partial(Bench, each, args.model, args.output / "quality"))
        for i, name in enumerate(names(each)):
            cells.setdefault(name, functools.partial(found, i))
    return cells


def names(study: Study) -> list[str]:
    """What the cells of a study are called, in their order."""
    found = ["dense"]
    for text, _, request in study.prunings():
        method = request.method
        what = f"{type(method).__name__} {method.sparsity:.0%}, {text.num_samples} windows"
        found += [what, *(f"{what}, {stage}" for stage in study.stages[1:])]
    return found


def following(bench: Callable[[], Bench]) -> Callable[[int], dict[str, Any]]:
    """Gives the cells of a bench by their numbers; none is computed before it or a later one is asked for."""
    known: list[Cell] = []

    @functools.cache
    def cells() -> Iterator[Cell]:
        return (cell for _, cell in bench().cells())

    def numbered(i: int) -> dict[str, Any]:
        while len(known) <= i:
            cell = next(cells(), None)
            if cell is None:
                raise ValueError("one before it failed, of the same study")
            known.append(cell)
        return figures(known[i])

    return numbered


def figures(cell: Cell) -> dict[str, Any]:
    if "error" in cell:
        raise ValueError(cell["error"])
    (books,) = cell["texts"].values()
    found = {"WikiText-2": cell["perplexity"], "books": books["perplexity"], "parameters": cell["parameters"]}
    return found | {f"seconds to {what}": seconds for what, seconds in cell["seconds"].items()}
