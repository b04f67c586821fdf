"""What `plprune plan` foretells of the first two sections, beside what they took on this device.

The model is there as a whole when it is pruned: what crosses from main memory, which `plan` counts in, is left out.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from plprune.planning.hardware import Machine, machine
from plprune.planning.needs import Need, calibration_need, recovery_need
from tests.benchmarks.gpu.models import Cells, called, depth, made, sheet
from tests.benchmarks.gpu.pruning import BATCH, BLOCKS, METHODS, WHOLE
from tests.benchmarks.gpu.recovery import BATCHES, RANK, TURNS

CLOSE = 2.0  # times that an estimate may be off


def plan(args: argparse.Namespace, device: torch.device, record: dict[str, Any]) -> Cells:
    meta = torch.device("meta")

    @functools.cache
    def where() -> Machine:
        return machine(sheet(called(device)) or device.type)

    def pruning(shape: str, blocks: int, name: str) -> tuple[float, float]:
        model = made(shape, blocks, meta, args.length, **args.small)
        work = METHODS[name].work(model, args.windows, args.length)
        here = dataclasses.replace(where(), separate=False)
        return beside(model, calibration_need(model, work, here, (args.windows, args.length, BATCH)))

    def training(shape: str) -> tuple[float, float]:
        model = made(shape, depth(shape), meta, args.length, **args.small)
        return beside(model, recovery_need(model, where(), (1, BATCHES[shape], args.length), RANK))

    def judged(took: dict[str, Any], foretell: Callable[[], tuple[float, float]]) -> dict[str, Any]:
        (seconds, peak), measured = foretell(), took["peak over the model, GB"]
        ratio = took["seconds"] / seconds
        close = 1 / CLOSE <= ratio <= CLOSE
        found = {"seconds": took["seconds"], "foretold": seconds, "ratio": ratio, "within a factor of two": close}
        return found | ({"peak, foretold, GB": peak, "peak, ratio": measured / peak} if measured else {})

    foretold = {f"{s}: {name}": functools.partial(pruning, s, BLOCKS[s], name) for s in BLOCKS for name in METHODS}
    foretold[WHOLE] = functools.partial(pruning, "LLaMA-30B", depth("LLaMA-30B"), "FASP")
    foretold |= {f"{shape}: Recovery {TURNS}": functools.partial(training, shape) for shape in BATCHES}
    took = {k: v for part in ("pruning", "recovery") if part in record for k, v in record[part]["cells"].items()}
    known = [name for name in foretold if "seconds" in took.get(name, {})]
    if not known:
        raise ValueError("nothing was measured yet that could be foretold: run the sections pruning and recovery first")
    return {name: functools.partial(judged, took[name], foretold[name]) for name in known}


def beside(model: PreTrainedModel, need: Need) -> tuple[float, float]:
    """Seconds, and the memory beside the weights, in GB."""
    return need.seconds, (need.device_bytes - sum(p.numel() * p.element_size() for p in model.parameters())) / 1e9
