"""Families of a graph each in llama.cpp: the same model there, whole and pruned alike in all blocks, or a refusal."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from plprune import FASP, FLAP, PruningMethod, TwoSSP, prune
from plprune.architecture.blocks import blocks_of
from plprune.export import gguf
from plprune.export.architectures import ARCHS, LAYOUTS
from tests.builders import windows
from tests.export.test_gguf import check, keep_units, needs_llama_cpp, written
from tests.zoo import build

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
TEMPERED = {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
WHOLE = {"sliding_window": None, "layer_types": ["full_attention"] * 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "ministral3": {"rope_parameters": YARN | TEMPERED},
    "olmo3": {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen3_5_text": {},
    "glm4": {"attention_bias": True},
    "ernie4_5": {},
    "seed_oss": {},
    "exaone4": WHOLE,
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 1e4, "factor": 1.0}},
    "arcee": {},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "starcoder2": {},
    "stablelm": {"use_parallel_residual": True, "use_qkv_bias": True},
    "gemma": {},
    "olmo": {},
}
FILLING = ("olmo3", "exaone4", "lfm2", "starcoder2", "stablelm", "olmo")  # whose heads fill the hidden size
GELU = ("starcoder2", "gemma")  # for which llama.cpp has a table in half precision
ALIKE = FASP(0.2, attention="none", bias=False)
HEADS = FLAP(0.25, structure="UL-UM", repair="none")


def tolerance(kind: str) -> float:
    return 2e-3 if kind in GELU else 1e-4


def model_of(kind: str, **own: Any) -> PreTrainedModel:
    """A tiny model whose biases and norms are not those that it starts with."""
    model = build(kind, **{**SETTINGS.get(kind, {}), **own})
    torch.manual_seed(1)
    for value in model.parameters():
        value.data = value.data + 0.1 * torch.randn_like(value) if value.ndim == 1 else 6 * value.data
    return model


@needs_llama_cpp
@pytest.mark.parametrize(
    "kind", [*list(SETTINGS)[:4], *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(SETTINGS)[4:])]
)
def test_a_pruned_model_is_the_same_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    prune(model, ALIKE if kind in FILLING else HEADS, list(windows(4, 16).split(2)))
    assert gguf.arch_of(model) == LAYOUTS[kind].archs[0]
    check(model, written(model, tmp_path), tolerance=tolerance(kind))


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_dense_model_is_the_same_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    check(model, written(model, tmp_path), tolerance=tolerance(kind))


@pytest.mark.parametrize(
    ("kind", "method", "own", "reason"),
    [
        ("exaone4", None, {"sliding_window": 8}, "sliding_window is 8, and llama.cpp computes None only"),
        ("exaone4", HEADS, {}, "do not fill the hidden size 64, which llama.cpp's exaone4 takes for granted"),
        ("glm4", FLAP(0.25), {}, "llama.cpp's glm4 has one: prune every block to the same width"),
        ("lfm2", TwoSSP(0.3, drop_attentions=1), {}, r"blocks \[.\] have no attention, and llama.cpp's lfm2 has it"),
        ("stablelm", None, {"qk_layernorm": True}, "qk_layernorm is True, and llama.cpp computes False only"),
        ("arcee", None, {"attention_bias": True}, "llama.cpp's arcee has no bias in attn_output"),
        ("olmo", None, {"clip_qkv": 8.0}, "clip_qkv is 8.0, and llama.cpp computes None only"),
        ("lfm2", None, {"conv_bias": True}, "conv_bias is True, and llama.cpp computes False only"),
        pytest.param(
            *(
                "qwen3_5_text",
                None,
                {"linear_value_head_dim": 32},
                "keys and values of linear attention differ in size",
            ),
            marks=pytest.mark.slow,
        ),
        ("olmo3", None, {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": YARN}}, "scales the former"),
    ],
)
def test_what_a_graph_does_not_compute_is_refused(
    kind: str, method: PruningMethod | None, own: dict[str, Any], reason: str
) -> None:
    model = model_of(kind, **own)
    if method is not None:
        prune(model, method, list(windows(4, 16).split(2)))
    reasons = gguf.refusals(model)
    assert any(re.search(reason, each) for each in reasons), reasons


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_convolutions_stay_in_float32(dtype: gguf.Dtype, tmp_path: Path) -> None:
    reader = gguf.gguf.GGUFReader(written(model_of("lfm2"), tmp_path, dtype))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.shortconv.conv.weight"] == "F32"
    assert kinds["blk.0.shortconv.in_proj.weight"] == dtype.upper()


@needs_llama_cpp
@pytest.mark.slow
def test_fewer_heads_of_linear_attention_are_the_same_in_llama_cpp(tmp_path: Path) -> None:
    model = model_of("qwen3_5_text")
    for block in blocks_of(model)[:3]:
        keep_units(block, "attention", 1)
    check(model, written(model, tmp_path), tolerance=1e-4)
    keep_units(blocks_of(other := model_of("qwen3_5_text"))[1], "attention", 1)
    assert any("heads of linear attention differ between blocks (2 to 4)" in each for each in gguf.refusals(other))


def test_depths_at_which_a_graph_computes_another_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("exaone4")
    assert not gguf.refusals(model)
    assert ARCHS["exaone4"].depths == (64,)
    monkeypatch.setattr(gguf, "blocks_of", lambda model: 16 * blocks_of(model))
    assert "there are 64 blocks, at which llama.cpp's exaone4 computes another model" in " ".join(gguf.refusals(model))
