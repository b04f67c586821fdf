"""The callback that saves the recovered model."""

import contextlib
import logging

import lightning.pytorch as pl

from plprune.architecture.modules import on_device
from plprune.checkpoint.load import rebuild
from plprune.checkpoint.save import save_pruned
from plprune.io.atomic import check_output, staged
from plprune.recovery.lora import merged_state
from plprune.training.callbacks.order import check_order
from plprune.training.callbacks.record import run_record
from plprune.training.callbacks.shared import model_of
from plprune.training.checkpointing import is_dry
from plprune.training.strategies import shards, whole

log = logging.getLogger(__name__)


class Export(pl.Callback):
    """Saves the recovered model, adapters merged, when training ends.

    Of several processes the first writes; where weights are in shards it gathers them one by one on the CPU. A dry run
    (`fast_dev_run`) saves to a temporary place beside it, and removes that.

    Args:
        output: Folder to write; it must not exist or be empty.
        overwrite: Whether to replace what is there.
        attribute: Name of the module's attribute that holds the Hugging Face model.
    """

    def __init__(self, output: str, overwrite: bool = False, attribute: str = "model") -> None:
        self.output, self.overwrite, self.attribute = output, overwrite, attribute
        self._due = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_order(trainer)
            check_output(self.output, self.overwrite)
            self._due = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning calls no `on_train_end` where there is nothing to train."""
        if self._due:
            with on_device(pl_module, trainer.strategy.root_device):
                self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = False
        model, state = model_of(pl_module, self.attribute), {}
        if trainer.is_global_zero or shards(trainer.strategy):
            for name, value in merged_state(model, whole):
                if trainer.is_global_zero:
                    state[name] = value
        if trainer.is_global_zero:
            tokenizer = getattr(pl_module, "tokenizer", None)
            record = run_record(trainer, pl_module)
            dry = is_dry(trainer)
            with staged(self.output, True, keep=False) if dry else contextlib.nullcontext(self.output) as output:
                save_pruned(rebuild(model, state), output, tokenizer, self.overwrite, record=record)
            log.info("%s", "a dry run: no model is kept" if dry else f"saved the recovered model to {self.output}")
        trainer.strategy.barrier()
