"""Units that probing finds, against what the models' code says; and blocks that must be refused."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from plprune.architecture.anatomy import Anatomy, Part, Slice
from plprune.architecture.blocks import anatomy_of, blocks_of
from plprune.architecture.config_keys import size_keys
from plprune.architecture.discovery import check_supported, discover, shaping
from tests.builders import tiny
from tests.zoo import build


def rows(part: Part) -> dict[str, int]:
    """Rows per unit of each producer."""
    counted: dict[str, int] = {}
    for each in part.producers:
        name = each.path.split(".")[-1]
        counted[name] = counted.get(name, 0) + each.index.shape[1]
    return counted


def kinds(model: PreTrainedModel) -> list[Anatomy]:
    found: list[Anatomy] = []
    for each in anatomy_of(model).anatomies:
        if all(each is not other for other in found):
            found.append(each)
    return found


def test_units_of_linear_attention_and_of_attention_with_an_output_gate() -> None:
    linear, full = kinds(build("qwen3_5_text"))  # 2 key heads with 2 value heads each; 2 kv heads with 2 query heads
    assert linear.attention is not None
    assert full.attention is not None
    assert len(linear.attention) == 2
    assert rows(linear.attention) == {
        "conv1d": 2 * 16 + 2 * 16,
        "in_proj_qkv": 2 * 16 + 2 * 16,
        "in_proj_z": 2 * 16,
        "in_proj_b": 2,
        "in_proj_a": 2,
        "dt_bias": 2,
        "A_log": 2,
    }
    assert linear.attention.counts == {"linear_attn.key_dim": 16, "linear_attn.value_dim": 32}
    assert linear.values is None  # a convolution and an activation lie between
    assert rows(full.attention) == {"q_proj": 2 * 2 * 16, "k_proj": 16, "v_proj": 16}
    assert full.values is not None
    assert full.attention.columns == 2 * 16


def test_heads_that_leave_norms_over_all_heads_tied_are_marked() -> None:
    (block,) = kinds(tiny("olmo2"))
    assert block.attention is not None
    assert block.ffn is not None
    assert block.attention.tied
    assert not block.ffn.tied
    (block,) = kinds(tiny("llama"))
    assert block.attention is not None
    assert not block.attention.tied


def test_a_block_may_hold_only_some_units() -> None:
    (block,) = kinds(build("bloom"))  # the model computes its biases by head
    assert block.attention is None
    assert block.ffn is not None
    assert not blocks_of(build("bloom"))[0].has_attention


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", "intermediate_size num_attention_heads num_key_value_heads head_dim"),
        ("gpt2", "n_inner n_head"),
        ("opt", "ffn_dim num_attention_heads"),
    ],
)
def test_keys_of_the_config_that_set_sizes(family: str, keys: str) -> None:
    assert list(size_keys(tiny(family)).values()) == keys.split()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("jetmoe", "'jetmoe' is a mixture of experts"), ("mamba", "'mamba' model")],
)
def test_models_without_units_are_refused(kind: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        blocks_of(build(kind))


@pytest.mark.slow
def test_blocks_that_run_with_images_only_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not run once each, in order, on text alone \(first .*layers\.3\)"):
        blocks_of(build("mllama"))


@pytest.mark.slow
def test_layers_that_multiply_groups_of_inputs_are_left_alone() -> None:
    blocks = blocks_of(build("deepseek_v4"))
    assert "self_attn.o_a_proj, as it multiplies groups of its inputs apart" in blocks[0].anatomy.whole["attention"]
    assert {group.kind for block in blocks for group in block.groups()} == {"ffn", "expert_channel"}


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="'bart' is an encoder-decoder"):
        check_supported(build("bart").config.__class__(is_encoder_decoder=True))


def test_what_no_block_depends_on_is_not_probed_anew() -> None:
    model = tiny("gemma2")
    first = anatomy_of(model)
    assert anatomy_of(tiny("gemma2", tie_word_embeddings=False, vocab_size=310, pad_token_id=3)) is first
    assert discover(type(model), type(model.config).from_dict(model.config.to_dict() | {"dtype": "bfloat16"})) is first
    for key, value in (("num_key_value_heads", 8), ("layer_types", ["full_attention"] * 3), ("attention_bias", True)):
        other = copy.deepcopy(model.config)
        setattr(other, key, value)
        assert shaping(other) != shaping(model.config)


def test_units_are_found_on_the_cpu_whatever_the_default_device() -> None:
    model = tiny("llama", max_position_embeddings=131)  # a config of its own, as what was found is kept
    with torch.device("meta"):
        (found,) = kinds(model)
    assert found.attention is not None
    assert found.attention.consumer.index.tolist() == torch.arange(32).view(4, 8).tolist()


def test_a_smaller_block_has_the_first_units_counted_anew() -> None:
    stacked = Slice("p", torch.tensor([[0], [1], [2]])), Slice("p", torch.tensor([[3], [4], [5]]))  # as gate and up
    (first, second), consumer = Part(stacked, Slice("c", torch.arange(6).view(3, 2))).of_size(2)
    assert first.index.flatten().tolist() == [0, 1]
    assert second.index.flatten().tolist() == [2, 3]
    assert consumer.index.tolist() == [[0, 1], [2, 3]]


def test_heads_that_other_blocks_read_too_stay() -> None:
    settings = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    (shared,) = kinds(build("gemma4_text", **settings))[:1]
    assert shared.attention is None
    assert shared.ffn is not None
    (alone,) = kinds(build("gemma4_text"))[:1]
    assert alone.attention is not None
