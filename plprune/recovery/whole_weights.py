"""Training of weights themselves, without adapters."""

import logging
from typing import Literal

from transformers import PreTrainedModel

from plprune.pruning.plan import PruningPlan
from plprune.recovery import consumers, full, routers

log = logging.getLogger(__name__)
Train = Literal["lora", "consumers", "routers", "all"]


def unfreeze(model: PreTrainedModel, train: Train, plan: PruningPlan | None) -> None:
    """Freezes a model in place, except what is to be trained, which is then kept in float32.

    Args:
        model: The model.
        train: consumers, routers or all.
        plan: The plan that pruned it, if any.

    Raises:
        ValueError: There is nothing of this kind to train.
    """
    if train == "consumers":
        names, what = consumers.unfreeze(model, plan), "consumers"
    elif train == "routers":
        names, what = routers.unfreeze(model), "parameters of routers"
    else:
        names, what = full.unfreeze(model), "parameters, the whole text decoder,"
    log.info("%d %s are trained, in float32", len(names), what)
