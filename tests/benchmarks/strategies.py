"""What a step of recovery costs under each strategy, over one under DDP.

    python -m tests.benchmarks.strategies [--steps 24] [--rounds 3] [--strategies ddp zero2 zero3 fsdp2]

Two processes on the CPU train the same random llama of 13 million parameters on the same batches, the strategies in
turn in one run. The first steps of each do not count; of the others' medians the best round does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from plprune import Recovery
from plprune.training.data import ResumableSampler, collate
from plprune.training.strategies import FSDP2, CPUDeepSpeed
from tests.builders import VOCABULARY, save_tiny

WARM = 4
STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "zero1": lambda: CPUDeepSpeed(stage=1),
    "zero2": lambda: CPUDeepSpeed(stage=2),
    "zero3": lambda: CPUDeepSpeed(stage=3),
    "fsdp2": FSDP2,
}


class Clock(pl.Callback):
    """Writes down how long a step takes, from the start of a batch to that of the next."""

    def __init__(self, file: str) -> None:
        self.file, self.starts = file, []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            seconds = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
            Path(self.file).write_text(json.dumps(statistics.median(seconds[WARM:])))


def train(name: str, model: str, file: str, steps: int) -> None:
    """One of the two processes; Lightning starts the other by the same command."""
    torch.manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (8 * steps, 128), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(ids, ids)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES[name](), max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Clock(file)],
        default_root_dir=Path(file).parent, use_distributed_sampler=False,
    )  # fmt: skip
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = ResumableSampler(data, seed=0, num_replicas=2, rank=rank)
    trainer.fit(Recovery(model), DataLoader(data, batch_size=4, sampler=sampler, collate_fn=collate))


def measured(name: str, model: str, root: str, steps: int) -> float:
    file = Path(root) / "seconds.json"
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.strategies",
        "--steps",
        str(steps),
        "--train",
        name,
        model,
        str(file),
    ]
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        name, model, file = args.train
        return train(name, model, file, args.steps)
    seconds: dict[str, list[float]] = {name: [] for name in args.strategies}
    with tempfile.TemporaryDirectory() as root:
        sizes: Any = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
        model = save_tiny(Path(root) / "model", **sizes)
        for _ in range(args.rounds):
            for name in args.strategies:
                seconds[name].append(measured(name, model, root, args.steps))
    best = {name: min(each) for name, each in seconds.items()}
    for name, second in best.items():
        rounds = " ".join(f"{each:.3f}" for each in seconds[name])
        print(f"{name:<6}{second:>8.3f} s a step, {second / best['ddp']:>5.2f} of DDP (rounds: {rounds})")


if __name__ == "__main__":
    main()
