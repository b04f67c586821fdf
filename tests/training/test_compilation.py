"""Training through compiled blocks loses what training without loses, and leaves nothing behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.data import DataLoader, TensorDataset

from plprune import CFSP, Distillation, LoRA, Prune, Recovery
from plprune.architecture.blocks import blocks_of
from plprune.training import objective
from plprune.training.compilation import compiled_blocks
from plprune.training.data import collate
from tests.builders import logits, save_tiny, tiny, windows

BLOCKS, STEPS = 3, 3
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "consumers": {"train": "consumers"},
    "consumers of bfloat16": {"train": "consumers", "dtype": "bfloat16", "precision": "bf16-true"},
    "all, in bf16-mixed": {"train": "all", "dtype": "bfloat16", "precision": "bf16-mixed"},
    "distillation": {"distill": Distillation("both")},
    "bf16-mixed": {"precision": "bf16-mixed", "dtype": "bfloat16"},
    "gradient checkpointing in bf16-mixed": {"gradient_checkpointing": True, "precision": "bf16-mixed"},
}


class Losses(pl.Callback):
    """What each step lost; between steps no forward is replaced."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.found.append(trainer.callback_metrics["train_loss"].item())
        assert not any("forward" in vars(block.module) for block in blocks_of(pl_module.model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The graphs that were compiled, by a backend that costs nothing."""
    found: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(objective, "compiled_blocks", lambda model: compiled_blocks(model, backend))
    yield found
    torch._dynamo.reset()


def fit(folder: str, root: Path, precision: Any = "32-true", count: int = 5, **settings: Any) -> Any:
    pl.seed_everything(0)
    losses, ids = Losses(), windows(count, 16)
    asked: dict[str, Any] = {"lora": LoRA(rank=4)} | settings
    module = Recovery(folder, learning_rate=5e-3, **asked)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        default_root_dir=root,
        precision=precision,
        callbacks=[losses, Prune(CFSP(0.3), calibration=[windows(4, 16)])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(ids, ids), batch_size=2, collate_fn=collate))
    return module, losses.found


def check_same(folder: str, root: Path, rel: float, **settings: Any) -> None:
    module, expected = fit(folder, root, **settings)
    compiled, found = fit(folder, root, compile=True, **settings)
    assert found == pytest.approx(expected, rel=rel)
    assert compiled.state_dict().keys() == module.state_dict().keys()


def test_blocks_of_unlike_widths_share_graphs(folder: str, tmp_path: Path, graphs: list[object]) -> None:
    """One for the first block, whose input needs no gradient, and one for all others."""
    check_same(folder, tmp_path, 1e-6, count=6, lora=LoRA(rank=4, targets=["down_proj"]))
    assert len(graphs) == 2


def test_a_backend_that_fails_is_named_in_one_line() -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    model = tiny(num_hidden_layers=1)
    with (
        pytest.raises(
            ValueError, match=r"^the blocks cannot be compiled \(.*no compiler.*\): leave out model\.compile$"
        ),
        compiled_blocks(model, fails)(),
    ):
        logits(model)
    assert "forward" not in vars(blocks_of(model)[0].module)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train(folder: str, tmp_path: Path, graphs: list[object], way: str) -> None:
    """Also with a last batch that is shorter."""
    check_same(folder, tmp_path, 1e-3 if "bf" in way else 1e-6, **WAYS[way])
    assert 0 < len(graphs) <= 6


@pytest.mark.slow
def test_inductor(folder: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    check_same(folder, tmp_path, 1e-6)
