"""Time to prune over the time of one bare forward pass through the same blocks and tokens, and peak memory.

    python -m tests.benchmarks.pruning [--samples 16] [--seq_len 512] [--repeats 3]

Every ratio is of two medians taken in turn in one run; the memory of each method is measured in a process of its own.
"""

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import CFSP, FASP, FLAP, Calibration, PruningMethod, TwoSSP, prune
from plprune.checkpoint.load import load_model
from plprune.pruning.forward import evaluating
from tests.shared import SMOLLM2

METHODS: dict[str, PruningMethod] = {
    "FLAP": FLAP(0.2),
    "CFSP": CFSP(0.2),
    "2SSP, first stage": TwoSSP(0.2, drop_attentions=0),
    "FASP, value channels": FASP(0.2),
    "FASP, kv heads": FASP(0.2, attention="kv_heads"),
}


def bare(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """One forward pass through the blocks, without the head."""
    with torch.no_grad(), evaluating(model):
        for ids in batches:
            model.base_model(input_ids=ids, use_cache=False)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_memory(method: PruningMethod, samples: int, seq_len: int) -> tuple[float, float]:
    """Megabytes of the model's weights, and of what pruning takes at its peak beyond the loaded model."""
    torch.set_num_threads(2)
    model = load_model(SMOLLM2)
    text = batches(samples, seq_len)
    bare(model, text[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    loaded = resident("VmHWM")
    prune(model, method, text)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return weights, resident("VmHWM") - loaded


def resident(key: str) -> float:
    """Megabytes of memory by the kernel's account (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def batches(samples: int, seq_len: int) -> list[Tensor]:
    ids = torch.randint(5, 49000, (samples, seq_len), generator=torch.Generator().manual_seed(0))
    return list(ids.split(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    dense, text = load_model(SMOLLM2), batches(args.samples, args.seq_len)
    bare(dense, text[:1])
    tokens = args.samples * args.seq_len
    print(f"{tokens} tokens, {args.repeats} repeats, {torch.get_num_threads()} threads, float32")
    print(f"{'method':<24}{'bare pass':>12}{'prune':>10}{'ratio':>8}")
    for name, method in METHODS.items():
        passes, prunings = [], []
        for _ in range(args.repeats):
            passes.append(seconds(lambda: bare(dense, text)))
            model = copy.deepcopy(dense)
            prunings.append(seconds(lambda m=model, p=method: prune(m, p, Calibration(text))))
        bare_s, prune_s = statistics.median(passes), statistics.median(prunings)
        print(f"{name:<24}{bare_s:>10.2f} s{prune_s:>8.2f} s{prune_s / bare_s:>8.2f}", flush=True)
    print(f"\n{'method':<24}{'pruned weights':>16}{'peak over the loaded model':>28}")
    for name, method in METHODS.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            weights, peak = pool.apply(peak_memory, (method, args.samples, args.seq_len))
        print(f"{name:<24}{weights:>13.0f} MB{peak:>25.0f} MB", flush=True)


if __name__ == "__main__":
    main()
