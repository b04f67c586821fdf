"""The callback that prunes the model at the beginning of a fit.

It prunes in `setup`, while the model is whole and on the CPU, and before an optimizer or wrapper has seen it. In
`on_fit_start` it would be too late: nothing would train, without an error.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture import modules
from plprune.checkpoint import sharing
from plprune.checkpoint.load import load_stage
from plprune.checkpoint.save import save_stage
from plprune.io import distributed
from plprune.io.atomic import check_output, resolve_path
from plprune.methods.base import PruningMethod
from plprune.methods.run import Request, equalise
from plprune.planning.serving import Runtime
from plprune.planning.targets import Target
from plprune.pruning import surgery
from plprune.pruning.calibration import Calibration
from plprune.pruning.plan import FILE, PruningPlan, fingerprint
from plprune.pruning.plan_summary import plan_summary
from plprune.pruning.surgery import plan_of
from plprune.training.callbacks.lookup import datamodule_of, model_of
from plprune.training.callbacks.order import check_order
from plprune.training.strategies import shards

log = logging.getLogger(__name__)


class Prune(pl.Callback):
    """Prunes the model of a LightningModule before training, once.

    Each of several processes calibrates on its share of the windows, and all take the decisions of a single process.

    The plan and the repaired values are kept in a folder under `plans/`, which is named by the model, the text and the
    method's settings. A run that is started again finds them there, and does not calibrate again.

    Args:
        method: The pruning method.
        calibration: Token ids, [b, s] each; if not given, the data module's `calibration()`.
        attribute: The attribute of the module that holds the Hugging Face model.
        folder: The folder for plans; if not given, the trainer's `default_root_dir`.
        offload: `cpu` moves the hidden states of calibration off the accelerator to save memory.
        again: Whether to prune a model again that was pruned by this method with these settings.
        target: The maximum size of the result. The sparsity is then solved for, and the method's is ignored.
        serve_on: Where it must load: llama.cpp, vllm, decilm, transformers. Sizes are restricted to what they can
            serve, and the sparsity is as near to the requested one as that allows.
        tensor_parallel: The number of devices that will share the result; widths and heads are divisible by it.
    """

    def __init__(
        self,
        method: PruningMethod,
        calibration: Iterable[Tensor] | None = None,
        attribute: str = "model",
        folder: str | None = None,
        offload: Literal["cpu"] | None = None,
        again: bool = False,
        target: Target = Target(),
        serve_on: Sequence[Runtime] = (),
        tensor_parallel: int = 1,
    ) -> None:
        self.request = Request(method, target, serve_on, tensor_parallel)
        self.calibration, self.attribute = calibration, attribute
        self.folder, self.offload, self.again = folder, offload, again
        self.plan: PruningPlan | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_order(trainer)
        model = model_of(pl_module, self.attribute)
        if self.plan is not None and plan_of(model) is self.plan:
            return
        loaded = plan_of(model)
        if loaded is not None and not self.again and (loaded.method, loaded.settings) == self._name_and_settings():
            log.info("the model is already pruned by %s with these settings", loaded.method)
            self.plan = loaded
            return
        if getattr(pl_module, "is_prepared", False):
            raise ValueError(
                "the model was trained before, and cannot be pruned with other settings now: export it, and "
                "create a new Recovery from that folder"
            )
        self.plan = self._prune(trainer, model)
        log.info("%s", plan_summary(self.plan))

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.digest if self.plan else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.plan is not None and state_dict["plan"] != self.plan.digest:
            raise ValueError(
                f"the checkpoint belongs to plan {state_dict['plan']}, this run's is {self.plan.digest}: "
                "use the model, text and method it was trained with, or start without it"
            )

    def _prune(self, trainer: pl.Trainer, model: PreTrainedModel) -> PruningPlan:
        group, batches = distributed.world(), self._batches(trainer)
        key = None if distributed.rank(group) else self._key(model, batches)
        name = cast(str, distributed.broadcast_object(key, group))
        folder = resolve_path(self.folder or trainer.default_root_dir) / "plans" / name
        if distributed.broadcast_object((folder / FILE).exists(), group):
            return self._reload(trainer, model, folder, group)
        if not distributed.rank(group):
            check_output(folder)
        plan = self.request.prune(model, batches, getattr(datamodule_of(trainer), "seed", None))
        if not distributed.rank(group):
            save_stage(model, plan, folder)
        return plan

    def _reload(
        self, trainer: pl.Trainer, model: PreTrainedModel, folder: Path, group: distributed.ProcessGroup
    ) -> PruningPlan:
        """Reads a plan in the first process, and sends the others its structure and then its weights."""
        log.info("using the plan in %s", folder)
        plan = distributed.broadcast_object(None if distributed.rank(group) else load_stage(model, folder), group)
        assert plan is not None
        if distributed.rank(group):
            surgery.apply(model, plan)
        lacking = distributed.all_reduce_sum(torch.tensor(modules.lacks_weights(model), dtype=torch.int64), group)
        if not shards(trainer.strategy) or not lacking:  # processes without weights receive shards later
            sharing.receive(model, group)
            equalise(model, plan, group)
        return plan

    def _batches(self, trainer: pl.Trainer) -> Calibration:
        batches = self.calibration
        if batches is None:
            source = getattr(datamodule_of(trainer), "calibration", None)
            if source is None:
                raise ValueError(
                    "Prune has no calibration text: give `calibration`, or a data module like RecoveryData"
                )
            batches = source()
        device, group = trainer.strategy.root_device, distributed.world()
        return dataclasses.replace(Calibration.of(batches), device=device, offload=self.offload, group=group)

    def _name_and_settings(self) -> tuple[str, dict[str, Any]]:
        return type(self.request.method).__name__, self.request.settings

    def _key(self, model: PreTrainedModel, batches: Calibration) -> str:
        name, settings = self._name_and_settings()
        parts = [fingerprint(model.named_parameters()), batches.fingerprint, settings]
        return f"{name}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]}"
