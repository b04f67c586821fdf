"""Fewer units or fewer bits: size and perplexity of a dense and of pruned models, quantised by llama.cpp.

    python -m tests.benchmarks.quantised [--train FILE] [--text FILE] [--steps 20] [--work runs/quantised]

SmolLM2-135M, dense and without a quarter of its blocks' parameters, as pruned and after some steps of LoRA, in GGUF
files of every type. llama.cpp computes the perplexity on the first windows of the text. What is there of an earlier run
is not made again. The results are kept in `quantised.json` beside this file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from plprune.cli import main as plprune
from plprune.io.readers import PYDOC
from plprune.io.tables import markdown_table
from tests.shared import SMOLLM2

SPARSITY, TYPES = "0.25", ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
RESULTS = Path(__file__).with_name("quantised.json")
MODELS = {  # and how each is made
    "dense": ("", False),
    "CFSP": ("CFSP", False),
    "CFSP, recovered": ("CFSP", True),
}


def made(name: str, args: argparse.Namespace) -> str:
    """The folder of a model, or the name of the dense one."""
    method, recovered = MODELS[name]
    folder = args.work / name.replace(", ", "-")
    if not method:
        return SMOLLM2
    if folder.exists():
        return str(folder)
    data = ["--num_samples", "32", "--seq_len", "256"]
    if not recovered:
        prune = ["prune", SMOLLM2, "--method", method, "--method.sparsity", SPARSITY, "--text", args.train, *data]
        plprune([*prune, "--output", str(folder)])
        return str(folder)
    fit = ["fit", "--config", "configs/quickstart.yaml", "--trainer.callbacks.method", method]
    fit += ["--trainer.callbacks.method.sparsity", SPARSITY, "--data.train", args.train, "--data.max_windows", "8"]
    fit += ["--trainer.max_steps", str(args.steps), "--trainer.logger", "false"]
    fit += ["--trainer.default_root_dir", f"{folder}-run", "--trainer.accelerator", "cpu"]
    plprune(fit)
    Path("runs/quickstart/model").rename(folder)
    return str(folder)


def exported(name: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Bytes and perplexity of a model by type."""
    out = args.work / f"{name.replace(', ', '-')}-exported"
    if not out.exists():
        export = ["export", made(name, args), "--to", "gguf", "--gguf", TYPES[0], "--quantize", ",".join(TYPES[1:])]
        export += ["--text", args.text, "--seq_len", "256", "--max_windows", str(args.windows), "--output", str(out)]
        plprune([*export, *args.options])
    told = json.loads((out / "parity.json").read_text())
    own = told["reference"]["perplexity"]
    rows = {row["format"].split()[1]: row for row in told["rows"]}
    return {kind: {"bytes": row["bytes"], "perplexity": own * row["perplexity_ratio"]} for kind, row in rows.items()}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = [["perplexity, MB", *TYPES]]
    for name, found in results.items():
        cells = (found[kind] for kind in TYPES)
        rows.append([name, *(f"{cell['perplexity']:.2f}, {cell['bytes'] / 1e6:.1f}" for cell in cells)])
    return markdown_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=PYDOC)
    parser.add_argument("--text", default=PYDOC)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--options", nargs="*", default=[], help="of plprune export")
    parser.add_argument("--work", type=Path, default=Path("runs/quantised"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = {name: exported(name, args) for name in args.models}
    args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
