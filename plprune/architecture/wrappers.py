"""Text decoders inside larger models, which also have towers that see or hear, and projectors.

Only the decoder is pruned. It has a config of its own inside the model's, and its sizes stand there.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from plprune.architecture.modeling_plprune import TEXT, WHOLE, is_wrapper


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model's text decoder: the model's own, if it is nothing else."""
    return config.get_text_config(decoder=True)


def auto_class(kind: type[PreTrainedConfig]) -> Any:
    """The class of transformers that loads models whole by a class of configs; some load as their decoder alone too."""
    return next((auto for auto, mapping in WHOLE if is_wrapper(kind) and kind in mapping), AutoModelForCausalLM)


def text_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The config of a model's text decoder, and the copies of it that parts of the model read."""
    own = text_config(model.config)
    copies = [m.config for m in model.modules() if isinstance(m, PreTrainedModel) and type(m.config) is type(own)]
    return [own, *copies]


def with_sizes(values: Mapping[str, Any], sizes: Mapping[str, Any], kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The values of a config of some class with other sizes of its text decoder."""
    if is_wrapper(kind):
        return {**values, TEXT: {**values[TEXT], **sizes}}
    return {**values, **sizes}


def text_parts(model: PreTrainedModel, blocks: str) -> list[nn.Module]:
    """The modules that text passes through: the decoder with blocks at a path, and the head; not the towers."""
    if not is_wrapper(type(model.config)):
        return [model]
    head = model.get_output_embeddings()
    return [model.get_submodule(blocks.rpartition(".")[0]), *([] if head is None else [head])]


def in_text_decoder(model: PreTrainedModel, path: str) -> bool:
    """Whether the module at a path belongs to the text decoder, by the config of the model around it."""
    around = path
    while around:
        around = around.rpartition(".")[0]
        module = model.get_submodule(around)
        if isinstance(module, PreTrainedModel):
            return type(module.config) is type(text_config(model.config))
    return False
