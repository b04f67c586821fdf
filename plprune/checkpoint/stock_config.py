"""Hugging Face folders that load without plprune.

Where the family's own class can hold the sizes that pruning left, the folder is a stock checkpoint. Where it cannot,
`config.json` says what was cut, and a copy of `modeling_plprune.py` makes transformers cut it likewise.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.families import family_of
from plprune.architecture.modeling_plprune import (
    Gather,
    PrunedConfig,
    PrunedConfigMixin,
    PrunedForCausalLM,
    PrunedModelMixin,
    Scatter,
    config_class,
    model_class,
)
from plprune.pruning.plan import PruningPlan
from plprune.pruning.surgery import apply, dense_config, plan_of

BIASES: list[dict[str, bool]] = [
    {},
    {"mlp_bias": True},
    {"attention_bias": True},
    {"attention_bias": True, "mlp_bias": True},
]


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model without memory: parameters on meta, buffers that are computed from the config on the CPU."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def pruned_skeleton(plan: PruningPlan, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model without memory, of the structure that a plan gives it."""
    model = skeleton(config_from(plan.config), dtype)
    apply(model, plan)
    return model


def config_from(values: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that a dictionary with its `model_type` describes, that of a pruned model too."""
    own = values["model_type"] == PrunedConfig.model_type
    return (PrunedConfig if own else CONFIG_MAPPING[values["model_type"]]).from_dict(dict(values))


def described(model: PreTrainedModel) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """The configuration by which transformers loads a model, and the zero biases it then expects besides."""
    if plan_of(model) is None:
        return model.config, {}
    stock = stock_config(model)
    if stock is None:
        return pruned_config(model), {}
    state = model.state_dict()
    everything = skeleton(stock).named_parameters()
    added = {name: p for name, p in everything if name not in state and name.endswith(".bias")}
    return stock, {name: torch.zeros(p.shape, dtype=model.dtype) for name, p in added.items()}


def stock_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """The configuration with which the family's own class has the structure of a pruned model; None if none has.

    Biases that the class adds besides may be zero.
    """
    own = sizes(model)
    if "per_layer_config" in own:
        return None
    values = dense_config(model)
    for biases in BIASES:
        if not all(hasattr(model.config, key) for key in biases):
            continue
        with contextlib.suppress(ValueError, StrictDataclassError):
            config = config_from(values | own | biases)
            if _same_structure(model, skeleton(config)):
                return config
    return None


def pruned_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration that says what pruning left of each block."""
    values = dense_config(model)
    config = config_class(CONFIG_MAPPING[values["model_type"]])
    own = {"base_model_type": values["model_type"], "pruned": structure(model), "per_layer_config": _per_layer(model)}
    return config.from_dict(values | own | {"allow_global_per_layer_attribute_access": True})


def adopt(model: PreTrainedModel) -> None:
    """Makes a model that was built by its plan one that `save_pretrained` writes as it is."""
    (config, biases), own = described(model), model.config.__dict__
    if not isinstance(config, PrunedConfigMixin) and not biases:
        own |= {key: getattr(config, key) for key in sizes(model)}
        return
    if not isinstance(config, PrunedConfigMixin):
        config = pruned_config(model)
    cast(Any, model.config).__class__ = type(config)
    own |= {key: value for key, value in config.__dict__.items() if key not in own}
    cast(Any, model).__class__ = model_class(PrunedForCausalLM, type(config))


def structure(model: PreTrainedModel) -> dict[str, Any]:
    """What distinguishes a pruned model from the one before pruning, as `modeling_plprune.py` reads it."""
    family, before = family_of(model.config), blocks_of(skeleton(config_from(dense_config(model))))
    layers = {str(b.index): _own(b, dense) for b, dense in zip(blocks_of(model), before, strict=True)}
    return {
        "blocks": family.blocks,
        "attention": family.attention,
        "layers": {index: own for index, own in layers.items() if own},
    }


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """What `config.json` says of a pruned model's sizes: one for all, or `per_layer_config` where blocks differ."""
    keys, blocks = family_of(model.config).config_keys, blocks_of(model)
    own = [_sizes(block, keys) for block in blocks]
    # Without it, some families would take the width divided by the number of heads, which pruning changes.
    dims = {block.head_dim for block in blocks if block.has_attention}
    head_dim = {keys["head_dim"]: dims.pop()} if dims and "head_dim" in keys else {}
    if all(size == own[0] for size in own) and "skip" not in own[0]:
        return own[0] | head_dim
    return head_dim | {"per_layer_config": {str(i): size for i, size in enumerate(own)}}


def _per_layer(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    keys = family_of(model.config).config_keys
    return {str(block.index): _sizes(block, keys) for block in blocks_of(model)}


def _sizes(block: Block, keys: Mapping[Any, str]) -> dict[str, Any]:
    sizes: dict[str, Any] = {keys["width"]: block.channels}
    if not block.has_attention:
        return sizes | {"skip": ["attention"]}
    heads = {"heads": block.kv_heads * block.queries_per_head, "kv_heads": block.kv_heads}
    return sizes | {keys[what]: count for what, count in heads.items() if what in keys}


def _own(block: Block, dense: Block) -> dict[str, Any]:
    """What one block has that it did not have before."""
    before = {name: list(value.shape) for name, value in dense.module.state_dict().items()}
    now = {name: list(value.shape) for name, value in block.module.state_dict().items()}
    own: dict[str, Any] = {"shapes": {name: shape for name, shape in now.items() if before.get(name) != shape}}
    if block.has_attention:
        own["counts"] = {path: _count(block, path) for path in block.family.counts}
        own["counts"] = {path: n for path, n in own["counts"].items() if n != _count(dense, path)}
        parts = {path: block.part(path) for path in block.attention_paths}
        own["gather"] = {path: part.in_features for path, part in parts.items() if isinstance(part, Gather)}
        own["scatter"] = {path: part.out_features for path, part in parts.items() if isinstance(part, Scatter)}
    elif dense.has_attention:
        own["skip"] = ["attention"]
    return {key: value for key, value in own.items() if value}


def _count(block: Block, path: str) -> int:
    value: Any = block.module
    for name in path.split("."):
        value = getattr(value, name)
    return cast(int, value)


def _same_structure(model: PreTrainedModel, stock: PreTrainedModel) -> bool:
    """Whether two models compute the same with the same parameters, but for biases that only `stock` has."""
    there, here = dict(stock.named_modules()), dict(model.named_modules())
    sizes = set(family_of(model.config).config_keys.values())  # which modules keep for information only
    return there.keys() == here.keys() and all(_alike(here[name], there[name], sizes) for name in there)


def _alike(module: nn.Module, stock: nn.Module, sizes: set[str]) -> bool:
    tensors, others = _tensors(module), _tensors(stock)
    return (
        (type(module) is type(stock) or isinstance(module, PrunedModelMixin))
        and _plain(module, sizes) == _plain(stock, sizes)
        and {name: t.shape for name, t in tensors.items()}
        == {name: t.shape for name, t in others.items() if name in tensors or name != "bias"}
        and all(torch.equal(tensors[name], value) for name, value in stock.named_buffers(recurse=False))
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _plain(module: nn.Module, sizes: set[str]) -> dict[str, Any]:
    """The numbers and names by which a module computes."""
    if isinstance(module, PreTrainedModel):
        return {}
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in {"training", *sizes}}
    return {name: value for name, value in own.items() if isinstance(value, int | float | str | None)}
