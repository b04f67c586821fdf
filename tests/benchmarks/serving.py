"""What it costs in perplexity to prune for a place to serve, and how fast pruned models are served.

    python -m tests.benchmarks.serving [--text FILE] [--samples 16] [--seq_len 512] [--windows 16] [--results FILE]
    python -m tests.benchmarks.serving --speed [--vllm ENVIRONMENT/bin/python] [--threads 1 2] [--repeats 5]
        [--settings '{"enforce_eager": true}'] [--name vLLM] [--work runs/served]

SmolLM2-135M at 25%, by each method with and without `serve_on`. Calibration windows are drawn from the text but for its
last quarter, whose windows from its start on are evaluated. What was measured is kept in the results file, and not
measured again.

With `--speed`: the time in which llama.cpp (q8_0) and vLLM (float32) read prompts and write, for SmolLM2-135M, dense
and pruned. Each model runs in a process of its own; they take turns, so that what else the machine does meets all
alike. Runs by other `--settings` of vLLM need a `--name` of their own. The seconds are kept in `speed.json` beside this
file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plprune import CFSP, FASP, FLAP, PruningMethod, TwoSSP, perplexity
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.cli import main as plprune
from plprune.io.readers import PYDOC
from plprune.io.tables import markdown_table
from plprune.io.text import draw, hold_out, tokenised
from plprune.methods import Request
from tests.benchmarks import served
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

SPEED = Path(__file__).with_name("speed.json")
DENSE, BACKEND = "dense", "dense, Transformers backend"  # by which vLLM runs the pruned ones
PRUNED = ("CFSP 25%", "CFSP 50%", "TwoSSP 25%", "TwoSSP 50%")
BATCHES, READ, WRITTEN = (1, served.BATCH), 64, 16  # sequences at once, and tokens of each


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


def folder_of(model: str, program: str, work: Path) -> Path:
    """The folder of a model for vLLM, or its file for llama.cpp."""
    method, _, share = model.rstrip("%").partition(" ")
    folder, out, pruned = work / f"{method}{share}", work / f"{method}{share}-exported", model in PRUNED
    if pruned and not folder.exists():
        sparsity = str(int(share) / 100)
        prune = ["prune", SMOLLM2, "--method", method, "--method.sparsity", sparsity, "--serve_on", "[llama.cpp]"]
        plprune([*prune, "--num_samples", "16", "--seq_len", "128", "--output", str(folder)])
    if not out.exists():
        source, to = (str(folder), "gguf") if pruned else (SMOLLM2, "hf,gguf")
        plprune(["export", source, "--to", to, "--gguf", "q8_0", "--output", str(out)])
    if program == "llama.cpp":
        return next(out.glob("*.gguf"))
    return folder if pruned else out / "hf"


class Served:
    """A model in a program of its own, which answers as `served.py` does."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log.open("w"), text=True)

    def told(self, start: str) -> str:
        """The rest of the next line that starts so."""
        for line in self.process.stdout or []:
            if line.startswith(start):
                return line.removeprefix(start)
        raise SystemExit(f"{self.process.args} ended: see {self.log}")

    def times(self, batch: int, generator: torch.Generator) -> dict[str, float]:
        """Seconds to read prompts that it has not read yet, and to write."""
        prompts = torch.randint(1000, 40000, (batch, READ), generator=generator).tolist()
        assert self.process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": WRITTEN}), file=self.process.stdin, flush=True)
        return json.loads(self.told("TIMES "))


def in_turns(program: str, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every model in a program, by batch and what it does, of every turn."""
    models = [DENSE, *(name for name in args.models if name != BACKEND or program != "llama.cpp")]
    python = sys.executable if program == "llama.cpp" else args.vllm
    running: dict[str, Served] = {}
    try:
        for name in models:
            path = folder_of(DENSE if name == BACKEND else name, program, args.work)
            settings = args.settings | ({"model_impl": "transformers"} if name == BACKEND else {})
            command = [python, "-I", served.__file__, program, str(path), str(threads), json.dumps(settings)]
            running[name] = Served(command, args.work / f"{program}-{name}.log")
        for each in running.values():
            each.told("READY")
        found = {name: {batch: {"reading": [], "writing": []} for batch in BATCHES} for name in models}
        generator = torch.Generator().manual_seed(SEED)
        for turn in range(args.repeats + 1):  # the first one warms up
            for batch in BATCHES:
                for name in models if turn % 2 else models[::-1]:
                    for what, seconds in running[name].times(batch, generator).items():
                        found[name][batch][what] += [round(seconds, 4)] if turn else []
        return found
    finally:
        for each in running.values():
            each.process.kill()
            each.process.wait()


def speed_table(results: dict[str, Any]) -> str:
    """Tokens per second of the dense model, and how many times as many the others do in the same turn: medians."""
    rows = [["program, threads, batch", "", "dense, tokens/s", BACKEND, *PRUNED]]
    for run, found in results.items():
        for batch in BATCHES:
            for what, tokens in (("reading", READ), ("writing", WRITTEN)):
                dense = found[DENSE][str(batch)][what]
                cells = [f"{statistics.median(tokens * batch / each for each in dense):.0f}"]
                for name in (BACKEND, *PRUNED):
                    seconds = found.get(name, {}).get(str(batch), {what: []})[what]
                    ratios = [a / b for a, b in zip(dense, seconds, strict=False)]
                    cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
                rows.append([f"{run}, {batch}", what, *cells])
    return markdown_table(rows)


def speed(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(SPEED.read_text()) if SPEED.exists() else {}
    program = "vLLM" if args.vllm else "llama.cpp"
    for threads in args.threads:
        results[f"{args.name or program}, {threads}"] = in_turns(program, threads, args)
        SPEED.write_text(json.dumps(results, indent=1) + "\n")
        results = json.loads(SPEED.read_text())  # batches are strings there
    print(speed_table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=PYDOC)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--results", type=Path, default=Path("serving.json"))
    parser.add_argument("--speed", action="store_true", help="measure speed, in the place of perplexity")
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--models", nargs="*", default=[BACKEND, *PRUNED], help="besides the dense one")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settings", type=json.loads, default={}, help="settings of vllm.LLM, as JSON")
    parser.add_argument("--name", help="the name of the program with these settings in the table")
    parser.add_argument("--work", type=Path, default=Path("runs/served"))
    args = parser.parse_args()
    if args.speed:
        speed(args)
        return
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
