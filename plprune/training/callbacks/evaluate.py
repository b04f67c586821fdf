"""The callback that measures the dense, the pruned and the recovered model."""

import contextlib
import logging
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.modules import on_device
from plprune.checkpoint import sharing
from plprune.evaluation.measurement import Measurement, as_dict, measure, measurement_table
from plprune.io import distributed
from plprune.pruning.plan import fingerprint
from plprune.pruning.surgery import plan_of
from plprune.recovery.lora import merged
from plprune.training.callbacks.lookup import datamodule_of, model_of
from plprune.training.callbacks.order import check_order
from plprune.training.strategies import shards

log = logging.getLogger(__name__)


class Evaluate(pl.Callback):
    """Measures the dense, the pruned and the recovered model on the data module's held-out windows, and prints a table.

    List it before `Prune`, so that it sees the dense model, and before `Report` and `Export`, which show its results.
    Several processes share the windows; with sharded weights the speed is not measured.

    Args:
        attribute: The attribute of the module that holds the Hugging Face model.
    """

    def __init__(self, attribute: str = "model") -> None:
        self.attribute = attribute
        self.rows: dict[str, Measurement] = {}
        self._windows: str | None = None
        self._due = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._due = stage == "fit"
        if stage != "fit":
            return
        check_order(trainer)
        model, windows = model_of(pl_module, self.attribute), self._held_out(trainer)
        self._windows = fingerprint([("ids", ids) for ids in windows], values=1 << 30)
        if plan_of(model) is None:
            sharing.receive(model, distributed.world())
            with on_device(model, trainer.strategy.root_device):
                self._measure("dense", trainer, model, sharded=False)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = model_of(pl_module, self.attribute)
        if plan_of(model) is not None and trainer.ckpt_path is None:
            self._measure("pruned", trainer, model, shards(trainer.strategy))  # the adapters change nothing yet

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure("recovered", trainer, model_of(pl_module, self.attribute), shards(trainer.strategy))
        self._show(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures if Lightning has called no `on_train_end`, because nothing was left to train."""
        if self._due and not trainer.global_step:
            self._show(trainer)
        elif self._due:
            with on_device(pl_module, trainer.strategy.root_device):
                self.on_train_end(trainer, pl_module)

    def _show(self, trainer: pl.Trainer) -> None:
        self._due = False
        if trainer.is_global_zero:
            print(f"\n{measurement_table(self.rows)}\n")

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._windows, "rows": as_dict(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = state_dict.get("rows", state_dict)
        if None not in (state_dict.get("windows"), self._windows) and state_dict["windows"] != self._windows:
            log.warning("the checkpoint's measurements are left out, because they were made on another text")
            return
        self.rows = {name: Measurement(**{"tokens_per_second": None} | row) for name, row in rows.items()}

    def _held_out(self, trainer: pl.Trainer) -> list[Tensor]:
        """The windows to evaluate on."""
        data = datamodule_of(trainer)
        if not hasattr(data, "held_out_windows"):
            raise ValueError("Evaluate has no text: train with a data module that has `held_out_windows`")
        return cast(Any, data).held_out_windows()

    def _measure(self, name: str, trainer: pl.Trainer, model: PreTrainedModel, sharded: bool) -> None:
        windows = self._held_out(trainer)
        with contextlib.nullcontext() if sharded else merged(model):
            self.rows[name] = measure(model, windows, distributed.world(), speed=not sharded)
        values = as_dict({name: self.rows[name]})[name]
        for logger in trainer.loggers:
            logger.log_metrics({f"{name}/{key}": value for key, value in values.items()}, trainer.global_step)
