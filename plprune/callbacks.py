"""When things happen in a fit; how is said elsewhere.

Pruning happens in `setup`: the model is whole then, on the CPU, and no optimizer or wrapper has seen it. `on_fit_start`
is too late; there, nothing would train, without an error.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor
from transformers import PreTrainedModel

from plprune import processes, report, surgery
from plprune.anatomy import on_device
from plprune.atomic import check_free, rehearsed, resolved
from plprune.calibration import Calibration
from plprune.checkpoint import load_stage, rebuilt, save_pruned, save_stage
from plprune.checkpointing import is_dry
from plprune.estimate import shown
from plprune.evaluation import Measurement, as_dict, measure, table
from plprune.live import BarsFirst
from plprune.lora import merged, merged_state
from plprune.methods.base import PruningMethod, equalise, prune
from plprune.plan import FILE, PruningPlan, fingerprint
from plprune.report.found import of_plan, of_process, title_of, versions
from plprune.report.samples import PROMPTS, continued
from plprune.strategies import shards, whole
from plprune.surgery import plan_of
from plprune.watch import Watch

log = logging.getLogger(__name__)
PAUSE = 10.0  # seconds between two reports while training goes on
FOUND = ("stages", "loss", "generated")  # of a report, what a run that goes on takes over
POINTS = 2000  # of the loss in a report; where there are more, every second one goes


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
    """

    def __init__(
        self,
        method: PruningMethod,
        calibration: Iterable[Tensor] | None = None,
        attribute: str = "model",
        folder: str | None = None,
        offload: Literal["cpu"] | None = None,
        again: bool = False,
    ) -> None:
        self.method, self.calibration, self.attribute = method, calibration, attribute
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
        group, batches = processes.world(), self._batches(trainer)
        key = None if processes.rank(group) else self._key(model, batches)
        folder = resolved(self.folder or trainer.default_root_dir) / "plans" / cast(str, processes.same(key, group))
        if processes.same((folder / FILE).exists(), group):
            return self._reload(trainer, model, folder, group)
        if not processes.rank(group):
            check_free(folder)
        plan = prune(model, self.method, batches, getattr(trainer_data(trainer), "seed", None))
        if not processes.rank(group):
            save_stage(model, plan, folder)
        return plan

    def _reload(self, trainer: pl.Trainer, model: PreTrainedModel, folder: Path, group: processes.Group) -> PruningPlan:
        """The first process reads the plan, the others get its structure before its weights."""
        log.info("using the plan in %s", folder)
        plan = processes.same(None if processes.rank(group) else load_stage(model, folder), group)
        assert plan is not None
        if processes.rank(group):
            surgery.apply(model, plan)
        lacking = processes.total(torch.tensor(processes.lacks_weights(model), dtype=torch.int64), group)
        if not shards(trainer.strategy) or not lacking:  # those that lack weights get shards of them later
            processes.receive(model, group)
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
        device, group = trainer.strategy.root_device, processes.world()
        return dataclasses.replace(Calibration.of(batches), device=device, offload=self.offload, group=group)

    def _asked(self) -> tuple[str, dict[str, Any]]:
        return type(self.method).__name__, dataclasses.asdict(cast(Any, self.method))

    def _key(self, model: PreTrainedModel, batches: Calibration) -> str:
        name, settings = self._asked()
        asked = [fingerprint(model.named_parameters()), batches.fingerprint, settings]
        return f"{name}-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]}"


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
            check_free(self.output, self.overwrite)
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
            with rehearsed(self.output) if dry else contextlib.nullcontext(self.output) as output:
                save_pruned(rebuilt(model, state), output, tokenizer, self.overwrite, record=record)
            log.info("%s", "a dry run: no model is kept" if dry else f"saved the recovered model to {self.output}")
        trainer.strategy.barrier()


class Evaluate(pl.Callback):
    """Measures the model dense, pruned and recovered, on the data module's held-out windows, and prints a table.

    List it before `Prune`, so that it sees the dense model, and before `Report` and `Export`, which show what it finds.
    Several processes share the windows; with weights in shards the speed is not measured.

    Args:
        attribute: Name of the module's attribute that holds the Hugging Face model.
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
            processes.receive(model, processes.world())
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
        """Lightning calls no `on_train_end` where there is nothing to train, or nothing more."""
        if self._due and not trainer.global_step:
            self._show(trainer)
        elif self._due:
            with on_device(pl_module, trainer.strategy.root_device):
                self.on_train_end(trainer, pl_module)

    def _show(self, trainer: pl.Trainer) -> None:
        self._due = False
        if trainer.is_global_zero:
            print(f"\n{table(self.rows)}\n")

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._windows, "rows": as_dict(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = state_dict.get("rows", state_dict)
        if None not in (state_dict.get("windows"), self._windows) and state_dict["windows"] != self._windows:
            log.warning("what the checkpoint says of the model was measured on another text, and is left out")
            return
        self.rows = {name: Measurement(**{"tokens_per_second": None} | row) for name, row in rows.items()}

    def _held_out(self, trainer: pl.Trainer) -> list[Tensor]:
        """The windows to judge by."""
        data = trainer_data(trainer)
        if not hasattr(data, "held_out_windows"):
            raise ValueError("Evaluate has no text: train with a data module that has `held_out_windows`")
        return cast(Any, data).held_out_windows()

    def _measure(self, name: str, trainer: pl.Trainer, model: PreTrainedModel, sharded: bool) -> None:
        windows = self._held_out(trainer)
        with contextlib.nullcontext() if sharded else merged(model):
            self.rows[name] = measure(model, windows, processes.world(), speed=not sharded)
        values = as_dict({name: self.rows[name]})[name]
        for logger in trainer.loggers:
            logger.log_metrics({f"{name}/{key}": value for key, value in values.items()}, trainer.global_step)


class Report(pl.Callback):
    """Writes `report.html` and `report.json` from the start of a fit on, and again after each stage.

    A run that is killed leaves a report of what there is, a dry run none. A report that cannot be written is a warning,
    and the run goes on. What `Evaluate` measures is taken from it; list `Report` after it and before `Prune`.

    Args:
        output: Folder to write to, or an `.html` file; the trainer's `default_root_dir` if not given.
        prompts: Texts that the dense, the pruned and the recovered model continue; three short ones if not given. None
            is continued where weights are in shards, or where the module has no `tokenizer`.
        attribute: Name of the module's attribute that holds the Hugging Face model.
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
            report.check_ours(report.page_of(self._place(trainer)))
        self.record = {"version": report.VERSION, "kind": "run", "status": "running", "process": of_process()}
        self.record |= self._asked(trainer, pl_module, model) | {"stages": {}, "loss": [], "generated": []}
        if trainer.ckpt_path is None:  # else what an earlier run has written stays until the checkpoint is read
            if plan_of(model) is None and trainer.is_global_zero:
                with on_device(model, trainer.strategy.root_device):
                    self._generate("dense", trainer, pl_module, sharded=False)
            self._write(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = plan_of(model_of(pl_module, self.attribute))
        self.record |= {"status": "running", "process": of_process()}
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
        if not step or step % every or (known and known[-1][0] == step):  # there may be many batches to a step
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
        self._write(trainer)  # with what callbacks that are listed later have found

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.record:
            reason = next(iter(str(exception).splitlines()), "")
            name = type(exception).__name__
            self.record |= {"status": "stopped", "reason": name if reason in ("", "75", "0") else f"{name}: {reason}"}
            self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        return report.completed(self.record)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record |= {name: state_dict[name] for name in FOUND if name in state_dict}

    def _place(self, trainer: pl.Trainer) -> str:
        return self.output or trainer.default_root_dir

    def _asked(self, trainer: pl.Trainer, module: pl.LightningModule, model: PreTrainedModel) -> dict[str, Any]:
        """What is known before anything is done."""
        method = next((each.method for each in cast(Any, trainer).callbacks if isinstance(each, Prune)), None)
        settings = dataclasses.asdict(cast(Any, method)) if method else {}
        asked = {"method": type(method).__name__, "sparsity": settings.get("sparsity"), "settings": settings}
        seeds = {"run": os.environ.get("PL_GLOBAL_SEED"), "data": getattr(trainer_data(trainer), "seed", None)}
        known = {
            "model": model.config.name_or_path,
            "asked": asked if method else {},
            "config": configuration(trainer, module),
            "versions": versions("plprune", "torch", "transformers", "lightning", "peft"),
            "seeds": {name: int(seed) for name, seed in seeds.items() if seed is not None},
        }
        return known | {"title": title_of(known)}

    def _generate(self, name: str, trainer: pl.Trainer, module: pl.LightningModule, sharded: bool) -> None:
        """Has the model continue the prompts."""
        tokenizer = getattr(module, "tokenizer", None)
        if sharded or tokenizer is None or not trainer.is_global_zero or not self.prompts:
            return
        texts = continued(model_of(module, self.attribute), tokenizer, self.prompts)
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


ORDER: tuple[tuple[type[pl.Callback], type[pl.Callback], str], ...] = (  # what is lost if the first comes second
    (Watch, Evaluate, "would not notice a process that is gone before"),
    (Watch, Report, "would not notice a process that is gone before"),
    (Watch, Prune, "would not notice a process that is gone before"),
    (BarsFirst, Evaluate, "would end the bar below the table"),
    (Evaluate, Prune, "would not see the dense model"),
    (Evaluate, Report, "would measure what the report then lacks"),
    (Evaluate, Export, "would measure what the model card then lacks"),
    (Report, Prune, "would not see the dense model"),
)


def check_order(trainer: pl.Trainer) -> None:
    """Makes sure that no callback comes too late for what it is to see, or to be seen by.

    Raises:
        ValueError: One does.
    """
    listed: list[pl.Callback] = cast(Any, trainer).callbacks
    for first, second, lost in ORDER:
        places = [[i for i, each in enumerate(listed) if isinstance(each, kind)] for kind in (first, second)]
        if all(places) and max(places[0]) > min(places[1]):
            one, other = first.__name__, second.__name__
            raise ValueError(f"{one} is listed after {other}, and {lost}: list {one} before {other}")


def model_of(module: pl.LightningModule, attribute: str) -> PreTrainedModel:
    """The Hugging Face model that a LightningModule holds.

    Raises:
        ValueError: There is none under that name.
    """
    model = getattr(module, attribute, None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(module).__name__}.{attribute} is {type(model).__name__}, not a Hugging Face model: "
            "give the name of the attribute that holds it (`attribute`)"
        )
    return model


def run_record(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """What a model card says of a run: perplexities, text, training."""
    data, rows = trainer_data(trainer), [c.rows for c in trainer.callbacks if isinstance(c, Evaluate)]  # type: ignore[attr-defined]
    sources = {k: v for k, v in getattr(data, "sources", {}).items() if v}
    training = {"steps": trainer.global_step, "learning rate": getattr(module, "learning_rate", None)}
    sizes = {"windows a step": getattr(data, "batch_size", None), "tokens a window": getattr(data, "seq_len", None)}
    return {
        "perplexity": {name: row.perplexity for measured in rows for name, row in measured.items()},
        "text": sources,
        "training": {k: v for k, v in (training | sizes).items() if v is not None},
    }


def configuration(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """The settings of a run: what the command line was given, or what the module and the data say of themselves."""
    for each in cast(Any, trainer).callbacks:
        if isinstance(each, SaveConfigCallback):
            return yaml.safe_load(each.parser.dump(each.config, skip_none=False))
    own = {"model": module, "data": trainer_data(trainer)}
    steps = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    return {"trainer": steps} | {name: _settings(each) for name, each in own.items() if each is not None}


def _settings(of: object) -> dict[str, Any]:
    """The public attributes of an object that are plain values, or settings themselves."""
    found = {}
    for name, value in vars(of).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if not name.startswith("_") and name != "training" and isinstance(value, str | int | float | dict):
            found[name] = value
    return found


def trainer_data(trainer: pl.Trainer) -> Any:
    """The data module of a run, if it has one."""
    return getattr(trainer, "datamodule", None)


def summary(plan: PruningPlan) -> str:
    """One line on what a plan reached.

    Example:
        FLAP removed 25.0% of the blocks' parameters (25.0% asked), 19.7% of the model's
    """
    targets = plan.origin.get("targets", {})
    parts = [
        f"{plan.method} removed {plan.reached:.1%} of the blocks' parameters ({plan.sparsity:.1%} "
        f"{'for the target' if targets else 'asked'}), {plan.reached_of_model:.1%} of the model's"
    ]
    for name, found in targets.items():
        left = shown(found["reached"], "B" if name == "memory" else "")
        what = "parameters"
        if name == "memory":
            batch, context = (plan.settings[f"target_{key}"] for key in ("batch", "context"))
            what = f"for weights and cache of {batch} x {context} tokens"
        parts.append(f"{left} {what} ({plan.settings[f'target_{name}']} asked)")
    return "; ".join(parts)
