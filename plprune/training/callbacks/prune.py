"""The callback that prunes when a fit begins.

Pruning happens in `setup`: the model is whole then, on the CPU, and no optimizer or wrapper has seen it. `on_fit_start`
is too late; there, nothing would train, without an error.
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
from plprune.pruning.surgery import plan_of
from plprune.training.callbacks.order import check_order
from plprune.training.callbacks.record import summary
from plprune.training.callbacks.shared import model_of, trainer_data
from plprune.training.strategies import shards

log = logging.getLogger(__name__)


class Prune(pl.Callback):
    """Prunes the model of a LightningModule before training, once.

    Under several processes each calibrates on its share of the windows, and all take the decisions that one would.

    The plan and what the method repaired are kept beside the run, under `plans/` and a name made of the model, the
    text and the method's settings: a run that is stopped and started again finds them, and does not calibrate again.

    Args:
        method: How to prune.
        calibration: Token ids, [b, s] each; the data module's `calibration()` if not given.
        attribute: Name of the module's attribute that holds the Hugging Face model.
        folder: Where plans are kept; the trainer's `default_root_dir` if not given.
        offload: Where the hidden states of calibration wait, to save memory on the accelerator: `cpu`, or on it.
        again: Whether a model that was pruned by this method with these settings is pruned once more.
        target: What the result may be at most: `sparsity` is then found by it, and what is given for it does not count.
        serve_on: Where the result must load: llama.cpp, vllm, transformers. Its sizes are then such as can be served
            there, and its sparsity as near to the one asked for as that allows; what cannot be is refused.
        tensor_parallel: Devices that will share the result: widths and heads are divisible by their number.
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
        if loaded is not None and not self.again and (loaded.method, loaded.settings) == self._asked():
            log.info("the model is already pruned by %s with these settings", loaded.method)
            self.plan = loaded
            return
        if getattr(pl_module, "begun", False):
            raise ValueError(
                "the model was fitted before, and a trained model cannot be pruned by other settings: export it, and "
                "make a new Recovery of that folder"
            )
        self.plan = self._prune(trainer, model)
        log.info("%s", summary(self.plan))

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
        folder = (
            resolve_path(self.folder or trainer.default_root_dir)
            / "plans"
            / cast(str, distributed.broadcast_object(key, group))
        )
        if distributed.broadcast_object((folder / FILE).exists(), group):
            return self._reload(trainer, model, folder, group)
        if not distributed.rank(group):
            check_output(folder)
        plan = self.request.prune(model, batches, getattr(trainer_data(trainer), "seed", None))
        if not distributed.rank(group):
            save_stage(model, plan, folder)
        return plan

    def _reload(
        self, trainer: pl.Trainer, model: PreTrainedModel, folder: Path, group: distributed.ProcessGroup
    ) -> PruningPlan:
        """The first process reads the plan, the others get its structure before its weights."""
        log.info("using the plan in %s", folder)
        plan = distributed.broadcast_object(None if distributed.rank(group) else load_stage(model, folder), group)
        assert plan is not None
        if distributed.rank(group):
            surgery.apply(model, plan)
        lacking = distributed.all_reduce_sum(torch.tensor(modules.lacks_weights(model), dtype=torch.int64), group)
        if not shards(trainer.strategy) or not lacking:  # those that lack weights get shards of them later
            sharing.receive(model, group)
            equalise(model, plan, group)
        return plan

    def _batches(self, trainer: pl.Trainer) -> Calibration:
        batches = self.calibration
        if batches is None:
            source = getattr(trainer_data(trainer), "calibration", None)
            if source is None:
                raise ValueError(
                    "Prune has no calibration text: give `calibration`, or a data module like RecoveryData"
                )
            batches = source()
        device, group = trainer.strategy.root_device, distributed.world()
        return dataclasses.replace(Calibration.of(batches), device=device, offload=self.offload, group=group)

    def _asked(self) -> tuple[str, dict[str, Any]]:
        return type(self.request.method).__name__, self.request.settings

    def _key(self, model: PreTrainedModel, batches: Calibration) -> str:
        name, settings = self._asked()
        asked = [fingerprint(model.named_parameters()), batches.fingerprint, settings]
        return f"{name}-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]}"
