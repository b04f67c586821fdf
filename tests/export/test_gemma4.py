"""Gemma 4 in llama.cpp: heads of two sizes, shared keys and values, per-layer inputs, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from plprune import CFSP, FLAP, PruningMethod, TwoSSP, prune
from plprune.architecture.blocks import blocks_of
from plprune.export import gguf
from tests.builders import windows
from tests.export.test_gguf import check, fields, needs_llama_cpp, written
from tests.zoo import build

TURNS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
WIDE = {**TURNS, "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}, "final_logit_softcapping": 3.0}
SHARED = {**WIDE, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 12}
SAME = {
    **TURNS,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "per_layer_config": {1: {"head_dim": 32, "num_key_value_heads": 1}, 3: {"head_dim": 32, "num_key_value_heads": 1}},
}
SETTINGS: dict[str, dict[str, Any]] = {"shared": SHARED, "keys are values": SAME, "default": {}, "wide": WIDE}
HEADS, WIDTHS = FLAP(0.25, repair="none"), CFSP(0.25)
GELU = 5e-3  # for which llama.cpp has a table in half precision


def model_of(**own: Any) -> PreTrainedModel:
    """A tiny model whose norms and scalars are not those that it starts with."""
    model = build("gemma4_text", **own)
    torch.manual_seed(1)
    for value in model.parameters():
        value.data = value.data + 0.1 * torch.randn_like(value) if value.ndim == 1 else 6 * value.data
    for block in blocks_of(model):
        block.module.layer_scalar.data += 0.3 * torch.randn(1)  # type: ignore[union-attr,operator]
    return model


@needs_llama_cpp
@pytest.mark.parametrize("name", ["shared", *(pytest.param(k, marks=pytest.mark.slow) for k in list(SETTINGS)[1:])])
def test_a_dense_model_is_the_same_in_llama_cpp(name: str, tmp_path: Path) -> None:
    model = model_of(**SETTINGS[name])
    check(model, path := written(model, tmp_path), tolerance=GELU)
    found = fields(path)
    assert found["gemma4.attention.shared_kv_layers"] == (2 if name == "shared" else 0)
    assert found["gemma4.attention.key_length_swa"] == 16
    assert found["gemma4.attention.key_length"] == (16 if name == "default" else 32)


@needs_llama_cpp
@pytest.mark.parametrize("name", ["shared", pytest.param("keys are values", marks=pytest.mark.slow)])
def test_attention_alone_is_the_same_to_the_last_digits(name: str, tmp_path: Path) -> None:
    model = model_of(**SETTINGS[name])
    for own, value in model.named_parameters():
        if own.endswith(("mlp.down_proj.weight", "per_layer_projection.weight")):
            value.data.zero_()
    check(model, written(model, tmp_path), tolerance=2e-5)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("shared", WIDTHS),
        *(pytest.param(name, HEADS, marks=pytest.mark.slow) for name in ("default", "wide", "keys are values")),
    ],
)
def test_blocks_of_sizes_of_their_own_are_the_same_in_llama_cpp(
    name: str, method: PruningMethod, tmp_path: Path
) -> None:
    model = model_of(**SETTINGS[name])
    prune(model, method, list(windows(4, 16).split(2)))
    assert len({block.channels for block in blocks_of(model)}) > 1
    assert gguf.arch_of(model) == "gemma4"
    check(model, written(model, tmp_path), tolerance=GELU)


@pytest.mark.parametrize(
    ("method", "own", "reason"),
    [
        (None, {"vocab_size_per_layer_input": 200}, "there are 200 words of per-layer inputs and 300"),
        (None, {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        (None, {"layer_types": ["full_attention"] * 4}, "blocks with a sliding window have heads of other than one"),
        (
            None,
            {
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                "num_kv_shared_layers": 2,
            },
            "blocks from 2 on share keys and values, for which llama.cpp's gemma4 takes block 0 to have a sliding",
        ),
        (
            None,
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48},
            "experts are not written for llama.cpp's gemma4",
        ),
        (TwoSSP(0.3, drop_attentions=1), {}, "have no attention, and llama.cpp's gemma4 has it in every block"),
        (FLAP(0.25), {}, "llama.cpp's gemma4 has no bias in ffn_down: take a model without"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    method: PruningMethod | None, own: dict[str, Any], reason: str
) -> None:
    model = model_of(**own)
    if method is not None:
        prune(model, method, list(windows(4, 16).split(2)))
    reasons = gguf.refusals(model)
    assert any(re.search(re.escape(reason), each) for each in reasons), reasons
    assert all(" " in each and "\n" not in each for each in reasons)


def test_biases_of_attention_are_refused() -> None:
    model = model_of()
    assert not gguf.refusals(model)
    projection = blocks_of(model)[1].part("self_attn.o_proj")
    projection.bias = nn.Parameter(torch.zeros(64))
    assert gguf.refusals(model) == [
        "llama.cpp's gemma4 has no bias in attention: prune with `repair` none, or restore with `bias` false"
    ]
