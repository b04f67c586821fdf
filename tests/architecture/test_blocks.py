"""Where the prunable parts are: indices written by hand, costs by really removing."""

from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plprune.architecture.blocks import Block, UnitGroup, anatomy_of, blocks_of
from plprune.architecture.modeling_plprune import Gather, Scatter
from plprune.architecture.modules import dense_weight, innermost, is_transposed, kept_rows, matrix, width
from plprune.pruning.surgery import drop_attention, shrink
from tests.builders import FAMILIES, VARIANTS, tiny, windows

Unit = Literal["kv_heads", "value_channels"]
every_family = pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])


def block(family: str = "llama", index: int = 1) -> Block:
    return blocks_of(tiny(family))[index]


def indices(group: UnitGroup, unit: int) -> dict[str, list[list[int]]]:
    """What leaves with one unit: rows of each producer as they are named, columns of the consumer."""
    parts: dict[str, list[list[int]]] = {}
    for part in (*group.producers, group.consumer):
        parts.setdefault(part.path.split(".")[-1], []).append(part.index[unit].tolist())
    return parts


def span(start: int, stop: int) -> list[int]:
    return list(range(start, stop))


def test_llama_groups() -> None:  # 8 query heads on 4 kv heads of 4, FFN 48
    attention, ffn = block().groups("kv_heads")
    assert (len(attention), len(ffn)) == (4, 48)
    assert (attention.name, ffn.name) == ("blocks.1.attention", "blocks.1.ffn")
    rows = span(12, 16)
    expected = {"q_proj": [span(24, 32)], "k_proj": [rows], "v_proj": [rows], "o_proj": [span(24, 32)]}
    assert indices(attention, 3) == expected
    assert indices(ffn, 47) == {"gate_proj": [[47]], "up_proj": [[47]], "down_proj": [[47]]}


def test_llama_value_channels() -> None:
    value, _ = block().groups("value_channels")
    assert (len(value), value.name) == (16, "blocks.1.value")
    assert indices(value, 0) == {"v_proj": [[0]], "o_proj": [[0, 4]]}
    assert indices(value, 7) == {"v_proj": [[7]], "o_proj": [[11, 15]]}  # channel 3 of kv head 1: query heads 2 and 3


def test_phi3_groups_are_fused() -> None:
    attention, ffn = block("phi3").groups("kv_heads")
    assert indices(attention, 1) == {"qkv_proj": [span(8, 16), span(36, 40), span(52, 56)], "o_proj": [span(8, 16)]}
    assert indices(ffn, 5) == {"gate_up_proj": [[5], [53]], "down_proj": [[5]]}
    assert indices(block("phi3").groups("value_channels")[0], 6) == {"qkv_proj": [[54]], "o_proj": [[10, 14]]}


def test_opt_groups_have_no_gate_and_no_grouped_queries() -> None:  # 4 heads of 8, FFN 96
    attention, ffn = block("opt").groups("kv_heads")
    heads = [span(16, 24)]
    assert indices(attention, 2) == {"q_proj": heads, "k_proj": heads, "v_proj": heads, "out_proj": heads}
    assert (len(ffn), indices(ffn, 95)) == (96, {"fc1": [[95]], "fc2": [[95]]})
    assert indices(block("opt").groups("value_channels")[0], 9) == {"v_proj": [[9]], "out_proj": [[9]]}


def test_a_head_dimension_need_not_be_width_over_heads() -> None:  # qwen3 here: heads of 6 in a width of 32
    attention, _ = block("qwen3").groups("kv_heads")
    assert indices(attention, 1)["q_proj"] == [span(12, 24)]
    assert indices(attention, 1)["k_proj"] == [span(6, 12)]


def test_gpt_neox_groups_are_fused_head_by_head() -> None:  # 4 heads of 8: queries, keys and values of each together
    attention, ffn = block("gpt_neox").groups("kv_heads")
    assert indices(attention, 1) == {
        "query_key_value": [span(24, 32), span(32, 40), span(40, 48)],
        "dense": [span(8, 16)],
    }
    assert indices(ffn, 5) == {"dense_h_to_4h": [[5]], "dense_4h_to_h": [[5]]}
    assert indices(block("gpt_neox").groups("value_channels")[0], 9) == {"query_key_value": [[41]], "dense": [[9]]}


def test_gpt2_groups_are_those_of_outputs_and_inputs_not_of_the_weights_axes() -> None:
    attention, ffn = block("gpt2").groups("kv_heads")
    assert indices(attention, 2) == {"c_attn": [span(16, 24), span(48, 56), span(80, 88)], "c_proj": [span(16, 24)]}
    assert (len(ffn), indices(ffn, 95)) == (96, {"c_fc": [[95]], "c_proj": [[95]]})


def test_olmo2_norms_over_all_heads_lose_them_too() -> None:
    attention, _ = block("olmo2").groups("kv_heads")
    assert indices(attention, 1) == {
        "q_norm": [span(8, 16)],
        "k_norm": [span(4, 8)],
        "q_proj": [span(8, 16)],
        "k_proj": [span(4, 8)],
        "v_proj": [span(4, 8)],
        "o_proj": [span(8, 16)],
    }


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi/grouped"])
def test_norms_over_one_head_are_left_alone(family: str) -> None:
    attention, _ = block(family).groups("kv_heads")
    assert not any("norm" in part.path for part in attention.producers)


def test_none_leaves_attention_out() -> None:
    assert [group.kind for group in block().groups("none")] == ["ffn"]


@every_family
@pytest.mark.parametrize("attention", ["kv_heads", "value_channels"])
def test_units_cover_every_row_and_column_once(family: str, attention: Unit) -> None:
    for group in block(family).groups(attention):
        for part in (*group.producers, group.consumer):
            assert len(part.index) == len(group)
            assert len(part.index.unique()) == part.index.numel()
        assert sorted(group.consumer.index.flatten().tolist()) == span(0, group.consumer.index.numel())


@every_family
@pytest.mark.parametrize("attention", ["kv_heads", "value_channels"])
def test_a_producer_reaches_the_consumer_at_its_own_unit_only(family: str, attention: Unit) -> None:
    model = tiny(family)
    first = blocks_of(model)[0]
    for group in first.groups(attention):
        before = consumer_inputs(model, first, group)
        for part in group.producers[-1:]:  # without its values, or its up projection, a unit gives zero
            linear = first.part(part.path)
            bias = innermost(linear).bias
            for parameter in (matrix(linear), *([] if bias is None else [bias])):
                parameter.data[part.index[2]] = 0
        after = consumer_inputs(model, first, group)
        columns, others = group.consumer.index[2], group.consumer.index[[0, 1, 3]].flatten()
        assert not after[:, columns].any()
        assert torch.equal(after[:, others], before[:, others])


def consumer_inputs(model: PreTrainedModel, block: Block, group: UnitGroup) -> Tensor:  # [tokens, columns]
    seen: list[Tensor] = []
    hook = block.part(group.consumer.path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), hook:
        model(windows(2))
    return seen[0].reshape(-1, seen[0].shape[-1])


@every_family
@pytest.mark.parametrize("attention", ["kv_heads", "value_channels", "none"])
def test_the_cost_of_a_unit_is_what_leaves_with_it(family: str, attention: Any) -> None:
    for place in range(len(block(family).groups(attention))):
        whole = block(family)
        group = whole.groups(attention)[place]
        before, cost = whole.parameters(), whole.cost(group)
        shrink(whole, group, torch.arange(2, len(group)))
        assert before - whole.parameters() == 2 * cost


def test_a_kv_head_costs_what_the_paper_counts_in_channels() -> None:
    llama = block()
    attention, ffn = llama.groups()
    g, hd = llama.queries_per_head, llama.head_dim
    assert llama.cost(attention) / llama.cost(ffn) == (2 * g * hd + 2 * hd) / 3


def test_an_absent_bias_is_counted_where_it_is_absent() -> None:
    assert [block().absent_bias(group) for group in block().groups()] == [32, 32]
    assert [block("opt").absent_bias(group) for group in block("opt").groups()] == [0, 0]
    assert [block("gpt2").absent_bias(group) for group in block("gpt2").groups()] == [0, 0]


def test_a_block_without_attention_has_its_ffn_only() -> None:
    llama = block()
    drop_attention(llama)
    assert not llama.has_attention
    assert [group.name for group in llama.groups()] == ["blocks.1.ffn"]


def test_groups_are_of_what_is_still_there() -> None:
    llama = block()
    shrink(llama, llama.groups("value_channels")[0], torch.tensor([0, 5, 7]))
    value, _ = llama.groups("value_channels")
    assert [value.producers[0].index[i].item() for i in range(3)] == [0, 5, 7]
    assert value.consumer.index.tolist() == [[0, 4], [9, 13], [11, 15]]
    assert [len(group) for group in llama.groups("kv_heads")] == [4, 48]


def test_gathers_and_scatters_are_seen_through() -> None:
    linear = nn.Linear(2, 3)
    gather, scatter = Gather(linear, torch.tensor([1, 3]), 4), Scatter(linear, torch.tensor([0, 2, 5]), 6)
    assert innermost(gather) is innermost(scatter) is innermost(linear) is linear
    assert kept_rows(scatter).tolist() == [0, 2, 5]
    assert kept_rows(linear).tolist() == [0, 1, 2]
    x = torch.randn(7, 4)
    torch.testing.assert_close(gather(x), x @ dense_weight(gather).T + linear.bias)


def test_a_weight_that_is_stored_transposed_is_seen_as_any_other() -> None:
    stored, linear = Conv1D(3, 2), nn.Linear(2, 3)
    linear.weight.data, linear.bias.data = stored.weight.data.T, stored.bias.data
    assert (is_transposed(stored), is_transposed(linear)) == (True, False)
    assert (width(stored, "in_features"), width(stored, "out_features")) == (2, 3)
    assert torch.equal(matrix(stored), matrix(linear))
    assert matrix(stored).untyped_storage().data_ptr() == stored.weight.untyped_storage().data_ptr()
    gather, x = Gather(cast(nn.Linear, stored), torch.tensor([1, 3]), 4), torch.randn(7, 4)
    assert is_transposed(gather)
    assert width(gather, "in_features") == 4
    torch.testing.assert_close(gather(x), x @ dense_weight(gather).T + stored.bias)


def test_a_norm_has_a_width_and_no_columns() -> None:
    assert width(cast(nn.Module, block("olmo2").part("self_attn.q_norm")), "out_features") == 32


@every_family
def test_blocks_are_the_models_own_in_order(family: str) -> None:
    model = tiny(family)
    blocks = blocks_of(model)
    path = anatomy_of(model).blocks
    layers = cast(nn.ModuleList, model.get_submodule(path))
    assert [b.index for b in blocks] == [0, 1, 2]
    assert all(b.module is layer for b, layer in zip(blocks, layers, strict=True))
    embeddings = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(path))
    assert sum(b.parameters() for b in blocks) == sum(p.numel() for p in model.parameters()) - embeddings
