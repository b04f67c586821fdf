"""Callbacks that write down what each process of a run sees, or end it."""

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from plprune.pruning.surgery import plan_of
from plprune.recovery.distillation import Teacher
from plprune.training.strategies import gather


class Stopped(Exception):
    pass


class StopAfter(pl.Callback):
    """Ends a run as a crash would, after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            raise Stopped


class Probe(pl.Callback):
    """Saves losses, plan and adapters of each rank to `probe/<rank>.pt`."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"losses": []}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found["held"] = sum(_held(p) for p in pl_module.parameters())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.found["losses"].append(trainer.callback_metrics["train_loss"].item())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = pl_module.model
        trained = {name: gather(p).clone() for name, p in model.named_parameters() if p.requires_grad}
        plan = plan_of(model)
        self.found |= {"adapters": trained, "plan": plan and plan.digest, "dtypes": _dtypes(model)}
        _save(trainer, self.found, "probe")


class Memory(pl.Callback):
    """Saves by how much the memory of each rank rises while the weights are put into shards, to `memory/<rank>.pt`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        configure: Callable[[], None] = pl_module.configure_model

        def measured() -> None:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            before = _kilobytes("VmRSS")
            configure()
            _save(trainer, {"peak": 1024 * (_kilobytes("VmHWM") - before)}, "memory")

        pl_module.configure_model = measured  # type: ignore[method-assign]


class Freed(pl.Callback):
    """Saves how many numbers of a teacher each rank holds after it was freed, to `freed/<rank>.pt`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        own = Teacher.free

        def free(teacher: Teacher) -> None:
            weights = [weakref.ref(p) for p in teacher._model.parameters()] if teacher._model else []
            own(teacher)
            left = [p for each in weights if (p := each()) is not None]
            if weights:
                _save(trainer, {"before": len(weights), "held": sum(map(_held, left))}, "freed")

        Teacher.free = free  # type: ignore[method-assign]


def _save(trainer: pl.Trainer, found: dict[str, Any], name: str) -> None:
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    torch.save(found, folder / f"{trainer.global_rank}.pt")


def _held(parameter: Tensor) -> int:
    """Elements of a parameter that this process holds."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return getattr(parameter, "ds_tensor", parameter).numel()


def _dtypes(model: torch.nn.Module) -> dict[bool, set[torch.dtype]]:
    """The dtypes of what is trained, and of what is not."""
    kinds: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for parameter in model.parameters():
        kinds[parameter.requires_grad].add(parameter.dtype)
    return kinds


def _kilobytes(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])
