"""Recovery's tokens per second over those of a plain PEFT training loop, and whether both lose the same.

    python -m tests.benchmarks.recovery [--steps 12] [--batch 2] [--length 512] [--blocks 8] [--real] [--sparsity 0.2]
        [--rank 16] [--compile]

Both train the same model from the same adapters on the same batches, step by step in turn in one process, so that what
else a shared machine does meets both alike. Medians, over all steps but the first two, of the time that went by and of
the time that processors worked, which tells more where the machine is never quiet. The model is random, as wide as
SmolLM2-135M and with as large a vocabulary, or, by --real, SmolLM2-135M itself, pruned.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from plprune import CFSP, LoRA, Recovery, prune
from plprune.checkpoint.load import load_model
from plprune.training.data import collate
from plprune.training.optimisation import warmup_cosine
from tests.benchmarks.gpu.models import TARGETS, WARM, made
from tests.builders import save_tiny
from tests.shared import SMOLLM2

ALPHA = 32
CLOSE = 1e-5  # of two losses in float32


class Plain:
    """The loop that anyone would write."""

    def __init__(self, model: PreTrainedModel, rank: int, steps: int) -> None:
        config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=TARGETS)
        self.model = get_peft_model(model, config).train()  # type: ignore[arg-type]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        self.schedule = LambdaLR(self.optimizer, lambda step: warmup_cosine(step, steps, 0.05))

    def step(self, batch: dict[str, Tensor]) -> float:
        self.optimizer.zero_grad()
        loss: Tensor = self.model(**batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


class Turns(pl.Callback):
    """Has the plain loop take each step after Recovery has, on the same batch.

    Args:
        plain: The loop.
    """

    def __init__(self, plain: Plain) -> None:
        self.plain = plain
        self.seconds: dict[str, list[float]] = {"Recovery": [], "plain PEFT": []}
        self.losses: dict[str, list[float]] = {"Recovery": [], "plain PEFT": []}
        self.worked: dict[str, list[float]] = {"Recovery": [], "plain PEFT": []}
        self._since = 0.0, 0.0

    def on_train_start(self, *_: Any) -> None:
        self._since = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *_: Any):
        self._note("Recovery", trainer.callback_metrics["train_loss"].item())
        self._note("plain PEFT", self.plain.step(batch))

    def _note(self, name: str, loss: float) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds[name].append(now[0] - self._since[0])
        self.worked[name].append(now[1] - self._since[1])
        self.losses[name].append(loss)
        self._since = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--sparsity", type=float, default=0.2, help="of the real model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="what Recovery trains; the plain loop is not compiled")
    args = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(5, 49000, (args.batch * args.steps, args.length))
    cpu = torch.device("cpu")
    model = load_model(SMOLLM2) if args.real else made("SmolLM2-135M", args.blocks, cpu, args.length).float()
    if args.real:
        prune(model, CFSP(args.sparsity), [ids[:2, :256]])
    with tempfile.TemporaryDirectory() as root:
        lora = LoRA(rank=args.rank, alpha=ALPHA, by="uniform")
        name = SMOLLM2 if args.real else save_tiny(Path(root) / "tiny")
        module = Recovery(name, lora=lora, compile=args.compile)
        module.model = copy.deepcopy(model)
        torch.manual_seed(0)  # both draw the same adapters
        turns = Turns(Plain(model, args.rank, args.steps))
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[turns],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer.fit(module, DataLoader(TensorDataset(ids, ids), batch_size=args.batch, collate_fn=collate))
    for name, losses in turns.losses.items():
        rate = args.batch * args.length / statistics.median(turns.seconds[name][WARM:])
        print(f"{name:<12}{rate:>8.1f} tokens/s, last loss {losses[-1]:.7f}")
    for what, found in (("time", turns.seconds), ("processor time", turns.worked)):
        ours, theirs = (statistics.median(seconds[WARM:]) for seconds in found.values())
        print(f"Recovery over plain PEFT, by {what}: {theirs / ours:.2f} ({ours:.3f} s and {theirs:.3f} s a step)")
    apart = max(abs(a / b - 1) for a, b in zip(*turns.losses.values(), strict=True))
    print(f"losses at most {apart:.0e} apart")
    if apart > CLOSE:
        raise SystemExit(f"the losses are more than {CLOSE:.0e} apart")


if __name__ == "__main__":
    main()
