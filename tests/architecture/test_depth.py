"""Configs of models with fewer blocks, found by building them."""

from typing import Any

import pytest
from torch import nn

from plprune.architecture.blocks import anatomy_of, dense_class
from plprune.architecture.depth import Shorter, renumber, shorter
from tests.builders import tiny
from tests.zoo import build


def found(model: Any, kept: list[int]) -> Shorter:
    return shorter(*dense_class(model), anatomy_of(model).blocks, kept)


def test_the_depth_and_lists_by_layer_change() -> None:
    model = tiny("cohere2")
    changes = found(model, [0, 2])
    assert changes.config == {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert changes.indices == {"layer_idx"}


def test_numbers_of_first_layers_change() -> None:
    model = build("deepseek_v3", first_k_dense_replace=2)
    changes = shorter(type(model), model.config, "model.layers", [0, 3])
    assert changes.config["first_k_dense_replace"] == 1


def test_lists_of_layers_are_numbered_anew() -> None:
    model = build("bamba")
    assert model.config.attn_layer_indices == [1, 3]
    assert found(model, [0, 1, 3]).config["attn_layer_indices"] == [1, 2]


def test_the_last_block_of_a_kind_may_leave() -> None:
    """Gemma 3 has rotary embeddings for each kind of attention."""
    model = tiny("gemma3_text", layer_types=["sliding_attention", "sliding_attention", "full_attention"])
    assert found(model, [0, 1]).config == {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2}


def test_a_block_that_depends_on_its_place_stays_where_it_is() -> None:
    """DiffLlama's weight of the second attention grows with the index of the block."""
    with pytest.raises(ValueError, match="cannot express that blocks 1 leave: leave out `drop_blocks`"):
        found(build("diffllama"), [0, 2, 3])


def test_all_modules_of_a_block_get_its_new_index() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    block.layer_idx, block[0].layer_idx, block[1].other = 3, 3, 3  # type: ignore[assignment]
    renumber(block, frozenset(["layer_idx"]), 3, 1)
    assert (block.layer_idx, block[0].layer_idx, block[1].other) == (1, 1, 3)
