"""Recovery on a GPU: every precision and way to train, against the CPU; stopped runs; merged adapters."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from plprune import FLAP, Checkpoint, Distillation, Export, LoRA, Prune, Recovery, RecoveryData, load_pruned, perplexity
from plprune.recovery.lora import merged, merged_state
from plprune.training.checkpoint_files import checkpoints
from plprune.training.strategies import gather
from tests.builders import numbers
from tests.gpu.models import JUDGED, save
from tests.probes import StopAfter, Stopped

pytestmark = pytest.mark.gpu

STEPS = 8
PRECISIONS = [("32-true", "float32"), ("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16")]
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "distillation": {"distill": Distillation("both")},
    "dora": {"lora": LoRA(dora=True)},
    "consumers": {"train": "consumers"},
    "all": {"train": "all"},
    "compiled": {"compile": True},
}


class Losses(pl.Callback):
    """What each step lost, and where and in which dtype what was trained was."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.places: set[tuple[str, torch.dtype]] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.found.append(trainer.callback_metrics["train_loss"].item())
        self.places |= {(p.device.type, p.dtype) for p in pl_module.parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save(folder / "model")
    numbers(folder / "text.txt", stop=1200)
    return folder


@pytest.fixture(scope="module")
def on_the_cpu(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """The losses of a way to train on the CPU, in float32."""

    @functools.cache
    def losses(way: str) -> list[float]:
        settings = WAYS[way] | {"compile": False}  # the same losses, without minutes of compiling
        return fit(source, tmp_path_factory.mktemp("cpu"), torch.device("cpu"), **settings)[1].found

    return losses


def fit(
    source: Path, root: Path, device: torch.device, *callbacks: pl.Callback, precision: Any = "32-true", **settings: Any
) -> tuple[Recovery, Losses]:
    """A fit of a few steps; `ckpt_path` goes on with a checkpoint."""
    pl.seed_everything(0)
    losses, ckpt_path = Losses(), settings.pop("ckpt_path", None)
    settings = {"learning_rate": 1e-3 if settings.get("train") == "all" else 5e-3} | settings
    module = Recovery(str(source / "model"), **settings)
    data = RecoveryData(str(source / "text.txt"), seq_len=64, batch_size=4, num_samples=8)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,
        max_steps=STEPS,
        default_root_dir=root,
        callbacks=[losses, Prune(FLAP(0.3)), *callbacks],
        deterministic=True,
        logger=False,
        enable_checkpointing=any(isinstance(each, Checkpoint) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, losses


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS)
def test_every_way_to_train(
    source: Path,
    tmp_path: Path,
    device: torch.device,
    on_the_cpu: Callable[[str], list[float]],
    precision: str,
    dtype: Any,
    way: str,
) -> None:
    """What is trained is float32 and there, the loss falls as on the CPU, and the model that is saved is what it is."""
    export = Export(str(tmp_path / "out"))
    module, losses = fit(source, tmp_path, device, export, precision=precision, dtype=dtype, **WAYS[way])
    assert losses.places == {(device.type, torch.float32)}
    assert len(losses.found) == STEPS
    assert losses.found[-1] < losses.found[0]
    assert losses.found == pytest.approx(on_the_cpu(way), rel=1e-3 if dtype == "float32" else 0.05)
    saved = load_pruned(tmp_path / "out")
    assert saved.dtype == getattr(torch, dtype)
    with merged(module.to(device).model):
        here = perplexity(module.model, JUDGED)
    assert perplexity(saved.to(device), JUDGED) == pytest.approx(here, rel=1e-4 if dtype == "float32" else 0.02)  # type: ignore[arg-type]


@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS)
@pytest.mark.parametrize("way", ["lora", "consumers", "all", "distillation"])
def test_a_stopped_run_goes_on_bit_for_bit(
    source: Path, tmp_path: Path, device: torch.device, precision: str, dtype: Any, way: str
) -> None:
    """With dropout, which draws on the GPU."""
    settings = {"precision": precision, "dtype": dtype, "lora": LoRA(rank=4, dropout=0.3)} | WAYS[way]
    module, expected = fit(source, tmp_path / "whole", device, **settings)
    stop = [Checkpoint(every_n_train_steps=3), StopAfter(5)]
    with pytest.raises(Stopped):
        fit(source, tmp_path / "run", device, *stop, **settings)
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")
    torch.rand(7, device=device)  # what else has drawn there counts for nothing
    again, found = fit(source, tmp_path / "run", device, ckpt_path=str(path), **settings)
    assert found.found == expected.found[3:]
    states = [{n: p for n, p in each.named_parameters() if p.requires_grad} for each in (module, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name].cpu(), states[1][name].cpu()) for name in states[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_merged_there_are_those_merged_on_the_cpu(
    source: Path, tmp_path: Path, device: torch.device, dtype: Any, dora: bool
) -> None:
    module, _ = fit(source, tmp_path, device, precision="bf16-mixed", dtype=dtype, lora=LoRA(rank=8, dora=dora))
    model = module.to(device).model
    here = {name: value.to(device) for name, value in merged_state(model, gather)}  # on the CPU
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with merged(model):
        there = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert there.keys() == here.keys()
    for name, value in there.items():
        assert value.dtype == here[name].dtype
        last = 2.0**-20 if dtype == "float32" else 2.0**-7  # of a value's bits, which rounding may change
        torch.testing.assert_close(value, here[name], rtol=last, atol=last * float(value.abs().max()) / 8)
        assert (value != here[name]).float().mean() < (1 if dtype == "float32" else 0.01)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
