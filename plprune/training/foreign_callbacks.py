"""Refuses Lightning's callbacks that cannot work together with plprune's."""

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)

from plprune.training import lightning_internals

COPIES = "copies the model before it is pruned and gets adapters"

REFUSED: dict[type[pl.Callback], str] = {  # callbacks that would fail silently or late, with the reasons
    WeightAveraging: COPIES,
    StochasticWeightAveraging: COPIES,
    BaseFinetuning: "chooses what is trained, as model.lora and model.train do",
    ModelPruning: "masks weights, adapters included, where Prune removes them",
    BatchSizeFinder: "changes data.batch_size after the steps were counted with it: set it yourself",
    LearningRateFinder: "suggests a rate that the schedule does not use: set model.learning_rate",
    GradientAccumulationScheduler: "changes the number of steps, on which the learning rate and resuming depend: set "
    "trainer.accumulate_grad_batches",
    SpikeDetection: "takes a batch's share in the loss of a step for a loss, and cannot be resumed",
}


def check_callbacks(callbacks: Sequence[pl.Callback], logged: Sequence[str] | None) -> None:
    """Refuses callbacks that would give wrong results without an error.

    Args:
        callbacks: All callbacks of a trainer.
        logged: The metrics that are logged, if the module logs no others.

    Raises:
        ValueError: A callback cannot work with `Recovery`, or monitors a metric that is never logged.
    """
    for each in callbacks:
        why = next((why for kind, why in REFUSED.items() if isinstance(each, kind)), None)
        if why and not lightning_internals.belongs_to_tuner(each):
            raise ValueError(f"{type(each).__name__} {why}; leave it out of trainer.callbacks")
    foreign = [each for each in callbacks if not type(each).__module__.startswith(("lightning.", "plprune."))]
    if logged is None or foreign:  # foreign callbacks may log other metrics
        return
    for each in callbacks:
        name = getattr(each, "monitor", None)
        required = isinstance(each, EarlyStopping) and each.strict
        required |= isinstance(each, ModelCheckpoint) and name not in (None, "step", "epoch")
        if required and name not in logged:
            known = ", ".join(logged)
            raise ValueError(f"{type(each).__name__} monitors {name}, which is not logged: monitor one of {known}")
