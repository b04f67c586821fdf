"""Time to prune in one process over the time in two that share the calibration windows, one thread each.

    python -m tests.benchmarks.parallel [--samples 16] [--seq_len 256] [--repeats 3]

Both are measured in turn, in one run and on the same processes: the second waits while the first works alone.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.distributed as dist

from plprune import CFSP, FASP, FLAP, Calibration, PruningMethod, TwoSSP, prune
from plprune.checkpoint.load import load_model
from plprune.io import distributed
from tests.benchmarks.pruning import batches
from tests.ranks import in_ranks
from tests.shared import SMOLLM2

METHODS: dict[str, PruningMethod] = {
    "FLAP": FLAP(0.2),
    "CFSP": CFSP(0.2),
    "2SSP": TwoSSP(0.2, drop_attentions=1),
    "FASP, value channels": FASP(0.2),
    "FASP, kv heads": FASP(0.2, attention="kv_heads"),
}


def measure(samples: int, seq_len: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each method: alone, and together."""
    torch.set_num_threads(1)
    dense, text, world = load_model(SMOLLM2), batches(samples, seq_len), distributed.world()
    return {
        name: (
            statistics.median(alone for alone, _ in pairs),
            statistics.median(together for _, together in pairs),
        )
        for name, method in METHODS.items()
        for pairs in [[(once(dense, method, text, None), once(dense, method, text, world)) for _ in range(repeats)]]
    }


def once(dense, method: PruningMethod, text, group: distributed.ProcessGroup) -> float:
    model = copy.deepcopy(dense)
    dist.barrier()
    start = time.perf_counter()
    if group is not None or distributed.rank(distributed.world()) == 0:
        prune(model, method, Calibration(text, group=group))
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.samples * args.seq_len} tokens, {args.repeats} repeats, one thread per process, float32")
    print(f"{'method':<24}{'one process':>14}{'two':>10}{'ratio':>8}")
    for name, (alone, together) in in_ranks(measure, args.samples, args.seq_len, args.repeats, seconds=3600)[0].items():
        print(f"{name:<24}{alone:>12.2f} s{together:>8.2f} s{alone / together:>8.2f}")


if __name__ == "__main__":
    main()
