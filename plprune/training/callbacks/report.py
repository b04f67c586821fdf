"""The callback that writes the report of a fit while it runs."""

import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from transformers import PreTrainedModel

from plprune import report
from plprune.architecture.modules import on_device
from plprune.evaluation.measurement import as_dict
from plprune.pruning.surgery import plan_of
from plprune.recovery.lora import merged
from plprune.report.records import of_plan, this_process, title_of, versions
from plprune.report.samples import PROMPTS, continuations
from plprune.training.callbacks.evaluate import Evaluate
from plprune.training.callbacks.lookup import datamodule_of, model_of
from plprune.training.callbacks.order import check_order
from plprune.training.callbacks.prune import Prune
from plprune.training.checkpointing import is_dry
from plprune.training.strategies import shards

log = logging.getLogger(__name__)
PAUSE = 10.0  # seconds between two reports while training goes on
RESTORED = ("stages", "loss", "generated")  # entries of a record that a resumed run takes from the checkpoint
POINTS = 2000  # the maximum number of losses in a report; beyond it, every second one is dropped


class Report(pl.Callback):
    """Writes `report.html` and `report.json` from the start of a fit on, and again after each stage.

    A run that is killed leaves a report of its stages so far; a dry run leaves none. If a report cannot be written,
    there is a warning and the run continues. The measurements are those of `Evaluate`: list `Report` after it and
    before `Prune`.

    Args:
        output: The folder to write to, or an `.html` file; if not given, the trainer's `default_root_dir`.
        prompts: Texts that the dense, the pruned and the recovered model continue; if not given, three short ones.
            Nothing is continued with sharded weights, or if the module has no `tokenizer`.
        attribute: The attribute of the module that holds the Hugging Face model.
    """

    def __init__(self, output: str | None = None, prompts: list[str] | None = None, attribute: str = "model") -> None:
        self.output, self.attribute = output, attribute
        self.prompts = list(PROMPTS) if prompts is None else prompts
        self.record: dict[str, Any] = {}
        self._last = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_order(trainer)
        model = model_of(pl_module, self.attribute)
        if trainer.is_global_zero:
            report.check_replaceable(report.page_path(self._place(trainer)))
        self.record = {"version": report.VERSION, "kind": "run", "status": "running", "process": this_process()}
        self.record |= self._initial(trainer, pl_module, model) | {"stages": {}, "loss": [], "generated": []}
        if trainer.ckpt_path is None:  # else the earlier report stays until the checkpoint is read
            if plan_of(model) is None and trainer.is_global_zero:
                with on_device(model, trainer.strategy.root_device):
                    self._generate("dense", trainer, pl_module, sharded=False)
            self._write(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = plan_of(model_of(pl_module, self.attribute))
        self.record |= {"status": "running", "process": this_process()}
        self.record.pop("reason", None)
        if plan is not None:
            known = of_plan(plan)
            known["versions"] = self.record["versions"] | known["versions"]
            known["seeds"] = self.record["seeds"] | known["seeds"]
            self.record |= known
            self.record["title"] = title_of(self.record)
        for block, rank in zip(self.record.get("blocks", []), getattr(pl_module, "ranks", []), strict=False):
            block["rank"] = rank
        if trainer.ckpt_path is None and plan is not None:
            self._generate("pruned", trainer, pl_module, shards(trainer.strategy))
        self._progress(trainer)
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, known = trainer.global_step, self.record["loss"]
        every = getattr(trainer, "log_every_n_steps", 1) or 1
        if not step or step % every or (known and known[-1][0] == step):  # a step may take several batches
            return
        loss = trainer.callback_metrics.get("train_loss", outputs.get("loss") if isinstance(outputs, Mapping) else None)
        if loss is None:
            return
        known.append([step, float(loss)])
        if len(known) > POINTS:
            del known[1::2]
        self._progress(trainer)
        if time.monotonic() - self._last > PAUSE:
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sharded = shards(trainer.strategy)
        if trainer.is_global_zero and not sharded:
            with merged(model_of(pl_module, self.attribute)):
                self._generate("recovered", trainer, pl_module, sharded)
        self._progress(trainer)
        self.record["status"] = "finished"
        self._write(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.record["status"] == "running":  # there was nothing to train
            self.on_train_start(trainer, pl_module)
            self.record["status"] = "finished"
        self._write(trainer)  # with the results of callbacks that are listed later

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.record:
            reason = next(iter(str(exception).splitlines()), "")
            name = type(exception).__name__
            self.record |= {"status": "stopped", "reason": name if reason in ("", "75", "0") else f"{name}: {reason}"}
            self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        return report.completed(self.record)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record |= {name: state_dict[name] for name in RESTORED if name in state_dict}

    def _place(self, trainer: pl.Trainer) -> str:
        return self.output or trainer.default_root_dir

    def _initial(self, trainer: pl.Trainer, module: pl.LightningModule, model: PreTrainedModel) -> dict[str, Any]:
        """The entries that are known from the start."""
        request = next((each.request for each in cast(Any, trainer).callbacks if isinstance(each, Prune)), None)
        asked = {}
        if request:
            method = request.method
            asked = {"method": type(method).__name__, "sparsity": method.sparsity, "settings": request.settings}
        seeds = {"run": os.environ.get("PL_GLOBAL_SEED"), "data": getattr(datamodule_of(trainer), "seed", None)}
        known = {
            "model": model.config.name_or_path,
            "asked": asked,
            "config": configuration(trainer, module),
            "versions": versions("plprune", "torch", "transformers", "lightning", "peft"),
            "seeds": {name: int(seed) for name, seed in seeds.items() if seed is not None},
        }
        return known | {"title": title_of(known)}

    def _generate(self, name: str, trainer: pl.Trainer, module: pl.LightningModule, sharded: bool) -> None:
        """Lets the model continue the prompts."""
        tokenizer = getattr(module, "tokenizer", None)
        if sharded or tokenizer is None or not trainer.is_global_zero or not self.prompts:
            return
        texts = continuations(model_of(module, self.attribute), tokenizer, self.prompts)
        known = {each["prompt"]: each for each in self.record["generated"]}
        self.record["generated"] = [
            {**known.get(prompt, {"prompt": prompt}), name: text}
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]

    def _progress(self, trainer: pl.Trainer) -> None:
        steps = trainer.estimated_stepping_batches
        if steps != float("inf"):
            self.record["progress"] = {"step": trainer.global_step, "steps": int(steps)}

    def _write(self, trainer: pl.Trainer) -> None:
        for each in cast(Any, trainer).callbacks:
            if isinstance(each, Evaluate):
                self.record["stages"] |= as_dict(each.rows)
        self._last = time.monotonic()
        if trainer.is_global_zero and not is_dry(trainer):
            try:
                report.write(self.record, self._place(trainer), overwrite=True)
            except (OSError, ValueError) as error:
                log.warning("no report: %s", error)


def configuration(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """The settings of a run: the config of the command line, or else the attributes of the module and the data."""
    for each in cast(Any, trainer).callbacks:
        if isinstance(each, SaveConfigCallback):
            return yaml.safe_load(each.parser.dump(each.config, skip_none=False))
    sections = {"model": module, "data": datamodule_of(trainer)}
    steps = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    return {"trainer": steps} | {name: _settings(each) for name, each in sections.items() if each is not None}


def _settings(owner: object) -> dict[str, Any]:
    """The public attributes of an object that are plain values or dataclasses."""
    settings = {}
    for name, value in vars(owner).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if not name.startswith("_") and name != "training" and isinstance(value, str | int | float | dict):
            settings[name] = value
    return settings
