"""On a GPU: what pruning takes over one bare forward pass, and tokens per second of recovery over a plain PEFT loop.

    python -m tests.benchmarks.gpu [pruning] [recovery] --output FOLDER [--blocks 4] [--windows 32] [--length 2048]

Weights are random bfloat16, in the shapes of Llama-3-8B (a few of its blocks) and of Llama-3.2-1B. Each figure is in
FOLDER/gpu.json as soon as it is there, so that a run that is cut short keeps what it has.
"""

import argparse
import copy
import functools
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from plprune import CFSP, FASP, FLAP, Calibration, LearnedGates, LoRA, PruningMethod, Recovery, TwoSSP, prune
from plprune.data import collate
from plprune.running import evaluating
from tests.builders import save_tiny

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
}
METHODS: dict[str, PruningMethod] = {
    "FLAP": FLAP(0.25),
    "CFSP": CFSP(0.25),
    "TwoSSP, first stage": TwoSSP(0.25, drop_attentions=0),
    "TwoSSP": TwoSSP(0.25),
    "FASP": FASP(0.25),
    "FASP, kv heads": FASP(0.25, attention="kv_heads"),
    "LearnedGates": LearnedGates(0.25),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM = 2  # steps that do not count


def made(shape: str, blocks: int, device: torch.device, length: int, **changes: Any) -> PreTrainedModel:
    """A random model on the device."""
    sizes = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
    sizes |= SHAPES[shape] | {"num_hidden_layers": blocks, "max_position_embeddings": length} | changes
    sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).eval()


def tokens(model: PreTrainedModel, count: int, length: int) -> torch.Tensor:  # [count, length]
    return torch.randint(5, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and the peak of memory over what was allocated before, in bytes."""
    gc.collect()
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def bare(model: PreTrainedModel, batches: list[torch.Tensor]) -> None:
    """One forward pass through the blocks, without the head."""
    with torch.no_grad(), evaluating(model):
        for ids in batches:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)


def pruning(args: argparse.Namespace, device: torch.device, note: Callable[[str, Any], None]) -> None:
    dense = made("Llama-3-8B", args.blocks, device, args.length, **args.small)
    batches = list(tokens(dense, args.windows, args.length).split(4))
    note("weights", sum(p.numel() * p.element_size() for p in dense.parameters()))
    bare(dense, batches[:1])
    passes = [timed(device, lambda: bare(dense, batches))[0] for _ in range(3)]
    once = statistics.median(passes)
    note("bare pass", {"seconds": passes})
    for name, method in METHODS.items():
        model = copy.deepcopy(dense)
        try:
            seconds, peak = timed(device, functools.partial(prune, model, method, Calibration(batches, device)))
            note(name, {"seconds": seconds, "over a bare pass": seconds / once, "peak over the model": peak})
        except (ValueError, RuntimeError) as error:
            note(name, {"error": str(error)[:500]})
        del model


class Clock(pl.Callback):
    def __init__(self, times: list[float]) -> None:
        self.times = times

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.times.append(now(trainer.strategy.root_device))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(dense: PreTrainedModel, data: TensorDataset, batch: int, device: torch.device, times: list[float]) -> None:
    """Notes when each step of `Trainer.fit` ended."""
    clock = Clock(times)
    with tempfile.TemporaryDirectory() as root:
        module = Recovery(save_tiny(Path(root) / "tiny"), dtype="bfloat16", lora=LoRA(rank=16, alpha=32))
        module.model = dense
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=1, logger=False,
            precision="bf16-mixed", enable_checkpointing=False, callbacks=[clock], enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=root,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=batch, collate_fn=collate))


def plain(dense: PreTrainedModel, data: TensorDataset, batch: int, device: torch.device, times: list[float]) -> None:
    """Likewise, of the loop that anyone would write."""
    peft: Any = get_peft_model(dense.to(device), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))  # type: ignore[arg-type]
    peft.train()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-4)
    for rows in DataLoader(data, batch_size=batch, collate_fn=collate):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = peft(**{name: value.to(device) for name, value in rows.items()}, use_cache=False).loss
        loss.backward()
        optimizer.step()
        times.append(now(device))


def recovery(args: argparse.Namespace, device: torch.device, note: Callable[[str, Any], None]) -> None:
    dense, batch = made("Llama-3.2-1B", args.layers, device, args.length, **args.small), args.batch
    ids = tokens(dense, batch * args.steps, args.length)
    size, data = sum(p.numel() for p in dense.parameters()), TensorDataset(ids, ids)
    note("parameters", size)
    for turn in range(2):
        for name, loop in {"Recovery": ours, "plain PEFT": plain}.items():
            times: list[float] = []
            try:
                work = functools.partial(loop, copy.deepcopy(dense), data, batch, device, times)
                _, peak = timed(device, work)
            except RuntimeError as error:
                note(f"{name} {turn}", {"error": str(error)[:500]})
                continue
            steps = [b - a for a, b in zip(times[WARM - 1 :], times[WARM:], strict=False)]
            rate = batch * args.length / statistics.median(steps)
            found = {"tokens per second": rate, "peak over the model": peak, "seconds of a step": steps}
            note(f"{name} {turn}", found | {"of 989 TFLOP/s, at 4 operations a parameter": 4 * size * rate / 989e12})
            del work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=["pruning", "recovery", []], default=["pruning", "recovery"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--small", type=json.loads, default={}, help="other sizes, as JSON: to try this out")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    record: dict[str, Any] = {"device": card, "torch": torch.__version__, "arguments": vars(args) | {"output": None}}
    args.output.mkdir(parents=True, exist_ok=True)
    for section in args.sections:
        own = record.setdefault(section, {})

        def note(name: str, value: Any, own: dict[str, Any] = own, section: str = section) -> None:
            own[name] = value
            print(f"{section}: {name}: {value}", flush=True)
            (args.output / "gpu.json").write_text(json.dumps(record, indent=1))

        {"pruning": pruning, "recovery": recovery}[section](args, device, note)


if __name__ == "__main__":
    main()
