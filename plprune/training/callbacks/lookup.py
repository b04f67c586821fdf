"""Finds the model and the data module of a run."""

from typing import Any

import lightning.pytorch as pl
from transformers import PreTrainedModel


def model_of(module: pl.LightningModule, attribute: str) -> PreTrainedModel:
    """The Hugging Face model that a LightningModule holds.

    Raises:
        ValueError: The attribute holds something else, or does not exist.
    """
    model = getattr(module, attribute, None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(module).__name__}.{attribute} is {type(model).__name__}, not a Hugging Face model: "
            "give the name of the attribute that holds it (`attribute`)"
        )
    return model


def datamodule_of(trainer: pl.Trainer) -> Any:
    """The data module of a run, or None."""
    return getattr(trainer, "datamodule", None)
