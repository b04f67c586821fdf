"""LearnedGates by its settings: the processor's seconds, and perplexity beside that of CFSP on the same windows.

    python -m tests.benchmarks.gates --output FILE --calibration TEXT --text TEXT [TEXT ...] [--model NAME]
        [--sparsities 0.25 0.5] [--windows 64] [--length 512] [--seeds 0] [--settings '{"gate_share": 0.25}' ...]

One model at a time is pruned, in float32, by CFSP and by LearnedGates with each of the settings. Seconds are those that
processors worked, from the dense model to the pruned one, so they say the same on a machine with other work.
Calibration windows and perplexity are those of `plprune compare` with `join: "\\n\\n"`. Each result is a line of the
output; a run that goes on repeats none.
"""

import argparse
import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from plprune import CFSP, LearnedGates, PruningMethod, prune
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.evaluation.perplexity import Protocol, judge, passage
from plprune.io.text import draw, tokenised
from tests.shared import SMOLLM2

JOIN = "\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--windows", type=int, nargs="+", default=[64])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", default=["{}"])
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--max_windows", type=int, default=8)
    args = parser.parse_args()
    dense, tokenizer = load_model(args.model, "float32"), load_tokenizer(args.model)
    protocol = Protocol(args.seq_len, max_windows=args.max_windows)
    passages = [passage(text, tokenizer, protocol, JOIN) for text in args.text]
    ids, _ = tokenised(args.calibration, tokenizer, JOIN)
    methods: list[dict[str, Any]] = [{"method": "CFSP"}]
    methods += [{"method": "LearnedGates"} | json.loads(settings) for settings in args.settings]
    every = itertools.product(args.seeds, args.windows, args.sparsities, methods)
    for seed, windows, sparsity, method in every:
        key = {"seed": seed, "windows": windows, "length": args.length, "sparsity": sparsity} | method
        done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
        if not (found := [each for each in done if each["key"] == key]):
            text = list(draw(ids, windows, args.length, seed).split(8))
            model, start = copy.deepcopy(dense), time.process_time()
            plan = prune(model, named(sparsity, **method), text, seed=seed)
            result = {"key": key, "seconds": round(time.process_time() - start, 1), "reached": plan.reached}
            result["perplexity"] = [round(judge(model, each).perplexity, 2) for each in passages]
            result["heads"] = sum(len(keep) for name, keep in plan.keep.items() if name.endswith("attention"))
            result["threads"] = torch.get_num_threads()
            with args.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            found = [result]
        print(json.dumps(found[0]), flush=True)


def named(sparsity: float, method: str, **settings: Any) -> PruningMethod:
    return {"CFSP": CFSP, "LearnedGates": LearnedGates}[method](sparsity=sparsity, **settings)


if __name__ == "__main__":
    main()
