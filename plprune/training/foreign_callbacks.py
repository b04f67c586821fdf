"""Lightning's own callbacks: which work beside plprune's, and which are refused."""

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

COPIES = "copies the model before it is pruned and has adapters"

REFUSED: dict[type[pl.Callback], str] = {  # callbacks of Lightning that would be wrong here without a word, or late
    WeightAveraging: COPIES,
    StochasticWeightAveraging: COPIES,
    BaseFinetuning: "chooses what is trained, as model.lora and model.train do",
    ModelPruning: "only masks weights, and those of adapters too, where Prune removes them",
    BatchSizeFinder: "changes data.batch_size after the steps were counted by it: set it yourself",
    LearningRateFinder: "finds a rate that the schedule does not follow: set model.learning_rate",
    GradientAccumulationScheduler: "changes the number of steps, which the learning rate and a run that goes on need: "
    "set trainer.accumulate_grad_batches",
    SpikeDetection: "takes a batch's share in the loss of a step for a loss, and cannot go on after a stop",
}


def check_callbacks(callbacks: Sequence[pl.Callback], logged: Sequence[str] | None) -> None:
    """Refuses callbacks that would be wrong without a word.

    Args:
        callbacks: All callbacks of a trainer.
        logged: The metrics that a callback can monitor; None if others than these may be logged.

    Raises:
        ValueError: A callback cannot work beside `Recovery`, or monitors a metric that is never logged.
    """
    for each in callbacks:
        why = next((why for kind, why in REFUSED.items() if isinstance(each, kind)), None)
        if why and not lightning_internals.is_tuners(each):
            raise ValueError(f"{type(each).__name__} {why}; leave it out of trainer.callbacks")
    foreign = [each for each in callbacks if not type(each).__module__.startswith(("lightning.", "plprune."))]
    if logged is None or foreign:  # others may log what they like
        return
    for each in callbacks:
        name = getattr(each, "monitor", None)
        judged = isinstance(each, EarlyStopping) and each.strict
        judged |= isinstance(each, ModelCheckpoint) and name not in (None, "step", "epoch")
        if judged and name not in logged:
            known = ", ".join(logged)
            raise ValueError(f"{type(each).__name__} monitors {name}, which is not logged: monitor one of {known}")
