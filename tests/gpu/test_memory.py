"""Memory that runs out on a GPU: one line that says how much there was and what to change, and nothing half-written."""

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from plprune.cli import main
from plprune.pruning import forward, gate_training
from plprune.training import objective
from tests.builders import numbers
from tests.gpu.models import save

pytestmark = pytest.mark.gpu

LIKE = (  # what torch says
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
    "free. Of the allocated memory 77 GiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated. "
    "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True."
)
SIZES = ("--seq_len=128", "--text=text.txt", "--output=out")
Limit = Callable[[int, Any, str], None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(tmp_path / "model", hidden_size=512, intermediate_size=1024)
    numbers(tmp_path / "text.txt", stop=4000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def limit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Limit]:
    """Leaves so many bytes; where the CPU stands in, a function fails as it would."""

    def few(size: int, owner: Any, name: str) -> None:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total, device)
        else:

            def fail(*_: Any, **__: Any) -> None:
                raise torch.OutOfMemoryError(LIKE)

            monkeypatch.setattr(owner, name, fail)

    yield few
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        gc.collect()
        torch.cuda.empty_cache()


def complaint(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The line in which a command says why it stopped."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(command))
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    (line,) = [each for each in printed.splitlines() if each.startswith("plprune: error: ")]
    assert re.search(r"GPU 0 has a total capacity of [\d.]+ GiB of which [\d.]+ \w+ is free", line)
    assert "PYTORCH" not in line
    return line


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.iterdir()} - {"model", "text.txt"}


@pytest.mark.parametrize("way", [(), ("--stream",)])
def test_in_calibration(here: Path, limit: Limit, capsys: Any, device: torch.device, way: tuple[str, ...]) -> None:
    limit(48 << 20, forward, "run_block")
    sizes = (*SIZES, "--num_samples=64", "--batch_size=64", f"--device={device.type}")
    line = complaint(capsys, "prune", "model", "--method=FASP", *sizes, *way)
    assert line.endswith(
        "To need less, lower --batch_size or --seq_len, give --offload cpu or --dtype bfloat16, or choose a method "
        "that needs memory for one block only: any but LearnedGates"
    )
    assert left(here) == set()


def test_in_learned_gates(here: Path, limit: Limit, capsys: Any, device: torch.device) -> None:
    limit(28 << 20, gate_training, "mean_gradients")
    sizes = (*SIZES, "--num_samples=4", "--batch_size=1", f"--device={device.type}")
    line = complaint(capsys, "prune", "model", "--method=LearnedGates", *sizes)
    assert "choose a method that needs memory for one block only: any but LearnedGates" in line
    assert left(here) == set()


def test_in_training(here: Path, limit: Limit, capsys: Any, device: torch.device) -> None:
    limit(96 << 20, objective, "weighted_loss")
    prune = {"class_path": "Prune", "init_args": {"method": {"class_path": "CFSP", "init_args": {"sparsity": 0.1}}}}
    export = {"class_path": "Export", "init_args": {"output": "out"}}
    checkpoint = {"class_path": "plprune.Checkpoint", "init_args": {"every_n_train_steps": 1}}
    trainer = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1, "max_steps": 4, "logger": False}
    trainer |= {"callbacks": [prune, checkpoint, export], "limit_val_batches": 0, "enable_progress_bar": False}
    data = {"train": "text.txt", "seq_len": 128, "batch_size": 64, "num_samples": 4, "calibration_batch_size": 1}
    config = {"trainer": trainer, "model": {"name_or_path": "model"}, "data": data}
    (here / "fit.yaml").write_text(yaml.safe_dump(config))
    line = complaint(capsys, "fit", "--config=fit.yaml")
    assert "To need less, lower data.batch_size (trainer.accumulate_grad_batches makes up for it), data.seq_len" in line
    assert "model.gradient_checkpointing true" in line
    assert not (here / "out").exists()
    assert not list(here.rglob("*.ckpt"))
    assert not [path for path in here.rglob(".*") if path.name.startswith(".")]
