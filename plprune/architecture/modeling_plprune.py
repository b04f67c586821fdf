"""Makes transformers load a pruned model: this file lies beside its weights, and needs nothing of plprune.

`config.json` names the family whose code the model runs (`base_model_type`) and says what pruning left of it
(`pruned`). The family's own class is built from the configuration before pruning, and then cut to size: what the
family's forward pass does is nobody's business here.

=============  ==========================================================================================
`blocks`       where the model has its decoder blocks
`attention`    where a block has its attention
`layers`       for each block that differs:
`shapes`       the shape of each parameter that has another one, or that was added (a bias)
`counts`       attributes that tell the forward pass how many heads there are
`gather`       projections that read only some of their inputs, and the width of these; `index` is in the weights
`scatter`      projections that compute only some of their outputs, likewise
`skip`         `["attention"]` where the attention was removed
=============  ==========================================================================================
"""

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

Mixin: Any = object


# It warns of the sizes before pruning, which the family's class asks for, and which are then cut.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


class PrunedConfig(PreTrainedConfig):
    """Reads the configuration of a pruned model, as a subclass of the family's own."""

    model_type = "plprune"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        values = dict(config_dict)
        del values["model_type"]
        return config_class(CONFIG_MAPPING[values["base_model_type"]]).from_dict(values, **kwargs)


class PrunedForCausalLM:
    """Loads a pruned model, as a subclass of the family's own; what `auto_map` in `config.json` names."""

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, config: Any = None, **kwargs: Any) -> PreTrainedModel:
        config = PrunedConfig.from_pretrained(name) if config is None else config
        return model_class(cls, type(config)).from_pretrained(name, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        return model_class(cls, type(config))._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to note: a pruned model writes this file beside itself whenever it is saved."""


class PrunedModel(PrunedForCausalLM):
    """The same without the head."""

    mapping: Any = MODEL_MAPPING


class PrunedModelMixin(Mixin):
    """What a pruned model does besides what its family's class does."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        cut(self, config.pruned)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)

    def _get_static_cache_init_shape(self) -> None:
        """Blocks differ in their heads: each makes its room in the cache when it first writes there."""


class PrunedConfigMixin(Mixin):
    """What a pruned model's configuration does besides what its family's does: it says so in `config.json`."""

    def to_dict(self) -> dict[str, Any]:
        classes = {"AutoConfig": PrunedConfig, "AutoModel": PrunedModel, "AutoModelForCausalLM": PrunedForCausalLM}
        return super().to_dict() | {
            "model_type": PrunedConfig.model_type,
            "base_model_type": type(self).model_type,
            "auto_map": {auto: f"{Path(__file__).stem}.{own.__name__}" for auto, own in classes.items()},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        own = self.to_dict()
        return super().to_diff_dict() | {key: own[key] for key in ("model_type", "base_model_type", "auto_map")}


@functools.cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of the pruned models of a family, given the family's."""
    own = type(f"Pruned{base.__name__}", (PrunedConfigMixin, base), {"__module__": __name__})
    AutoModel.register(own, PrunedModel)
    AutoModelForCausalLM.register(own, PrunedForCausalLM)
    return own


@functools.cache
def model_class(loader: type[PrunedForCausalLM], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The model class of a configuration class that :func:`config_class` has made."""
    base: Any = loader.mapping[config.__mro__[2]]
    values = {"__module__": __name__, "config_class": config}
    return type(f"Pruned{base.__name__}", (PrunedModelMixin, base), values)


def cut(model: PreTrainedModel, pruned: dict[str, Any]) -> None:
    """Gives a model the structure that its configuration describes; values are the first ones of those there were."""
    inner = model.base_model
    blocks: Any = inner.get_submodule(pruned["blocks"].removeprefix(f"{inner.base_model_prefix}."))
    for index, own in pruned["layers"].items():
        block = blocks[int(index)]
        if "attention" in own.get("skip", ()):
            replace(block, pruned["attention"], NoAttention(int(index)))
        for path, width in own.get("gather", {}).items():
            replace(block, path, Gather(block.get_submodule(path), torch.arange(width), width))
        for path, width in own.get("scatter", {}).items():
            replace(block, path, Scatter(block.get_submodule(path), torch.arange(width), width))
        for name, shape in own.get("shapes", {}).items():
            resize(block, name, shape)
        for path, count in own.get("counts", {}).items():
            set_count(block, path, count)


def replace(block: nn.Module, path: str, module: nn.Module) -> None:
    """Puts another module in the place of the one at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def resize(block: nn.Module, name: str, shape: list[int]) -> None:
    """Gives the tensor of a dotted name another shape; if there is none it is made, of zeros."""
    path, _, last = name.rpartition(".")
    owner: Any = block.get_submodule(path)
    old = getattr(owner, last)
    if last == "index":
        owner.index = old[: shape[0]]
        return
    like = owner.weight if old is None else old
    value = like.new_zeros(shape) if old is None else old[tuple(slice(n) for n in shape)].clone()
    setattr(owner, last, nn.Parameter(value.detach(), requires_grad=like.requires_grad))
    if last == "weight" and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = shape
    elif last == "weight" and hasattr(owner, "nf"):  # GPT-2's transposed Conv1D
        owner.nx, owner.nf = shape


def set_count(block: nn.Module, path: str, count: int) -> None:
    """Sets an attribute that tells the forward pass a number; in a module's `config`, for that module alone."""
    owner, _, attribute = path.rpartition(".")
    if owner.endswith(".config"):
        holder: Any = block.get_submodule(owner.removesuffix(".config"))
        holder.config = BlockConfig(holder.config, **{attribute: count})
    else:
        setattr(block.get_submodule(owner), attribute, count)


class Gather(nn.Module):
    """A projection that reads only some of its inputs: the consumer of ragged value channels.

    Args:
        linear: The projection of the channels that are read.
        index: Which those are.
        in_features: Width of the input.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, index: Tensor, in_features: int) -> None:
        super().__init__()
        self.linear, self.in_features = linear, in_features
        self.register_buffer("index", index, persistent=True)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., d_out]
        return self.linear(x.index_select(-1, self.index))


class Scatter(nn.Module):
    """A projection that computes only some of its outputs and leaves zeros for the others: ragged value channels.

    Args:
        linear: The projection to the channels that are computed.
        index: Which those are.
        out_features: Width of the output.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, index: Tensor, out_features: int) -> None:
        super().__init__()
        self.linear, self.out_features = linear, out_features
        self.register_buffer("index", index, persistent=True)

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., out_features]
        y = self.linear(x)
        return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.index, y)


class NoAttention(nn.Module):
    """Stands where an attention sub-block was dropped, and adds zero.

    The cache gets an entry of width one: it asks its first layer for the length of the sequence, and would silently
    misplace every token if there were none. Families and releases of transformers call the cache by different names.
    """

    names = ("cache", "past_key_values", "layer_past")

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, **passed: Any) -> tuple[Tensor, None]:
        cache = next((passed[name] for name in self.names if passed.get(name) is not None), None)
        if cache is not None:
            batch, length, _width = hidden_states.shape
            entry = hidden_states.new_zeros(batch, 1, length, 1)
            cache.update(entry, entry, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class BlockConfig:
    """The model's config as one block sees it: a few values of its own, the model's for all others."""

    def __init__(self, base: Any, **own: Any) -> None:
        self.__dict__.update(own, _base=base)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_base"], name)
