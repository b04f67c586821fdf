"""Which formats could hold a pruned model, and why the others could not."""

from importlib.util import find_spec

from transformers import PreTrainedModel

from plprune.checkpoint import stock_config
from plprune.export import decilm
from plprune.export.formats import FORMATS


def exports(model: PreTrainedModel) -> dict[str, list[str]]:
    """Why each format of `plprune export` could not hold a model; nothing if it could."""
    found: dict[str, list[str]] = {"hf": [], "decilm": decilm.refusals(model)}
    if unknown_formats():
        found["gguf"] = ["whether it would is not known without the package gguf: pip install 'plprune[export]'"]
    else:
        from plprune.export import gguf

        found["gguf"] = gguf.refusals(model)
    return {format: found[format] for format in FORMATS}


def unknown_formats() -> list[str]:
    """The formats of which nothing can be said on this machine."""
    return [] if find_spec("gguf") else ["gguf"]


def is_stock(model: PreTrainedModel) -> bool:
    """Whether a pruned model's folder would be a stock checkpoint of its family."""
    return stock_config.stock_config(model) is not None
