r"""DeciLM folders (`block_configs`), read by vLLM, SGLang, TensorRT-LLM, mlx-lm and llama.cpp's converter.

Blocks may differ in FFN width, and may lack attention or FFN. The format stores the FFN width W as a factor m,
and programs compute W from m:

.. math:: m = \frac{3 W}{2 d}, \qquad W = \lceil \lfloor 2 m d / 3 \rfloor \rceil_{256}

where d is the model width and the outer brackets round up to a multiple of 256.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modeling_plprune import Gather, Scatter
from plprune.architecture.modules import innermost, tied
from plprune.checkpoint.weights import SINGLE, check_values, tensor_entries
from plprune.export import configuration_decilm
from plprune.io.atomic import staged

MULTIPLE = 256
FAMILIES = ("llama",)  # those whose blocks compute the same as DeciLM's
PER_BLOCK = ("intermediate_size", "num_key_value_heads", "per_layer_config", "allow_global_per_layer_attribute_access")
OURS = ("pruned", "auto_map", "base_model_type")


def refusals(model: PreTrainedModel) -> list[str]:
    """The reasons why the format cannot hold a model, with the settings to change; empty if it can."""
    blocks, config = blocks_of(model), model.config
    if config.model_type not in FAMILIES:
        return [f"DeciLM's blocks are Llama's, and this is {config.model_type}: prune a model of {', '.join(FAMILIES)}"]
    heads, kv_heads = config.num_attention_heads, {b.kv_heads for b in blocks if b.has_attention}
    reasons = []
    if not blocks[0].has_attention:
        reasons.append("block 0 has no attention: prune with serve_on [decilm], which keeps it")
    if any(b.has_attention and b.kv_heads * b.queries_per_head != heads for b in blocks) or len(kv_heads) > 1:
        reasons.append("query heads were removed: leave attention alone (FASP: attention none; FLAP: structure UL-MM)")
    if any(isinstance(m, Gather | Scatter) for m in model.modules()):
        reasons.append("value channels are ragged: export with --widen, or prune by FASP with attention none")
    if any(innermost(b.part(path)).bias is not None for b in blocks for path in b.projections):
        reasons.append("there are biases: prune with `repair` none, or restore with `bias` false")
    odd = sorted({width for b in blocks if (width := b.channels) % MULTIPLE})
    if odd:
        named = ", ".join(map(str, odd[:3])) + (" and more" if odd[3:] else "")
        reasons.append(
            f"FFN widths {named} are not multiples of {MULTIPLE}: "
            f"prune with serve_on [decilm], or export with --pad_to {MULTIPLE}"
        )
    return reasons


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, overwrite: bool = False
) -> None:
    """Writes a folder in DeciLM's format, whole or not at all.

    Args:
        model: A dense or pruned model.
        tokenizer: Saved beside the model.
        folder: The folder to write.
        overwrite: Whether to replace its content.

    Raises:
        ValueError: The format cannot hold the model; the message gives every reason.
        FileExistsError: The folder is not empty.
    """
    if reasons := refusals(model):
        raise ValueError(f"DeciLM cannot hold this model: {'; '.join(reasons)}")
    with staged(folder, overwrite) as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(config_of(model), indent=2, sort_keys=True) + "\n")
        shutil.copyfile(configuration_decilm.__file__, temporary / Path(configuration_decilm.__file__).name)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        weights = _weights(model)
        save_file(weights, temporary / SINGLE, metadata={"format": "pt"})
        check_values(temporary, weights.items())
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """The content of `config.json` in DeciLM's format."""
    values = model.config.to_dict()
    for key in PER_BLOCK + OURS:
        values.pop(key, None)
    rope = values.get("rope_parameters") or {}
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return values | {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaling,
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{configuration_decilm.__name__.rpartition('.')[2]}.DeciLMConfig"},
        "block_configs": [block_config(b, model.config.hidden_size) for b in blocks_of(model)],
        "dtype": str(model.dtype).removeprefix("torch."),
        "tie_word_embeddings": tied(model),
    }


def block_config(block: Block, hidden_size: int) -> dict[str, dict[str, Any]]:
    """The entry of one block in DeciLM's configuration."""
    attention = block.has_attention
    return {
        "attention": {
            "no_op": not attention,
            "replace_with_linear": False,
            "n_heads_in_group": block.queries_per_head if attention else None,
        },
        "ffn": {
            "no_op": not block.has_ffn,
            "replace_with_linear": False,
            "ffn_mult": 3 * block.channels / (2 * hidden_size) if block.has_ffn else None,
        },
    }


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """The FFN width that programs compute from a block's multiple.

    Example:
        >>> width_of(3 * 7936 / (2 * 4096), 4096)
        7936
    """
    return -(-int(2 * ffn_mult * hidden_size / 3) // MULTIPLE) * MULTIPLE


def check(folder: Path) -> None:
    """Checks that the weights in a folder have the shapes that its `config.json` gives the blocks.

    Raises:
        ValueError: A weight is missing, has another shape, or does not belong to the format.
    """
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: list(entry.shape) for name, entry in tensor_entries([folder / SINGLE]).items()}
    for name, shape in _expected(config).items():
        if shapes.pop(name, None) != shape:
            raise ValueError(f"{folder}: {name} is not {shape}")
    if left := [name for name in shapes if ".layers." in name]:
        raise ValueError(f"{folder}: {left[0]} has no place in the format")


def _expected(config: dict[str, Any]) -> dict[str, list[int]]:
    """The shapes of the blocks' weights according to the configuration."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    hd, shapes = config.get("head_dim") or d // heads, {}
    for i, block in enumerate(config["block_configs"]):
        prefix, own = f"model.layers.{i}.", dict[str, list[int]]()
        if not block["ffn"]["no_op"]:
            width = width_of(block["ffn"]["ffn_mult"], d)
            own |= {f"mlp.{name}_proj.weight": [width, d] for name in ("gate", "up")}
            own |= {"mlp.down_proj.weight": [d, width], "post_attention_layernorm.weight": [d]}
        if not block["attention"]["no_op"]:
            kv = heads // block["attention"]["n_heads_in_group"] * hd
            own |= {f"self_attn.{n}_proj.weight": [rows, d] for n, rows in (("q", heads * hd), ("k", kv), ("v", kv))}
            own |= {"self_attn.o_proj.weight": [d, heads * hd], "input_layernorm.weight": [d]}
        shapes |= {prefix + name: shape for name, shape in own.items()}
    return shapes


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights, with one name for tied ones, without the norms of removed attentions and FFNs."""
    blocks = blocks_of(model)
    gone = [f"{b.path}.input_layernorm" for b in blocks if not b.has_attention]
    gone += [f"{b.path}.post_attention_layernorm" for b in blocks if not b.has_ffn]
    own = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    return {name: value for name, value in own.items() if not name.startswith(tuple(gone))} if gone else own
