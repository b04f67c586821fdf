"""Builds the `config.json` of a pruned model, and models without weights from a configuration or a plan.

If the family's class can hold the pruned sizes, the configuration is the family's. If it cannot, `config.json` lists
the sizes, and a copy of `modeling_plprune.py` makes transformers resize the family's class.
"""

import contextlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.config_keys import size_keys
from plprune.architecture.modeling_plprune import (
    Gather,
    PrunedConfig,
    PrunedConfigMixin,
    PrunedModelMixin,
    Scatter,
    config_class,
    is_wrapper,
    loader_of,
    model_class,
)
from plprune.architecture.modules import saved_buffers, without_weights
from plprune.architecture.wrappers import auto_class, text_config, with_sizes
from plprune.pruning.plan import PruningPlan
from plprune.pruning.surgery import apply, config_of_the_rest, plan_of

BIASES: list[dict[str, bool]] = [
    {},
    {"mlp_bias": True},
    {"attention_bias": True},
    {"attention_bias": True, "mlp_bias": True},
]


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model without weights: parameters on the meta device, buffers computed from the config on the CPU."""
    with without_weights():
        return auto_class(type(config)).from_config(config, dtype=dtype)


def pruned_skeleton(plan: PruningPlan, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model without weights, in the structure of a plan."""
    model = skeleton(config_from(plan.config), dtype)
    apply(model, plan)
    return model


def config_from(values: dict[str, Any]) -> PreTrainedConfig:
    """The configuration, of a dense or a pruned model, in a dictionary with its `model_type`."""
    pruned = values["model_type"] == PrunedConfig.model_type
    return (PrunedConfig if pruned else CONFIG_MAPPING[values["model_type"]]).from_dict(dict(values))


def saved_config(model: PreTrainedModel) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """The configuration to save a model with, and the zero biases that its class expects in addition."""
    if plan_of(model) is None:
        return model.config, {}
    stock = stock_config(model)
    if stock is None:
        return pruned_config(model), {}
    state = model.state_dict()
    expected = skeleton(stock).named_parameters()
    added = [(name, p.shape) for name, p in expected if name not in state and name.endswith(".bias")]
    return stock, {name: torch.zeros(shape, dtype=model.dtype) for name, shape in added}


def stock_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """The configuration that gives the family's class the structure of a pruned model; None if there is none.

    The class may have more biases than the model; they are saved as zeros.
    """
    sizes = config_sizes(model)
    if "per_layer_config" in sizes:
        return None
    values = config_of_the_rest(model)
    for biases in BIASES:
        if not all(hasattr(text_config(model.config), key) for key in biases):
            continue
        with contextlib.suppress(ValueError, StrictDataclassError):
            config = config_from(with_sizes(values, sizes | biases, type(model.config)))
            if _same_structure(model, skeleton(config)):
                return config
    return None


def pruned_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of :mod:`plprune.architecture.modeling_plprune`, which lists the sizes of each block."""
    values = config_of_the_rest(model)
    config = config_class(CONFIG_MAPPING[values["model_type"]])
    own = {"base_model_type": values["model_type"], "pruned": pruned_structure(model)}
    if "per_layer_config" in values or is_wrapper(type(model.config)):
        # sizes by layer are the family's own, from which its class is built before it is cut, or of one decoder alone
        return config.from_dict(values | own)
    keys, blocks = size_keys(model), blocks_of(model)
    sizes = {str(block.index): _block_sizes(block, blocks, keys) for block in blocks}
    return config.from_dict(values | own | {"per_layer_config": sizes, "allow_global_per_layer_attribute_access": True})


def make_savable(model: PreTrainedModel) -> None:
    """Changes config and class of a model built from its plan so that `save_pretrained` writes it correctly."""
    (config, biases), own = saved_config(model), model.config.__dict__
    if not isinstance(config, PrunedConfigMixin) and not biases:
        sizes = {key: getattr(text_config(config), key) for key in config_sizes(model)}
        text_config(model.config).__dict__.update(sizes)
        return
    if not isinstance(config, PrunedConfigMixin):
        config = pruned_config(model)
    cast(Any, model.config).__class__ = type(config)
    own |= {key: value for key, value in config.__dict__.items() if key not in own}
    cast(Any, model).__class__ = model_class(loader_of(type(config).__mro__[2]), type(config))


def pruned_structure(model: PreTrainedModel) -> dict[str, Any]:
    """The differences between a pruned model and the dense one, as `modeling_plprune.py` reads them."""
    before = blocks_of(skeleton(config_from(config_of_the_rest(model))))
    usual = before[0].anatomy.mixer
    layers = {str(b.index): _difference(b, dense, usual) for b, dense in zip(blocks_of(model), before, strict=True)}
    return {
        "blocks": before[0].path.rpartition(".")[0],
        "attention": usual,
        "layers": {index: difference for index, difference in layers.items() if difference},
    }


def config_sizes(model: PreTrainedModel) -> dict[str, Any]:
    """The sizes of a pruned model for `config.json`: one for all blocks, or `per_layer_config` if they differ."""
    keys, blocks = size_keys(model), blocks_of(model)
    sizes = [_block_sizes(block, blocks, keys) for block in blocks]
    # Some families would compute it as the width divided by the number of heads, which pruning changes.
    dims = {block.head_dim for block in blocks if block.has_attention}
    head_dim = {keys["head_dim"]: dims.pop()} if len(dims) == 1 and "head_dim" in keys else {}
    found = {key: {size[key] for size in sizes if key in size} for key in keys.values()}
    common = {key: values.pop() for key, values in found.items() if len(values) == 1}
    dropped = any((b.anatomy.attention is not None and not b.has_attention) or not b.has_ffn for b in blocks)
    # Where blocks are of several kinds, what is not common may be as the dense model's config has it.
    if not dropped and (len({id(block.anatomy) for block in blocks}) > 1 or all(size == sizes[0] for size in sizes)):
        return common | head_dim
    return head_dim | {"per_layer_config": {str(i): size for i, size in enumerate(sizes)}}


def _block_sizes(block: Block, blocks: Sequence[Block], keys: Mapping[Any, str]) -> dict[str, Any]:
    sizes: dict[str, Any] = {keys["width"]: block.channels} if "width" in keys else {}
    if any(each.anatomy.experts for each in blocks):  # FFNs and shared experts have widths of their own
        first = next((len(each.ffn) for each in blocks if each.anatomy.ffn), 0)
        sizes = sizes if block.anatomy.ffn and len(block.ffn) == first else {}
        if block.expert_count:
            own = {"experts": block.expert_count, "expert_width": block.expert_width}
            sizes |= {keys[what]: count for what, count in own.items() if what in keys}
    gone = [*(["attention"] * (not block.has_attention)), *(["mlp"] * (not block.has_ffn))]
    if not block.has_ffn:
        sizes = {}
    if gone:
        sizes["skip"] = gone
    if not block.has_attention:
        return sizes
    heads = {"heads": block.kv_heads * block.queries_per_head, "kv_heads": block.kv_heads}
    return sizes | {keys[what]: count for what, count in heads.items() if what in keys}


def _difference(block: Block, dense: Block, usual: str) -> dict[str, Any]:
    """The parts of a block that differ from the dense one; `usual` is the path of most blocks' attention."""
    before = {name: list(value.shape) for name, value in dense.module.state_dict().items()}
    now = {name: list(value.shape) for name, value in block.module.state_dict().items()}
    own: dict[str, Any] = {"shapes": {name: shape for name, shape in now.items() if before.get(name) != shape}}
    counts = [*(block.attention.counts if block.has_attention else ())]
    if block.expert_count:
        counts += [*block.experts.units.counts, *block.experts.channels.counts]
    own["counts"] = {path: n for path in counts if (n := _count(block, path)) != _count(dense, path)}
    if block.has_attention:
        parts = {path: block.part(path) for path in block.attention_paths}
        own["gather"] = {path: part.in_features for path, part in parts.items() if isinstance(part, Gather)}
        own["scatter"] = {path: part.out_features for path, part in parts.items() if isinstance(part, Scatter)}
    elif dense.has_attention:
        own["skip"] = ["attention"]
        own["attention"] = "" if dense.anatomy.mixer == usual else dense.anatomy.mixer
    if not block.has_ffn and dense.anatomy.whole_ffn:
        own["skip"] = [*own.get("skip", []), "mlp"]
        own |= {"mlp": dense.anatomy.whole_ffn.path, "returned": dense.anatomy.whole_ffn.returned}
    return {key: value for key, value in own.items() if value}


def _count(block: Block, path: str) -> int:
    return operator.attrgetter(path)(block.module)


def _same_structure(model: PreTrainedModel, stock: PreTrainedModel) -> bool:
    """Whether two models compute the same from the same parameters, apart from biases that only `stock` has."""
    theirs, ours = dict(stock.named_modules()), dict(model.named_modules())
    sizes = set(size_keys(model).values())  # modules keep these for information only
    return theirs.keys() == ours.keys() and all(_same_module(ours[name], theirs[name], sizes) for name in theirs)


def _same_module(module: nn.Module, stock: nn.Module, sizes: set[str]) -> bool:
    tensors, others = _tensors(module), _tensors(stock)
    computed = dict(stock.named_buffers(recurse=False)).keys() - saved_buffers(stock).keys()
    return (
        (type(module) is type(stock) or isinstance(module, PrunedModelMixin))
        and _constants(module, sizes) == _constants(stock, sizes)
        and {name: t.shape for name, t in tensors.items()}
        == {name: t.shape for name, t in others.items() if name in tensors or name != "bias"}
        and all(torch.equal(tensors[name], stock.get_buffer(name)) for name in computed)
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _constants(module: nn.Module, sizes: set[str]) -> dict[str, Any]:
    """The numbers and strings that a module keeps as attributes, without `sizes`."""
    if isinstance(module, PreTrainedModel):
        return {}
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in {"training", *sizes}}
    return {name: value for name, value in own.items() if isinstance(value, int | float | str | None)}
