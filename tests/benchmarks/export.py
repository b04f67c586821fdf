"""A real model pruned by each method and recovered, exported and checked; what writing costs in time and memory.

    python -m tests.benchmarks.export [--methods FLAP FASP CFSP TwoSSP] [--steps 20] [--work runs/export]

What is there of an earlier run is not made again. Times are of two writings in turn in one process: the format's, and
one of the same weights by safetensors alone, both flushed to the disk. The memory is the model, and the peak beyond it,
over the model.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor

from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.checkpoint.save import save_pruned
from plprune.cli import main as plprune
from plprune.export import gguf
from plprune.io.atomic import flush
from tests.benchmarks.pruning import resident

EXTRA = {"FASP": ["--trainer.callbacks.method.attention", "kv_heads"]}


def recovered(method: str, steps: int, work: Path) -> Path:
    """The folder of SmolLM2 without a quarter of its blocks' parameters, trained for some steps."""
    folder = work / method
    if not folder.exists():
        fit = ["fit", "--config", "configs/quickstart.yaml", "--trainer.callbacks.method", method]
        fit += ["--trainer.callbacks.method.sparsity", "0.25", *EXTRA.get(method, [])]
        fit += ["--trainer.max_steps", str(steps), "--data.max_windows", "8", "--trainer.logger", "false"]
        fit += ["--trainer.default_root_dir", str(work / f"{method}-run"), "--trainer.accelerator", "cpu"]
        plprune(fit)
        Path("runs/quickstart/model").rename(folder)
    return folder


def costs(folder: Path) -> dict[str, tuple[float, float]]:
    """For each format: seconds over those of safetensors alone, and peak memory over the model's."""
    model, tokenizer, found = load_model(str(folder)), load_tokenizer(str(folder)), {}
    state = {name: p.detach() for name, p in model.named_parameters()}
    weights = sum(p.numel() * p.element_size() for p in state.values()) / 2**20
    with TemporaryDirectory(dir=folder.parent) as room:
        writers: dict[str, Callable[[Path], None]] = {
            "hf": lambda path: save_pruned(model, path, tokenizer),
            "gguf": lambda path: gguf.write(model, tokenizer, path, "f32"),
        }
        for name, write in writers.items():
            write(Path(room, f"first-{name}"))  # what is imported once does not count
            plain = seconds(lambda name=name: plainly(state, Path(room, f"plain-{name}.safetensors")))
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
            before = resident("VmHWM")
            took = seconds(lambda write=write, name=name: write(Path(room, name)))
            found[name] = took / plain, (weights + resident("VmHWM") - before) / weights
    return found


def plainly(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)
    flush(path)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["FLAP", "FASP", "CFSP", "TwoSSP"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/export"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for method in args.methods:
        folder = recovered(method, args.steps, args.work)
        out = args.work / f"{method}-exported"
        if not out.exists():
            plprune(["export", str(folder), "--output", str(out)])
        rows = json.loads((out / "parity.json").read_text())["rows"]
        print(method, *(f"{row['format']}: {row['difference']} {row['same_text']}" for row in rows if row["file"]))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for name, (times, memory) in pool.apply(costs, (folder,)).items():
                print(f"  writing {name}: {times:.2f} of safetensors' time, {memory:.2f} of the model's memory")


if __name__ == "__main__":
    main()
