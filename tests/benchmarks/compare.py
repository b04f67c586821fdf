"""What a comparison costs over the sum of its prunings and evaluations, each done by itself.

    python -m tests.benchmarks.compare [--samples 16] [--seq_len 256] [--windows 8] [--sparsities 0.125 0.25 0.375 0.5]

SmolLM2-135M, the four methods at each sparsity, in one process. The comparison starts from nothing; loading the model
is counted in neither.
"""

import argparse
import dataclasses
import tempfile
import time

from plprune import CFSP, FASP, FLAP, Calibration, TwoSSP, prune
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.comparison.bench import Bench
from plprune.comparison.study import Study
from plprune.evaluation.perplexity import Protocol, judge, passage
from plprune.io.readers import PYDOC
from plprune.io.text import bos_token, draw, tokenised
from tests.shared import SMOLLM2

METHODS = (FLAP(), FASP(), CFSP(), TwoSSP())


def together(study: Study) -> float:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(study, SMOLLM2, folder)
        start = time.perf_counter()
        cells = list(bench.cells())
        seconds = time.perf_counter() - start
    assert len(cells) == study.size
    return seconds


def one_by_one(study: Study) -> float:
    tokenizer, total = load_tokenizer(SMOLLM2), 0.0
    text = passage(PYDOC, tokenizer, study.protocol)
    windows = draw(
        tokenised(PYDOC, tokenizer)[0], study.num_samples, study.calibration_seq_len, 0, bos_token(tokenizer)
    )
    for method in [None, *(pruning.request.method for pruning in study.prunings())]:
        model = load_model(SMOLLM2)
        start = time.perf_counter()
        if method is not None:
            prune(model, method, Calibration(list(windows.split(8))), 0)
        judge(model, text)
        total += time.perf_counter() - start
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5])
    args = parser.parse_args()
    study = Study([SMOLLM2], METHODS, args.sparsities, PYDOC, PYDOC)
    sizes = {"num_samples": args.samples, "calibration_seq_len": args.seq_len}
    study = dataclasses.replace(study, protocol=Protocol(512, max_windows=args.windows), **sizes)
    first, second = together(study), one_by_one(study)
    print(f"{study.size} cells: together {first:.0f} s, one by one {second:.0f} s, ratio {first / second:.2f}")


if __name__ == "__main__":
    main()
