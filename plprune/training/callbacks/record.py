"""The record of a run, from which its report and its model card are made."""

import dataclasses
from typing import Any, cast

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from plprune.io.units import format_value
from plprune.pruning.plan import PruningPlan
from plprune.training.callbacks.evaluate import Evaluate
from plprune.training.callbacks.shared import trainer_data


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
        left = format_value(found["reached"], "bytes" if name == "memory" else "short")
        what = "parameters"
        if name == "memory":
            batch, context = (plan.settings[f"target_{key}"] for key in ("batch", "context"))
            what = f"for weights and cache of {batch} x {context} tokens"
        parts.append(f"{left} {what} ({plan.settings[f'target_{name}']} asked)")
    return "; ".join(parts)
