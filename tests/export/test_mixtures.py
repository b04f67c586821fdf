"""GGUF files of mixtures of experts: the same model in llama.cpp, or a refusal that says what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from plprune import CFSP, FASP, REAP, PruningMethod, prune
from plprune.architecture.blocks import blocks_of
from plprune.export import gguf
from tests.builders import tokenizer, windows
from tests.export.test_gguf import check, fields, keep_units, needs_llama_cpp, written
from tests.zoo import build

YARN = {"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 32.0, "original_max_position_embeddings": 4096}
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True, "head_dim": 24},
    "olmoe": {},
    "gpt_oss": {"rope_parameters": YARN | {"truncate": True}},
    "glm4_moe": {"first_k_dense_replace": 1, "use_qk_norm": True, "routed_scaling_factor": 1.5},
}
MORE: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {},
    "dots1": {"routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "granitemoe": {},
    "granitemoeshared": {
        "shared_intermediate_size": 48,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "minimax_m2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "hunyuan_v1_moe": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "deepseek_v2": {"topk_method": "greedy", "q_lora_rank": 20, "first_k_dense_replace": 1},
    "deepseek_v3": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    "glm4_moe_lite": {},
    "qwen3_5_moe_text": {},
}
ALL = [*SETTINGS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]
COUNTED = ("dots1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite")  # shared experts are as wide as some others
NARROW = ["mixtral", "qwen2_moe", "olmoe", *(kind for kind in MORE if kind not in COUNTED)]
REST = {
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
    "ernie4_5_moe": "ernie4_5-moe",
    "granitemoeshared": "granitemoe",
    "minimax_m2": "minimax-m2",
    "hunyuan_v1_moe": "hunyuan-moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "qwen3_5_moe_text": "qwen35moe",
}
EXPERTS = REAP(0.25, sparsity_of="experts")
CHANNELS = FASP(0.2, attention="none", bias=False)


def mixture(kind: str, **own: Any) -> PreTrainedModel:
    """A tiny model whose router decides, and whose biases and norms are not those that it starts with."""
    model = build(kind, **{**(SETTINGS | MORE)[kind], **own})
    torch.manual_seed(1)
    kinds = ("correction", "expert_bias")
    corrections = {name: value for name, value in model.state_dict().items() if any(kind in name for kind in kinds)}
    for name, value in {**dict(model.named_parameters()), **corrections}.items():
        added = value.ndim == 1 or name in corrections
        value.data.copy_(value.data + 0.1 * torch.randn_like(value) if added else 6 * value.data)
    return model


def pruned(kind: str, method: PruningMethod, **own: Any) -> PreTrainedModel:
    model = mixture(kind, **own)
    prune(model, method, list(windows(4, 16).split(2)))
    return model


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SETTINGS, *MORE])
def test_a_dense_mixture_is_the_same_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    model = mixture(kind)
    check(model, written(model, tmp_path), tolerance=1e-4)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ALL)
def test_fewer_experts_are_the_same_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    model = pruned(kind, EXPERTS)
    assert gguf.arch_of(model) == REST.get(kind, kind.replace("_", ""))
    path = written(model, tmp_path)
    check(model, path, tolerance=1e-4)
    arch, block = gguf.arch_of(model), blocks_of(model)[-1]
    found = fields(path)
    sizes = block.expert_count, block.experts.active, block.expert_width
    assert sizes == (6, 2, found[f"{arch}.expert_feed_forward_length"])
    assert sizes[:2] == (found[f"{arch}.expert_count"], found[f"{arch}.expert_used_count"])
    leading = sum(not each.expert_count for each in blocks_of(model))
    assert bool(leading) == (kind in ("glm4_moe", "ernie4_5_moe", "lfm2_moe", *COUNTED))
    assert found.get(f"{arch}.leading_dense_block_count", 0) == leading


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["gpt_oss", *(pytest.param(kind, marks=pytest.mark.slow) for kind in NARROW)])
def test_narrower_experts_are_the_same_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    model = pruned(kind, CHANNELS)
    assert blocks_of(model)[-1].expert_width < blocks_of(mixture(kind))[-1].expert_width
    check(model, written(model, tmp_path), tolerance=1e-4)


@needs_llama_cpp
@pytest.mark.parametrize(
    "kind", ["deepseek_v3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("deepseek_v2", "glm4_moe_lite"))]
)
def test_fewer_heads_of_latent_attention_are_the_same_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    model = mixture(kind)
    for block in blocks_of(model):
        keep_units(block, "attention", 3)
    path = written(model, tmp_path)
    assert fields(path)["deepseek2.attention.head_count"] == 3
    check(model, path, tolerance=1e-4)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_routers_and_biases_stay_in_float32(dtype: gguf.Dtype, tmp_path: Path) -> None:
    reader = gguf.gguf.GGUFReader(written(mixture("gpt_oss"), tmp_path, dtype))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.ffn_gate_exps.bias"] == "F32"
    assert kinds["blk.0.ffn_down_exps.weight"] == dtype.upper()


def test_bounds_of_yarn_that_are_not_rounded_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(mixture("gpt_oss"), tmp_path)
    assert "rounds the bounds" not in caplog.text
    model = build("gpt_oss", rope_parameters=YARN | {"truncate": False})
    gguf.write(model, tokenizer(), tmp_path / "other.gguf")
    assert "llama.cpp rounds the bounds of YaRN" in caplog.text


@pytest.mark.parametrize(
    ("kind", "method", "own", "reason"),
    [
        ("mixtral", CFSP(0.3, a=30.0), {}, "widths of experts differ between blocks .* prune by REAP, or by FASP"),
        (
            "qwen2_moe",
            None,
            {"mlp_only_layers": [1]},
            r"blocks \[1\] have no experts, which llama.cpp's qwen2moe takes in",
        ),
        ("glm4_moe", CHANNELS, {}, "the shared expert has .* channels, and llama.cpp's glm4moe wants a multiple"),
        ("deepseek_v3", CHANNELS, {}, "the shared expert has .* channels, and llama.cpp's deepseek2 wants a multiple"),
        ("deepseek_v3", None, {"rope_interleave": False}, "rope_interleave is False, and llama.cpp computes True only"),
        ("deepseek_v3", None, {"q_lora_rank": None}, "queries have no latent, and llama.cpp's deepseek2 expects other"),
        ("deepseek_v3", None, {"rope_parameters": YARN}, "only where `mscale` is `mscale_all_dim`"),
        ("lfm2_moe", None, {"use_expert_bias": False}, "use_expert_bias is False, and llama.cpp computes True only"),
        ("hunyuan_v1_moe", None, {"moe_topk": [2, 3, 2, 2]}, r"experts for a token differ between blocks \(2 to 3\)"),
        ("glm4_moe", None, {"n_group": 2}, "n_group is 2, and llama.cpp computes 1 only"),
        ("olmoe", None, {"num_key_value_heads": 2}, "query heads share kv heads, and in llama.cpp's olmoe"),
        ("olmoe", None, {"norm_topk_prob": True}, "norm_topk_prob is True, and llama.cpp computes False only"),
    ],
)
def test_mixtures_that_llama_cpp_does_not_compute_are_refused(
    kind: str, method: PruningMethod | None, own: dict[str, Any], reason: str
) -> None:
    model = mixture(kind, **own) if method is None else pruned(kind, method, **own)
    reasons = gguf.refusals(model)
    assert any(re.search(reason, each) for each in reasons), reasons
    assert all(" " in each and "\n" not in each for each in reasons)
