"""Tokens per second of `Recovery` over those of a plain loop with PEFT, in turn; seconds are of a step."""

import argparse
import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from plprune import LoRA, Recovery
from plprune.planning.hardware import GPUS
from plprune.planning.sizes import structure
from plprune.training.data import collate
from tests.benchmarks.gpu.models import TARGETS, WARM, Cells, called, depth, made, now, sheet, timed, tokens
from tests.builders import save_tiny

BATCHES = {"Llama-3.2-1B": 4, "Llama-3-8B": 2}
TURNS = 2
RANK = 16


class Clock(pl.Callback):
    def __init__(self, times: list[float]) -> None:
        self.times = times

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.times.append(now(trainer.strategy.root_device))


def ours(dense: PreTrainedModel, data: TensorDataset, batch: int, device: torch.device, times: list[float]) -> None:
    """Notes when each step of `Trainer.fit` ended."""
    clock = Clock(times)
    with tempfile.TemporaryDirectory() as root:
        module = Recovery(save_tiny(Path(root) / "tiny"), dtype="bfloat16", lora=LoRA(rank=RANK, alpha=2 * RANK))
        module.model = dense
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=1, logger=False,
            precision="bf16-mixed", enable_checkpointing=False, callbacks=[clock], enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=root,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=batch, collate_fn=collate))


def plain(dense: PreTrainedModel, data: TensorDataset, batch: int, device: torch.device, times: list[float]) -> None:
    """Likewise, of the loop that anyone would write."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    peft: Any = get_peft_model(dense, config)  # type: ignore[arg-type]
    peft.train()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-4)
    for rows in DataLoader(data, batch_size=batch, collate_fn=collate):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = peft(**{name: value.to(device) for name, value in rows.items()}, use_cache=False).loss
        loss.backward()
        optimizer.step()
        times.append(now(device))


LOOPS = {"Recovery": ours, "plain PEFT": plain}


def recovery(args: argparse.Namespace, device: torch.device, record: dict[str, Any]) -> Cells:
    own = record["recovery"]["cells"]

    def trained(shape: str, name: str) -> dict[str, Any]:
        batch, times = BATCHES[shape], []
        dense = made(shape, depth(shape), device, args.length, **args.small)
        ids = tokens(dense, batch * args.steps, args.length)
        work = 2 * structure(dense, args.length).reading_flops  # of a token: weights get no gradients
        _, peak = timed(device, lambda: LOOPS[name](dense, TensorDataset(ids, ids), batch, device, times))
        step = statistics.median(b - a for a, b in zip(times[WARM - 1 :], times[WARM:], strict=False))
        rate, card = batch * args.length / step, sheet(called(device))
        found = {"seconds": step, "tokens/s": rate, "peak over the model, GB": peak}
        return found | ({"utilisation": rate * work / GPUS[card].half} if card else {})

    def over(shape: str) -> dict[str, Any]:
        cells = [[own[f"{shape}: {name} {turn}"] for turn in range(1, TURNS + 1)] for name in LOOPS]
        if any("tokens/s" not in cell for each in cells for cell in each):
            raise ValueError("both have to be measured first")
        rates = [statistics.mean(cell["tokens/s"] for cell in each) for each in cells]
        peaks = [max(cell["peak over the model, GB"] for cell in each) for each in cells]
        return {"tokens/s, ratio": rates[0] / rates[1], "peak, ratio": peaks[0] / peaks[1] if peaks[1] else None}

    cells: Cells = {}
    for shape in BATCHES:
        for turn in range(1, TURNS + 1):
            for name in LOOPS:
                cells[f"{shape}: {name} {turn}"] = functools.partial(trained, shape, name)
        cells[f"{shape}: Recovery over plain PEFT"] = functools.partial(over, shape)
    return cells
