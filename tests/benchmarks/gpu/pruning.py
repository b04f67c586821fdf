"""What pruning takes over one bare forward pass through the same blocks.

OPT-125M has all of its blocks; of the others a few do, as each block takes as long as the next, and what all would take
by that stands beside it. Not of TwoSSP, whose second stage grows by the square. In the end FASP prunes
all of LLaMA-30B.
"""

import argparse
import copy
import functools
import statistics
from typing import Any

import torch
from transformers import PreTrainedModel

from plprune import CFSP, FASP, FLAP, Calibration, LearnedGates, PruningMethod, TwoSSP, prune
from plprune.pruning.forward import evaluating
from tests.benchmarks.gpu.models import Cells, depth, made, timed, tokens

BLOCKS = {"OPT-125M": 12, "Llama-3-8B": 4, "LLaMA-30B": 2}
BATCH = 4  # windows that are run at once
BARE, WHOLE = "bare pass", "LLaMA-30B, all blocks: FASP"
METHODS: dict[str, PruningMethod] = {
    "FLAP": FLAP(0.25),
    "CFSP": CFSP(0.25),
    "TwoSSP, first stage": TwoSSP(0.25, drop_attentions=0),
    "FASP": FASP(0.25),
    "FASP, kv heads": FASP(0.25, attention="kv_heads"),
    "TwoSSP": TwoSSP(0.25),
    "LearnedGates": LearnedGates(0.25),
}


def bare(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    """One forward pass through the blocks, without the head."""
    with torch.no_grad(), evaluating(model):
        for ids in batches:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)


def pruning(args: argparse.Namespace, device: torch.device, record: dict[str, Any]) -> Cells:
    def built(shape: str, blocks: int) -> tuple[PreTrainedModel, list[torch.Tensor]]:
        model = made(shape, blocks, device, args.length, **args.small)
        batches = list(tokens(model, args.windows, args.length).split(BATCH))
        bare(model, batches[:1])  # what is done once only does not count
        return model, batches

    @functools.lru_cache(1)
    def dense(shape: str) -> tuple[PreTrainedModel, list[torch.Tensor]]:
        return built(shape, BLOCKS[shape])

    def passing(shape: str) -> dict[str, Any]:
        model, batches = dense(shape)
        return {"seconds": statistics.median(timed(device, lambda: bare(model, batches))[0] for _ in range(3))}

    def pruned(shape: str, name: str) -> dict[str, Any]:
        model, batches = copy.deepcopy(dense(shape)[0]), dense(shape)[1]
        work = functools.partial(prune, model, METHODS[name], Calibration(batches, device))
        seconds, peak = timed(device, work)
        found = {"seconds": seconds, "peak over the model, GB": peak}
        once = record["pruning"]["cells"][f"{shape}: {BARE}"].get("seconds")
        if once:
            found["over a bare pass"] = seconds / once
        if name != "TwoSSP":
            found["all blocks, by these"] = seconds * depth(shape) / BLOCKS[shape]
        return found

    def whole() -> dict[str, Any]:
        dense.cache_clear()
        model, batches = built("LLaMA-30B", depth("LLaMA-30B"))
        seconds, peak = timed(device, lambda: prune(model, METHODS["FASP"], Calibration(batches, device)))
        return {"seconds": seconds, "peak over the model, GB": peak}

    cells: Cells = {}
    for chosen in ([BARE, *METHODS][:-1], ["LearnedGates"]):  # what takes longest comes last
        for shape in BLOCKS:
            for name in chosen:
                work = functools.partial(passing, shape) if name == BARE else functools.partial(pruned, shape, name)
                cells[f"{shape}: {name}"] = work
    return cells | {WHOLE: whole}
