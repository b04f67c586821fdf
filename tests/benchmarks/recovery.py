"""Recovery's tokens per second over those of a plain PEFT training loop of uniform rank.

    python -m tests.benchmarks.recovery [--steps 12] [--rounds 2]

Both train the same pruned model on the same batches, in turn in one run; the first two steps of each do not count.
"""

import argparse
import copy
import statistics
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from plprune import CFSP, LoRA, Recovery, prune
from plprune.checkpoint import load_model
from plprune.data import collate
from tests.shared import SMOLLM2

WARM = 2


def text(steps: int) -> TensorDataset:
    ids = torch.randint(5, 49000, (4 * steps, 256), generator=torch.Generator().manual_seed(0))
    return TensorDataset(ids, ids)


class Clock(pl.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def ours(module: Recovery, data: TensorDataset) -> float:
    """Tokens per second of `Trainer.fit`."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[clock],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=4, collate_fn=collate))
    return 4 * 256 / statistics.median(clock.seconds[WARM:])


def plain(model: PreTrainedModel, data: TensorDataset, targets: list[str]) -> float:
    """Tokens per second of the loop that anyone would write."""
    peft = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))  # type: ignore[arg-type]
    peft.train()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-4)
    seconds = []
    for batch in DataLoader(data, batch_size=4, collate_fn=collate):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss: Tensor = peft(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return 4 * 256 / statistics.median(seconds[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    data = text(args.steps)
    model = load_model(SMOLLM2)
    prune(model, CFSP(0.2), [data.tensors[0][:8]])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rates: dict[str, list[float]] = {"Recovery": [], "plain PEFT": []}
    for _ in range(args.rounds):
        module = Recovery(SMOLLM2, lora=LoRA(rank=16, alpha=32))
        module.model = copy.deepcopy(model)
        rates["Recovery"].append(ours(module, data))
        rates["plain PEFT"].append(plain(copy.deepcopy(model), data, targets))
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    for name, rate in medians.items():
        print(f"{name:<12}{rate:>8.1f} tokens/s")
    print(f"ratio       {medians['Recovery'] / medians['plain PEFT']:>8.2f}")


if __name__ == "__main__":
    main()
