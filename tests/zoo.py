"""A tiny random model of every causal language model that the installed transformers has, from its default config.

A config is shrunk by the names of its sizes (:data:`SMALL`), nested configs too. Few types need more than that
(:data:`SPECIAL`). Encoders that can decode are built as decoders.
"""

import functools
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
SIZES = """
300: vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size
64: hidden_size n_embd d_model attention_hidden_size embedding_size word_embed_proj_dim emb_dim embedding_dim
lru_width input_embedding_size output_embedding_size hidden_size_global backbone_hidden_size
96: intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner d_inner dim_ff dff
feed_forward_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size d_ff
48: moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
shared_experts_intermediate_size moe_shared_expert_intermediate_size
4: num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
num_encoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads
encoder_attention_heads swa_num_attention_heads num_decoder_attention_heads num_encoder_attention_heads
attention_heads mamba_n_heads mamba_num_heads linear_num_heads qk_rope_head_dim linear_num_value_heads
zero_expert_num
2: num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups o_groups linear_num_key_heads
index_n_heads num_experts_per_tok num_experts_per_token moe_k moe_topk n_group num_expert_group n_mamba_heads
16: head_dim attention_head_dim kv_channels d_head dim_head swa_head_dim linear_head_dim linear_key_head_dim
linear_value_head_dim index_head_dim v_head_dim d_kv attention_head_size qk_head_dim o_lora_rank mamba_d_state
ssm_state_size state_size hidden_size_per_layer_input router_hidden_size
12: qk_nope_head_dim
24: kv_lora_rank
20: q_lora_rank
8: index_topk num_experts n_routed_experts num_local_experts moe_num_experts mamba_chunk_size chunk_size
time_step_rank mamba_dt_rank sliding_window sliding_window_size local_attention attention_window_size
window_size attention_chunk_size rotary_dim laurel_rank adapter_rank
1: topk_group num_kv_shared_layers
32: mamba_d_head mamba_head_dim mamba_headdim
128: mamba_d_ssm max_position_embeddings n_positions max_seq_len n_ctx max_target_positions model_max_length
"""


def _sizes() -> dict[str, int]:
    """The largest value of each key."""
    sizes, size = {}, 0
    for word in SIZES.split():
        if word.endswith(":"):
            size = int(word[:-1])
        else:
            sizes[word] = size
    return sizes


SMALL = _sizes()
ENCODERS = frozenset(
    [
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "marian",
        "mbart",
        "megatron-bert",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
        "musicgen",
        "musicgen_melody",
        "moshi",
    ]
)  # encoders, encoder-decoders and models of audio, which can decode


ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4}
ZAMBA |= {"attention_hidden_size": 128, "attention_head_dim": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": ROPE},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 32},
    "hunyuan_v1_dense": {"head_dim": 16},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * LAYERS},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "hy_v4": {"indexer_types": ["full"] * LAYERS},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "num_hidden_layers": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 200,
        "hc_lowrank": 8,
    },
    "zamba": ZAMBA,
    "zamba2": ZAMBA
    | {"hybrid_layer_ids": [1, 3], "n_mamba_heads": 4, "mamba_headdim": 32, "kv_channels": 16, "num_query_groups": 4},
}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config, made small by their names; lists by layer keep a layer of each kind."""
    depth = next((values[k] for k in DEPTHS if isinstance(values.get(k), int)), 0)
    own = values.get("per_layer_config") or {}
    by_layer = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == depth and depth > LAYERS}
    kinds: dict[str, int] = {}
    for i in range(depth if by_layer else 0):
        kinds.setdefault(str([[v[i] for v in by_layer.values()], own.get(f"{i:02}")]), i)
    chosen = sorted(kinds.values())[:LAYERS]
    chosen = sorted([*chosen, *[i for i in range(depth) if i not in chosen][: LAYERS - len(chosen)]])
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key == "per_layer_config" and value:
            small[key] = {f"{n:02}": shrink(value[f"{i:02}"]) for n, i in enumerate(chosen) if f"{i:02}" in value}
        elif isinstance(value, dict) and key not in ("rope_parameters", "quantization_config"):
            small[key] = shrink(value)
        elif key in by_layer:
            small[key] = [min(value[i], SMALL[key]) if key in SMALL else value[i] for i in chosen]
        elif isinstance(value, bool) or value is None:
            small[key] = value
        elif key in SMALL and isinstance(value, int) and value > SMALL[key]:
            small[key] = SMALL[key]
        elif isinstance(key, str) and key.endswith(("_token_id", "_token_index")):
            small[key] = {"pad": 0, "bos": 1, "eos": 2}.get(key[:3], 3)
        else:
            small[key] = value
    if values.get("num_key_value_heads") == values.get("num_attention_heads") and "num_attention_heads" in values:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_rope_head_dim" in small and values.get("head_dim") == values["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    return small | SPECIAL.get(values.get("model_type", ""), {})


@functools.cache
def config_of(model_type: str) -> dict[str, Any]:
    config = CONFIG_MAPPING[model_type]()
    return shrink(config.to_dict())


def build(model_type: str, seed: int = 0, **own: Any) -> PreTrainedModel:
    """A tiny random model of a type, float32, in evaluation mode."""
    decoding = {"is_decoder": True} if model_type in ENCODERS else {}
    config = CONFIG_MAPPING[model_type].from_dict({**config_of(model_type), **decoding, **own})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def decoders() -> list[str]:
    """All types of causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
