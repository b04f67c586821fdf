"""Lets transformers load a pruned model. This file is stored beside the weights and does not import plprune.

`config.json` names the model family (`base_model_type`) and the changes by pruning (`pruned`). The family's class is
built from the config before pruning; then its parameters are cut to their new shapes. Its forward pass is unchanged.

=============  ==========================================================================================
`blocks`       path of the list of decoder blocks
`attention`    path of the attention in a block
`layers`       changes by block, with the following keys:
`shapes`       shapes of parameters that were cut, padded or added (biases)
`counts`       attributes from which the forward pass reads numbers of heads, and their values
`gather`       projections that read only some inputs, and the full input width; `index` is in the weights
`scatter`      projections that compute only some outputs, and the full output width; `index` likewise
`skip`         names `attention` or `mlp` if that was removed
`attention`    path of the attention that was removed, if it is another in this block
`mlp`          path of the FFN, or of the mixture of experts, that was removed
`returned`     length of the tuple that it returned; 0 if it returned hidden states alone
=============  ==========================================================================================
"""

import functools
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

OLDEST = "5.13"  # of transformers that load this file's classes
if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
    raise ImportError(
        f"this pruned model needs transformers {OLDEST} or newer, and {transformers.__version__} is installed: pip "
        f"install 'transformers>={OLDEST}'"
    )

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
)

Mixin: Any = object
TEXT = "text_config"  # the key of the text decoder's config inside that of a larger model
WHOLE = (  # classes that load a text decoder with the towers beside it
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
NEEDED = (AutoConfig.__name__, AutoModelForCausalLM.__name__)  # what a model with code of its own must have
REMOTE = "transformers_modules."  # the modules of code that comes with models
FAMILY = "\n\n# The family's code lies beside this file.\n"

# It warns about the sizes before pruning, with which the family's class is built.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


class PrunedConfig(PreTrainedConfig):
    """Reads the config of a pruned model, as a subclass of the family's config class."""

    model_type = "plprune"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        values = dict(config_dict)
        del values["model_type"]
        family = values["base_model_type"]
        if family not in CONFIG_MAPPING:
            raise ValueError(
                f"{family!r} models come with code of their own, which runs only if you allow it: call "
                "plprune.allow_remote_code(FOLDER) first"
            )
        return config_class(CONFIG_MAPPING[family]).from_dict(values, **kwargs)


class PrunedForCausalLM:
    """Loads a pruned model, as a subclass of the family's class; `auto_map` in `config.json` names this class."""

    mappings: Any = (MODEL_FOR_CAUSAL_LM_MAPPING,)

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, config: Any = None, **kwargs: Any) -> PreTrainedModel:
        config = PrunedConfig.from_pretrained(name) if config is None else config
        return model_class(cls, type(config)).from_pretrained(name, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        return model_class(cls, type(config))._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: `save_pretrained` always copies this file."""


class PrunedForMultimodalLM(PrunedForCausalLM):
    """Loads a model whose text decoder was pruned, whole, as a subclass of the family's class."""

    mappings: Any = tuple(mapping for _, mapping in WHOLE)


class PrunedModel(PrunedForCausalLM):
    """Loads a pruned model without its head."""

    mappings: Any = (MODEL_MAPPING,)


class PrunedModelMixin(Mixin):
    """Cuts a model to its pruned shapes when it is built, and copies this file when it is saved."""

    _auto_class = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        cut(self, config.pruned)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        write_code(type(self).__mro__[2], Path(save_directory))

    def _get_static_cache_init_shape(self) -> None:
        """Disables allocation in advance: blocks have different numbers of heads, so each allocates its own cache."""


class PrunedConfigMixin(Mixin):
    """Writes the classes of this file to `config.json`, in addition to the family's config."""

    _auto_class = None

    def to_dict(self) -> dict[str, Any]:
        classes = {"AutoConfig": PrunedConfig}
        classes |= {auto.__name__: loader for auto, loader in loaders(type(self).__mro__[2]).items()}
        return super().to_dict() | {
            "model_type": PrunedConfig.model_type,
            "base_model_type": type(self).model_type,
            "auto_map": {auto: f"{Path(__file__).stem}.{each.__name__}" for auto, each in classes.items()},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        values = self.to_dict()
        return super().to_diff_dict() | {key: values[key] for key in ("model_type", "base_model_type", "auto_map")}


def is_wrapper(config: Any) -> bool:
    """Whether models with a config of some class have a text decoder among other parts, as towers that see."""
    return TEXT in config.sub_configs and any(config in mapping for _, mapping in WHOLE)


def loader_of(base: type[PreTrainedConfig]) -> type[PrunedForCausalLM]:
    """The class that loads pruned models of a family."""
    return PrunedForMultimodalLM if is_wrapper(base) else PrunedForCausalLM


def loaders(base: type[PreTrainedConfig]) -> dict[Any, type[PrunedForCausalLM]]:
    """What each of transformers' auto classes loads pruned models of a family by."""
    autos = [auto for auto, mapping in WHOLE if base in mapping] if is_wrapper(base) else [AutoModelForCausalLM]
    return {AutoModel: PrunedModel, **dict.fromkeys(autos, loader_of(base))}


@functools.cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Makes the config class of a family's pruned models from the family's config class."""
    pruned = type(f"Pruned{base.__name__}", (PrunedConfigMixin, base), {"__module__": __name__})
    for auto, loader in loaders(base).items():
        auto.register(pruned, loader)
    return pruned


@functools.cache
def model_class(loader: type[PrunedForCausalLM], config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Makes the model class for a config class from :func:`config_class`."""
    dense = config.__mro__[2]
    base: Any = next(mapping[dense] for mapping in loader.mappings if dense in mapping)
    values = {"__module__": __name__, "config_class": config}
    return type(f"Pruned{base.__name__}", (PrunedModelMixin, base), values)


def register(config: type[PreTrainedConfig], model: type[PreTrainedModel]) -> None:
    """Makes a family known to transformers, unless it is."""
    if config.model_type not in CONFIG_MAPPING:
        AutoConfig.register(config.model_type, config)
        AutoModelForCausalLM.register(config, model)
        config.register_for_auto_class()  # their files are saved with models
        model.register_for_auto_class(AutoModelForCausalLM.__name__)


def write_code(family: Any, folder: Path, pruned: bool = True) -> dict[str, str]:
    """Writes the Python files that load a model of a family.

    Args:
        family: The family's class.
        folder: Where to.
        pruned: Whether this file is needed.

    Returns:
        What `auto_map` in `config.json` must name, if this file is not needed; empty if transformers has the family.
    """
    remote = family.__module__.startswith(REMOTE)
    classes = [family.config_class, family] if remote else []
    found = [(sys.modules[each.__module__].__file__ or "", each) for each in classes]
    for file in {name for own, _ in found for name in (own, *get_relative_import_files(own))}:
        shutil.copyfile(file, folder / Path(file).name)
    if pruned:
        text = Path(__file__).read_text().partition(FAMILY)[0]
        if found:
            imports = "".join(f"from .{Path(own).stem} import {each.__name__}  # noqa: E402\n" for own, each in found)
            text += f"{FAMILY}{imports}\nregister({', '.join(each.__name__ for _, each in found)})\n"
        (folder / Path(__file__).name).write_text(text)
    return {auto: f"{Path(own).stem}.{each.__name__}" for auto, (own, each) in zip(NEEDED, found, strict=False)}


def cut(model: PreTrainedModel, pruned: dict[str, Any]) -> None:
    """Cuts a model to the structure in its config. Until weights are loaded, parameters keep their first values."""
    inner = model.base_model
    blocks: Any = inner.get_submodule(pruned["blocks"].removeprefix(f"{inner.base_model_prefix}."))
    for index, layer in pruned["layers"].items():
        block = blocks[int(index)]
        if "attention" in layer.get("skip", ()):
            replace(block, layer.get("attention", pruned["attention"]), NoAttention(int(index), model.config))
        if "mlp" in layer.get("skip", ()):
            replace(block, layer["mlp"], NoFFN(layer.get("returned", 0)))
        for path, width in layer.get("gather", {}).items():
            replace(block, path, Gather(block.get_submodule(path), torch.arange(width), width))
        for path, width in layer.get("scatter", {}).items():
            replace(block, path, Scatter(block.get_submodule(path), torch.arange(width), width))
        for name, shape in layer.get("shapes", {}).items():
            resize(block, name, shape)
        for path, count in layer.get("counts", {}).items():
            set_count(block, path, count)


def replace(block: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the module at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def resize(block: nn.Module, name: str, shape: list[int]) -> None:
    """Cuts the tensor with a dotted name to another shape; one that was padded beyond it, or added, is of zeros."""
    path, _, last = name.rpartition(".")
    owner: Any = block.get_submodule(path)
    old = getattr(owner, last)
    if last == "index":
        owner.index = old[: shape[0]]
        return
    like = owner.weight if old is None else old
    value = like.new_zeros(shape)
    if old is not None and all(map(int.__le__, shape, old.shape)):
        value = old[tuple(slice(n) for n in shape)].clone()
    if old is not None and not isinstance(old, nn.Parameter):
        setattr(owner, last, value)  # stays a buffer
        return
    setattr(owner, last, nn.Parameter(value.detach(), requires_grad=like.requires_grad))
    if last == "weight" and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = shape
    elif last == "weight" and hasattr(owner, "nf"):  # GPT-2's transposed Conv1D
        owner.nx, owner.nf = shape


def set_count(block: nn.Module, path: str, count: int) -> None:
    """Sets an attribute that the forward pass reads; an attribute of a `config` changes for this block alone."""
    owner, _, attribute = path.rpartition(".")
    if owner.endswith(".config"):
        holder: Any = block.get_submodule(owner.removesuffix(".config"))
        holder.config = BlockConfig(holder.config, **{attribute: count})
    else:
        setattr(block.get_submodule(owner), attribute, count)


class Gather(nn.Module):
    """A projection that reads only some of its inputs: the consumer of ragged value channels.

    Args:
        linear: The projection of the inputs that are read.
        index: Indices of these inputs.
        in_features: Width of the full input.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, index: Tensor, in_features: int) -> None:
        super().__init__()
        self.linear, self.in_features = linear, in_features
        self.register_buffer("index", index, persistent=True)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., d_out]
        return self.linear(x.index_select(-1, self.index))


class Scatter(nn.Module):
    """A projection that computes only some of its outputs, and zeros for the others: the producer of ragged channels.

    Args:
        linear: The projection to the outputs that are computed.
        index: Indices of these outputs.
        out_features: Width of the full output.
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
    """Replaces a dropped attention sub-block, and returns zeros.

    It stores an entry of width one in the cache, because the cache reads the sequence length from its first layer;
    without an entry, all positions would be wrong.

    Args:
        layer_idx: Index of the block.
        config: The model's. vLLM looks at it, and for one call of the attention interface in the source of `forward`,
            and refuses models with a block that has neither.
    """

    names = ("cache", "past_key_values", "layer_past")  # of the cache, in different families and releases

    def __init__(self, layer_idx: int, config: Any = None) -> None:
        super().__init__()
        self.layer_idx, self.config = layer_idx, config

    def forward(self, hidden_states: Tensor, *_: Any, **passed: Any) -> tuple[Tensor, None]:
        cache = next((passed[name] for name in self.names if passed.get(name) is not None), None)
        if cache is not None:
            batch, length, _width = hidden_states.shape
            entry = hidden_states.new_zeros(batch, 1, length, 1)
            cache.update(entry, entry, self.layer_idx)
        if self.layer_idx is None:  # never
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            attend(self, hidden_states, hidden_states, hidden_states, None)
        return torch.zeros_like(hidden_states), None


class NoFFN(nn.Module):
    """Replaces a dropped FFN, or a mixture of experts, and returns zeros.

    Args:
        returned: Length of the tuple to return, whose first is the zeros; 0 for these alone.
    """

    def __init__(self, returned: int = 0) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return returned(torch.zeros_like(hidden_states), self.returned)


def returned(hidden: Tensor, length: int) -> Any:
    """What a block or sub-block returns: its output as the first of a tuple of some length, or alone if that is 0."""
    return (hidden, *[None] * (length - 1)) if length else hidden


class BlockConfig:
    """A view of the model's config with different values for one block."""

    def __init__(self, base: Any, **values: Any) -> None:
        self.__dict__.update(values, _base=base)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_base"], name)
