"""Tokens that a model writes in a second, dense and pruned, one sequence and as many as pay, in transformers.

Whole heads and FFN channels are pruned, alike in all blocks: of random weights none counts for more.
"""

import argparse
import dataclasses
import functools
from typing import Any

import torch

from plprune import FASP, Calibration, prune
from plprune.evaluation.speed import measure_speed
from tests.benchmarks.gpu.models import Cells, depth, made, tokens

SIZES = ("Llama-3.2-1B", "Llama-3-8B")
SPARSITIES = {"dense": 0.0, "25%": 0.25, "50%": 0.5}


def decode(args: argparse.Namespace, device: torch.device, record: dict[str, Any]) -> Cells:
    prompt, new_tokens, own = args.length // 16, max(2, args.length // 128), record["decode"]["cells"]

    def written(shape: str, name: str) -> dict[str, Any]:
        model, sparsity = made(shape, depth(shape), device, args.length, **args.small), SPARSITIES[name]
        if sparsity:
            text = tokens(model, 8, args.length // 4)
            prune(model, FASP(sparsity, attention="kv_heads"), Calibration(list(text.split(4)), device))
        speed = measure_speed(model, prompt, new_tokens, repeats=3)
        found = {"tokens/s, batch 1": speed.writing.median, "saturated": speed.saturated.median, "batch": speed.batch}
        dense = own[f"{shape}: dense"]
        if sparsity and "saturated" in dense:
            found |= {f"{key}, over dense": found[key] / dense[key] for key in ("tokens/s, batch 1", "saturated")}
        return found | {"measured": dataclasses.asdict(speed)}

    return {f"{shape}: {name}": functools.partial(written, shape, name) for shape in SIZES for name in SPARSITIES}
