"""What each graph of llama.cpp computes, and how each family is written for it.

llama.cpp has one hand-written graph per architecture. :data:`ARCHS` records which shapes each computes, according to
its source and tests with xllamacpp 2026.10; :data:`LAYOUTS` records how each family's weights are converted. A new
architecture or family is a new record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gguf
from gguf import Keys

from plprune.export.mixtures import Mixture

QKV, FFN_IN = ("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")
ALL = frozenset({*QKV, "attn_output", *FFN_IN, "ffn_down"})


@dataclass(frozen=True)
class Arch:
    """The models that a graph of llama.cpp computes.

    Args:
        biases: Projections that may have a bias.
        per_block: Whether blocks may differ in widths and heads.
        skips: Whether blocks may lack attention.
        normal: Whether rotary pairs are neighbours.
        factors: Whether it reads a factor per rotary frequency, which the scalings of Llama 3 and Phi 3 need.
        partial: Whether some dimensions of a head may be unrotated.
        windows: Period of blocks with full attention among blocks with a sliding window, unless a file lists them; 0 if
            there are no windows.
        yarn: Whether YaRN may scale the blocks without a sliding window alone.
        alone: Whether each query head must have a kv head of its own.
        latent: Whether attention is latent.
        convolutions: Whether some blocks have a short convolution in the place of attention.
        delta: Whether some blocks have linear attention by the gated delta rule.
        kinds: Whether kinds of attention differ in head size and blocks may share keys and values, as in Gemma 4.
        depths: Numbers of blocks at which the graph computes something else.
        fills: Whether heads times head dimension must equal the hidden size.
        head: Whether the output head may be tied to the embedding, must have its own weights or must be tied.
        scaled: Whether it applies the factors of a layout's `scales`.
        fused: Projections that are one tensor.
        broad: Number of blocks at which attention is scaled by hidden size over heads instead of head dimension.
        mixture: The experts that blocks may have.
    """

    biases: frozenset[str] = frozenset(QKV)
    per_block: bool = False
    skips: bool = False
    normal: bool = False
    factors: bool = False
    partial: bool = False
    windows: int = 0
    yarn: bool = False
    alone: bool = False
    latent: bool = False
    convolutions: bool = False
    delta: bool = False
    kinds: bool = False
    depths: tuple[int, ...] = ()
    fills: bool = False
    head: Literal["any", "own", "tied"] = "any"
    scaled: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    broad: int = 0
    mixture: Mixture | None = None


ARCHS: dict[str, Arch] = {
    "llama": Arch(biases=ALL, normal=True, factors=True, mixture=Mixture()),
    "deci": Arch(biases=ALL, per_block=True, skips=True, normal=True, factors=True),
    "qwen2": Arch(fills=True),
    "qwen3": Arch(),
    "openelm": Arch(biases=frozenset(), per_block=True, head="tied", fused={"attn_qkv": QKV}),
    "phi3": Arch(factors=True, partial=True, fills=True, fused={"attn_qkv": QKV, "ffn_up": FFN_IN}),
    "gemma2": Arch(windows=2, head="tied", broad=46),
    "gemma3": Arch(windows=6, broad=62),
    "gptneox": Arch(biases=ALL, partial=True, fills=True, head="own", fused={"attn_qkv": QKV}),
    "gpt2": Arch(biases=ALL, fills=True, fused={"attn_qkv": QKV}),
    "phi2": Arch(biases=ALL, partial=True, fills=True, head="own"),
    "olmo2": Arch(fills=True, head="own", windows=4, yarn=True),
    "granite": Arch(biases=ALL, normal=True, factors=True, scaled=True),
    "smollm3": Arch(normal=True),
    "cohere2": Arch(normal=True, windows=4, fills=True, head="tied"),
    "qwen2moe": Arch(fills=True, head="own", mixture=Mixture(shared="width")),
    "qwen3moe": Arch(mixture=Mixture()),
    "olmoe": Arch(biases=frozenset(), alone=True, fills=True, head="own", mixture=Mixture()),
    "gpt-oss": Arch(biases=frozenset({*QKV, "attn_output"}), windows=2, head="own", mixture=Mixture(biases=True)),
    "glm4moe": Arch(partial=True, mixture=Mixture(leading=True, shared="count")),
    "glm4": Arch(normal=True, partial=True, fused={"ffn_up": FFN_IN}),
    "ernie4_5": Arch(normal=True),
    "ernie4_5-moe": Arch(normal=True, mixture=Mixture(leading=True, shared="width")),
    "dots1": Arch(alone=True, head="own", mixture=Mixture(leading=True, shared="count")),
    "seed_oss": Arch(),
    "exaone4": Arch(fills=True, factors=True, depths=(64,)),
    "granitemoe": Arch(
        biases=frozenset({*QKV, "attn_output"}), normal=True, factors=True, scaled=True, mixture=Mixture(shared="width")
    ),
    "deepseek2": Arch(
        biases=frozenset(), normal=True, partial=True, latent=True, mixture=Mixture(leading=True, shared="count")
    ),
    "lfm2": Arch(biases=frozenset(), fills=True, convolutions=True),
    "lfm2moe": Arch(biases=frozenset(), fills=True, convolutions=True, mixture=Mixture(leading=True)),
    "qwen35": Arch(biases=frozenset(), partial=True, delta=True),
    "qwen35moe": Arch(biases=frozenset(), partial=True, delta=True, mixture=Mixture(shared="width")),
    "minimax-m2": Arch(partial=True, head="own", mixture=Mixture()),
    "mistral3": Arch(biases=ALL, normal=True, factors=True),
    "hunyuan-dense": Arch(),
    "hunyuan-moe": Arch(mixture=Mixture(shared="width")),
    "arcee": Arch(normal=True, factors=True),
    "nemotron": Arch(biases=ALL, partial=True, head="own"),
    "starcoder2": Arch(biases=ALL, fills=True),
    "stablelm": Arch(partial=True, fills=True, head="own"),
    "gemma": Arch(head="tied"),
    "olmo": Arch(biases=frozenset(), normal=True, fills=True),
    "gemma4": Arch(biases=frozenset(), per_block=True, windows=6, kinds=True),
}

RMS = {"rms_norm_eps": (Keys.Attention.LAYERNORM_RMS_EPS, float)}
LAYER_NORM = {"layer_norm_eps": (Keys.Attention.LAYERNORM_EPS, float)}
WINDOW = {"sliding_window": (Keys.Attention.SLIDING_WINDOW, int)}
SILU = {"hidden_act": ("silu",)}
ROUTED = {
    "routed_scaling_factor": (Keys.LLM.EXPERT_WEIGHTS_SCALE, float),
    "norm_topk_prob": (Keys.LLM.EXPERT_WEIGHTS_NORM, bool),
}
GRANITE = {
    "embedding_multiplier": (Keys.LLM.EMBEDDING_SCALE, 1, ("token_embd",)),
    "residual_multiplier": (Keys.LLM.RESIDUAL_SCALE, 1, ("attn_output", "ffn_down")),
    "logits_scaling": (Keys.LLM.LOGIT_SCALE, -1, ("output",)),
    "attention_multiplier": (Keys.Attention.SCALE, 1, ()),  # of any family: see _query_factor
}
GROUPS = {
    "n_group": (Keys.LLM.EXPERT_GROUP_COUNT, int),
    "topk_group": (Keys.LLM.EXPERT_GROUP_USED_COUNT, int),
}
SOFTMAX = {Keys.LLM.EXPERT_GATING_FUNC: int(gguf.ExpertGatingFuncType.SOFTMAX)}
CONVOLUTION = {
    "norm_eps": (Keys.Attention.LAYERNORM_RMS_EPS, float),
    "conv_L_cache": (Keys.ShortConv.L_CACHE, int),
}
SIGMOID = {Keys.LLM.EXPERT_GATING_FUNC: int(gguf.ExpertGatingFuncType.SIGMOID)}


@dataclass(frozen=True)
class Layout:
    """How the weights and configuration of a family are written.

    Args:
        archs: Architectures, in the order in which they are tried.
        keys: Values of the configuration that are written: key and type. All must be set.
        fixed: Values of the configuration that the graphs assume.
        scales: Factors that only some graphs apply, by their names in the configuration: key, power, and the tensors
            that are multiplied by that power of the factor for the other graphs.
        gain: Number that the family adds to the weight of every norm.
        neighbours: Whether the family's rotary pairs are neighbours in transformers too.
        constants: Fields that are the same for all models of the family.
        rounded: Whether llama.cpp rounds the bounds of YaRN, which the family does not.
    """

    archs: tuple[str, ...]
    keys: Mapping[str, tuple[str, type]] = field(default_factory=lambda: RMS)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: SILU)
    scales: Mapping[str, tuple[str, int, tuple[str, ...]]] = field(default_factory=dict)
    gain: float = 0.0
    neighbours: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)
    rounded: bool = False


LATENT = Layout(
    ("deepseek2",),
    keys=RMS | ROUTED | GROUPS,
    fixed=SILU | {"rope_interleave": (True,)},
    neighbours=True,
    constants=SIGMOID,
)
LAYOUTS: dict[str, Layout] = {
    "llama": Layout(("llama", "deci")),
    "mistral": Layout(("llama", "deci")),
    "qwen2": Layout(("qwen2", "deci")),
    "qwen3": Layout(("qwen3", "openelm")),
    "phi3": Layout(("phi3", "deci")),
    "gemma2": Layout(
        ("gemma2",),
        keys=RMS
        | WINDOW
        | {
            "attn_logit_softcapping": (Keys.LLM.ATTN_LOGIT_SOFTCAPPING, float),
            "final_logit_softcapping": (Keys.LLM.FINAL_LOGIT_SOFTCAPPING, float),
        },
        fixed={"hidden_activation": ("gelu_pytorch_tanh",)},
        gain=1.0,
    ),
    "gemma3_text": Layout(
        ("gemma3",),
        keys=RMS | WINDOW,
        fixed={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        gain=1.0,
    ),
    "gpt_neox": Layout(
        ("gptneox",),
        keys=LAYER_NORM | {"use_parallel_residual": (Keys.LLM.USE_PARALLEL_RESIDUAL, bool)},
        fixed={"hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "attention_bias": (True,)},
    ),
    "gpt2": Layout(
        ("gpt2",),
        keys={"layer_norm_epsilon": (Keys.Attention.LAYERNORM_EPS, float)},
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    ),
    "phi": Layout(("phi2",), keys=LAYER_NORM, fixed={"hidden_act": ("gelu_new",), "qk_layernorm": (False,)}),
    "olmo2": Layout(("olmo2",)),
    "granite": Layout(("granite", "deci"), scales=GRANITE),
    "smollm3": Layout(("smollm3",)),
    "cohere2": Layout(
        ("cohere2",),
        keys=LAYER_NORM | WINDOW | {"logit_scale": (Keys.LLM.LOGIT_SCALE, float)},
        neighbours=True,
    ),
    "mixtral": Layout(("llama",)),
    "qwen2_moe": Layout(("qwen2moe",), fixed=SILU | {"norm_topk_prob": (False,)}),
    "qwen3_moe": Layout(("qwen3moe",), fixed=SILU | {"norm_topk_prob": (True,)}),
    "olmoe": Layout(("olmoe",), fixed=SILU | {"norm_topk_prob": (False,), "clip_qkv": (None,)}),
    "gpt_oss": Layout(
        ("gpt-oss",),
        keys=RMS | WINDOW,
        fixed={"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        rounded=True,
    ),
    "glm4_moe": Layout(("glm4moe",), keys=RMS | ROUTED, fixed=SILU | {"n_group": (1,)}, constants=SIGMOID),
    "glm4": Layout(("glm4",), neighbours=True),
    "ernie4_5": Layout(("ernie4_5",), neighbours=True),
    "ernie4_5_moe": Layout(("ernie4_5-moe",), neighbours=True, constants={Keys.LLM.INTERLEAVE_MOE_LAYER_STEP: 1}),
    "dots1": Layout(("dots1",), keys=RMS | ROUTED, fixed=SILU | {"n_group": (1,)}, constants=SIGMOID),
    "seed_oss": Layout(("seed_oss",)),
    "exaone4": Layout(("exaone4",), fixed=SILU | {"sliding_window": (None,)}),
    "olmo3": Layout(("olmo2",), keys=RMS | WINDOW),
    "granitemoe": Layout(("granitemoe",), scales=GRANITE),
    "granitemoeshared": Layout(("granitemoe",), scales=GRANITE),
    "deepseek_v2": Layout(
        ("deepseek2",),
        keys=RMS | {"routed_scaling_factor": ROUTED["routed_scaling_factor"]},
        fixed=SILU | {"topk_method": ("greedy",)},
        neighbours=True,
        constants=SOFTMAX | {Keys.LLM.EXPERT_WEIGHTS_NORM: False},
    ),
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "lfm2": Layout(("lfm2",), keys=CONVOLUTION, fixed={"conv_bias": (False,)}),
    "lfm2_moe": Layout(
        ("lfm2moe",),
        keys=CONVOLUTION,
        fixed={
            "conv_bias": (False,),
            "norm_topk_prob": (True,),
            "routed_scaling_factor": (1.0,),
            "use_expert_bias": (True,),
        },
        constants=SIGMOID,
    ),
    "qwen3_5_text": Layout(("qwen35",), gain=1.0),
    "qwen3_5_moe_text": Layout(("qwen35moe",), gain=1.0),
    "minimax_m2": Layout(("minimax-m2",), constants=SIGMOID),
    "ministral3": Layout(("mistral3",)),
    "hunyuan_v1_dense": Layout(("hunyuan-dense",)),
    "hunyuan_v1_moe": Layout(("hunyuan-moe",)),
    "arcee": Layout(("arcee",), fixed={"hidden_act": ("relu2",), "mlp_bias": (False,)}),
    "nemotron": Layout(
        ("nemotron",),
        keys={"norm_eps": (Keys.Attention.LAYERNORM_EPS, float)},
        fixed={"hidden_act": ("relu2",)},
        gain=1.0,
    ),
    "starcoder2": Layout(
        ("starcoder2",),
        keys={"norm_epsilon": (Keys.Attention.LAYERNORM_EPS, float)},
        fixed={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
    ),
    "stablelm": Layout(("stablelm",), keys=LAYER_NORM, fixed=SILU | {"qk_layernorm": (False,)}),
    "gemma": Layout(
        ("gemma",),
        fixed={"hidden_act": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False, None)},
        gain=1.0,
    ),
    "olmo": Layout(
        ("olmo",), keys={}, fixed=SILU | {"clip_qkv": (None,)}, constants={Keys.Attention.LAYERNORM_EPS: 1e-5}
    ),
    "gemma4_text": Layout(
        ("gemma4",),
        keys=RMS | WINDOW,
        fixed={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False,),
            "use_bidirectional_attention": (None, "vision"),
        },
    ),
}
