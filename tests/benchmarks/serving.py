"""What it costs in perplexity to prune for a place to serve.

    python -m tests.benchmarks.serving [--text FILE] [--samples 16] [--seq_len 512] [--windows 16] [--results FILE]

SmolLM2-135M at 25%, by each method with and without `serve_on`. Calibration windows are drawn from the text but for its
last quarter, whose windows from its start on are evaluated. What was measured is kept in the results file, and not
measured again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plprune import CFSP, FASP, FLAP, PruningMethod, TwoSSP, perplexity
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.io.readers import PYDOC
from plprune.io.tables import markdown_table
from plprune.io.text import draw, hold_out, tokenised
from plprune.methods import Request
from tests.shared import SMOLLM2

SPARSITY, SEED = 0.25, 0
PLACES: dict[str, list[Any]] = {"anywhere": [], "llama.cpp": ["llama.cpp"], "decilm": ["decilm"]}
METHODS: dict[str, tuple[type[PruningMethod], dict[str, Any], tuple[str, ...]]] = {  # and where each can be served
    "FLAP": (FLAP, {}, ("anywhere", "llama.cpp")),
    "FLAP, `repair: none`": (FLAP, {"repair": "none"}, ("anywhere", "decilm")),
    "FASP": (FASP, {}, ("anywhere",)),
    "FASP, `attention: kv_heads`": (FASP, {"attention": "kv_heads"}, ("anywhere", "llama.cpp", "decilm")),
    "CFSP": (CFSP, {}, ("anywhere", "llama.cpp", "decilm")),
    "TwoSSP": (TwoSSP, {}, ("anywhere", "llama.cpp", "decilm")),
}


def windows(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """For calibration, and for evaluation."""
    text, held_out = hold_out(tokenised(args.text, load_tokenizer(SMOLLM2), join="\n\n"), 0.25)
    calibration = draw(text[0], args.samples, args.seq_len, SEED)
    return calibration, torch.as_tensor(held_out[0][: args.windows * args.seq_len]).view(args.windows, args.seq_len)


def measured(request: Request | None, calibration: Tensor, evaluation: Tensor) -> dict[str, float]:
    """What pruning leaves, and how long it takes with the evaluation."""
    start, model = time.perf_counter(), load_model(SMOLLM2)
    reached = request.prune(model, list(calibration.split(4)), SEED).reached if request else 0.0
    found = perplexity(model, list(evaluation.split(4)))
    return {"perplexity": found, "reached": reached, "seconds": time.perf_counter() - start}


def table(results: dict[str, dict[str, float]]) -> str:
    rows = [["perplexity (sparsity)", *PLACES]]
    for name in METHODS:
        cells = [results.get(f"{name} / {place}") for place in PLACES]
        rows.append([name, *(f"{c['perplexity']:.2f} ({c['reached']:.1%})" if c else "" for c in cells)])
    return markdown_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=PYDOC)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--results", type=Path, default=Path("serving.json"))
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    calibration, evaluation = windows(args)
    cells: list[tuple[str, Request | None]] = [("dense", None)]
    for name, (method, settings, places) in METHODS.items():
        cells += [(f"{name} / {p}", Request(method(SPARSITY, **settings), serve_on=PLACES[p])) for p in places]
    for name, request in cells:
        if name not in results:
            results[name] = measured(request, calibration, evaluation)
            args.results.write_text(json.dumps(results, indent=1))
            print(f"{name}: {results[name]}", flush=True)
    print(f"calibration {calibration.numel()} tokens, seed {SEED}; evaluation {evaluation.numel()} tokens; {args.text}")
    print(f"dense {results['dense']['perplexity']:.2f}\n\n{table(results)}")


if __name__ == "__main__":
    main()
