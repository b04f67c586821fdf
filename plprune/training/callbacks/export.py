"""The callback that saves the recovered model."""

import contextlib
import logging
from typing import Any, cast

import lightning.pytorch as pl

from plprune.architecture.modules import on_device
from plprune.checkpoint.load import rebuild
from plprune.checkpoint.save import save_pruned
from plprune.io.atomic import check_output, staged
from plprune.recovery.lora import merged_state
from plprune.training.callbacks.evaluate import Evaluate
from plprune.training.callbacks.lookup import datamodule_of, model_of
from plprune.training.callbacks.order import check_order
from plprune.training.checkpointing import is_dry
from plprune.training.module import Recovery
from plprune.training.recipes import recovery_kind
from plprune.training.strategies import gather, shards

log = logging.getLogger(__name__)


class Export(pl.Callback):
    """Saves the recovered model with merged adapters when training ends.

    The first of several processes writes; sharded weights are gathered one by one on the CPU. A dry run
    (`fast_dev_run`) saves to a temporary folder beside the output, and removes it.

    Args:
        output: The folder to write; it must be empty or not exist.
        overwrite: Whether to replace an existing folder.
        attribute: The attribute of the module that holds the Hugging Face model.
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
        """Saves if Lightning has called no `on_train_end`, because there was nothing to train."""
        if self._due:
            with on_device(pl_module, trainer.strategy.root_device):
                self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = False
        model, state = model_of(pl_module, self.attribute), {}
        if trainer.is_global_zero or shards(trainer.strategy):
            for name, value in merged_state(model, gather):
                if trainer.is_global_zero:
                    state[name] = value
        if trainer.is_global_zero:
            tokenizer = getattr(pl_module, "tokenizer", None)
            record = card_facts(trainer, pl_module)
            dry = is_dry(trainer)
            with staged(self.output, True, keep=False) if dry else contextlib.nullcontext(self.output) as output:
                save_pruned(rebuild(model, state), output, tokenizer, self.overwrite, record=record)
            log.info("%s", "a dry run: no model is kept" if dry else f"saved the recovered model to {self.output}")
        trainer.strategy.barrier()


def card_facts(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Collects the facts of a run for its model card: perplexities, texts and training settings."""
    data, callbacks = datamodule_of(trainer), cast(Any, trainer).callbacks
    rows = [row for each in callbacks if isinstance(each, Evaluate) for row in each.rows.items()]
    training = {
        "trained": recovery_kind(module.trains, bool(module.distill)) if isinstance(module, Recovery) else None,
        "steps": trainer.global_step,
        "learning rate": getattr(module, "learning_rate", None),
        "windows a step": getattr(data, "batch_size", None),
        "tokens a window": getattr(data, "seq_len", None),
    }
    return {
        "perplexity": {name: row.perplexity for name, row in rows},
        "text": {part: source for part, source in getattr(data, "sources", {}).items() if source},
        "training": {name: value for name, value in training.items() if value is not None},
    }
