"""The names of a decoder block's parts, for each model family. A new family is one record in this file.

To write the record, read the family's modelling file in transformers and answer:

- Which module names differ from Llama's?
- Which head counts or widths does the forward pass read from attributes instead of the weights (`counts`)?
- Which norms are as wide as all heads together (`qk_norms`)?
- How does the config name the sizes (`config_keys`)?

Then add a tiny config to `tests/builders.py`. The tests run on every family in :data:`FAMILIES`, and report errors in
the record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedConfig

Count = Literal["heads", "kv_heads", "query_width"]


@dataclass(frozen=True)
class Family:
    """Dotted paths of modules, relative to one decoder block (`blocks`: relative to the model).

    Args:
        blocks: The list of decoder blocks.
        qkv: Query, key and value projections; the same path three times if they are fused.
        interleaved: Whether a fused projection is ordered by head, instead of all queries, all keys, all values.
        qk_norms: Norms of queries and keys over all heads together. After pruning, they cover the remaining heads.
        output: The projection that consumes the heads.
        ffn_in: The projections that produce the FFN channels; the same path twice if gate and up are fused.
        ffn_out: The projection that consumes the FFN channels.
        attention: The attention sub-block. Its `num_key_value_groups`, if any, gives the query heads per kv head.
        head_dim: The attribute of the attention sub-block with the dimension of a head.
        counts: Attributes that the forward pass reads instead of the weights' shapes, and what each holds: the number
            of `heads` or `kv_heads`, or the `query_width` of all heads. A `config` in a path becomes a view of the
            config for that block alone.
        config_keys: The keys of `config.json` for the FFN's width, the numbers of heads and their dimension.
    """

    blocks: str = "model.layers"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False
    qk_norms: tuple[str, str] | tuple[()] = ()
    output: str = "self_attn.o_proj"
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_out: str = "mlp.down_proj"
    attention: str = "self_attn"
    head_dim: str = "head_dim"
    counts: Mapping[str, Count] = field(default_factory=dict)
    config_keys: Mapping[Literal["width", "heads", "kv_heads", "head_dim"], str] = field(
        default_factory=lambda: {
            "width": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
        }
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(
        qkv=("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj"),
        ffn_in=("mlp.gate_up_proj", "mlp.gate_up_proj"),
        counts={"self_attn.config.num_attention_heads": "heads", "self_attn.num_key_value_heads": "kv_heads"},
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        output="self_attn.out_proj",
        ffn_in=("fc1",),
        ffn_out="fc2",
        counts={"self_attn.num_heads": "heads"},
        config_keys={"width": "ffn_dim", "heads": "num_attention_heads"},
    ),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        qkv=("attention.query_key_value", "attention.query_key_value", "attention.query_key_value"),
        interleaved=True,
        output="attention.dense",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        attention="attention",
        head_dim="head_size",
        config_keys={"width": "intermediate_size", "heads": "num_attention_heads"},
    ),
    "gpt2": Family(
        blocks="transformer.h",
        qkv=("attn.c_attn", "attn.c_attn", "attn.c_attn"),
        output="attn.c_proj",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        attention="attn",
        counts={"attn.num_heads": "heads", "attn.split_size": "query_width"},
        config_keys={"width": "n_inner", "heads": "n_head"},
    ),
    "phi": Family(output="self_attn.dense", ffn_in=("mlp.fc1",), ffn_out="mlp.fc2"),
    "olmo2": Family(qk_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "granite": Family(),
    "smollm3": Family(),
    "cohere2": Family(),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The record for a model's `config.model_type`.

    Raises:
        ValueError: The family is not in :data:`FAMILIES`, or the model is a mixture of experts.
    """
    if any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ValueError(
            f"{config.model_type!r} is a mixture of experts, which plprune does not prune; "
            f"use a dense model of one of these families: {', '.join(FAMILIES)}"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"unknown model family {config.model_type!r}; supported: {', '.join(FAMILIES)}. "
            "To support another, add a record to FAMILIES in plprune/architecture/families.py"
        )
    return FAMILIES[config.model_type]
