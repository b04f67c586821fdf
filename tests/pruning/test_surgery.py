"""Removal against the dense model with the same columns of its consumers set to zero."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from plprune import FASP, FLAP, TwoSSP, prune
from plprune.architecture.blocks import Block, Kind, UnitGroup, blocks_of
from plprune.architecture.cutting import complement
from plprune.architecture.modeling_plprune import BlockConfig, Gather, NoAttention, Scatter
from plprune.architecture.modules import innermost, matrix
from plprune.pruning.surgery import (
    Surgery,
    apply,
    drop_attention,
    first_to_leave,
    may_leave,
    plan_of,
    replay,
    shrink,
    without,
)
from tests.builders import FAMILIES, VARIANTS, logits, tiny, windows
from tests.zoo import build

every_family = pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
every_unit = pytest.mark.parametrize("attention", ["kv_heads", "value_channels", "none"])


def silence(block: Block, group: UnitGroup, keep: Tensor) -> None:
    """Sets what the consumer reads of all other units to zero, and what norms over all heads see of them."""
    gone = complement(keep, len(group))
    matrix(block.part(group.consumer.path)).data[:, group.consumer.index[gone].flatten()] = 0
    if group.kind != "attention":
        return
    norms = [part.path for part in group.producers if part.path.endswith("norm")]
    for norm, projection in zip(norms, group.producers[len(norms) :], strict=False):
        linear, module = innermost(block.part(projection.path)), cast(Any, block.part(norm))
        for parameter in linear.parameters():
            parameter.data[projection.index[gone].flatten()] = 0
        share = len(keep) / len(group)  # of the values that a mean of squares is of, zeros included
        module.weight.data *= share**0.5
        module.variance_epsilon *= share


def same_function(a: PreTrainedModel, b: PreTrainedModel) -> None:
    torch.testing.assert_close(logits(a), logits(b), rtol=1e-5, atol=1e-5)


def chosen(group: UnitGroup) -> Tensor:
    """About half of the units, not evenly spread."""
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(len(group)))
    return order[: (len(group) + 1) // 2].sort().values


@every_family
@every_unit
def test_a_pruned_group_is_the_dense_one_with_its_columns_at_zero(family: str, attention: Any) -> None:
    small, dense = tiny(family), tiny(family)
    for a, b in zip(blocks_of(small), blocks_of(dense), strict=True):
        group = a.groups(attention)[0]
        silence(b, group, chosen(group))
        shrink(a, group, chosen(group))
    same_function(small, dense)


@every_family
def test_groups_of_all_kinds_can_leave_one_after_the_other(family: str) -> None:
    small, dense = tiny(family), tiny(family)
    block, reference = blocks_of(small)[1], blocks_of(dense)[1]
    value, ffn = reference.groups("value_channels")
    silence(reference, value, chosen(value))
    silence(reference, ffn, torch.arange(7))
    silence(reference, reference.groups()[0], torch.tensor([0, 3]))
    shrink(block, block.groups("value_channels")[0], torch.arange(0, len(value)))
    shrink(block, block.groups("value_channels")[0], chosen(value))
    shrink(block, block.groups()[0], torch.tensor([0, 3]))
    shrink(block, block.groups()[1], torch.arange(20))
    shrink(block, block.groups()[1], torch.arange(7))
    same_function(small, dense)


@every_family
def test_a_dropped_attention_is_one_that_gives_zero(family: str) -> None:
    small, dense = tiny(family), tiny(family)
    drop_attention(blocks_of(small)[1])
    reference = blocks_of(dense)[1]
    for parameter in reference.part(reference.attention.consumer.path).parameters():
        parameter.data.zero_()
    same_function(small, dense)


@every_family
def test_a_sub_block_is_gone_for_the_time_of_the_context(family: str) -> None:
    model = tiny(family)
    before, block = logits(model), blocks_of(model)[0]
    kinds: list[Kind] = ["attention", "whole_ffn"] if block.whole_ffn else ["attention"]
    assert (len(kinds) == 1) == (family == "opt" or family.startswith("opt/"))
    for kind in kinds:
        with without(block, kind):
            assert not torch.allclose(logits(model), before)
        assert torch.equal(logits(model), before)
        with pytest.raises(RuntimeError), without(block, kind):
            raise RuntimeError
        assert torch.equal(logits(model), before)


def test_gather_and_scatter_are_linear_with_the_other_channels_at_zero() -> None:
    linear, index, x = nn.Linear(3, 5), torch.tensor([0, 4, 6]), torch.randn(2, 4, 8)
    torch.testing.assert_close(Gather(linear, index, 8)(x), linear(x[..., [0, 4, 6]]))
    scattered = Scatter(linear, torch.tensor([1, 2, 4, 5, 7]), 9)(x[..., :3])
    assert scattered.shape == (2, 4, 9)
    assert torch.equal(scattered[..., [1, 2, 4, 5, 7]], linear(x[..., :3]))
    assert not scattered[..., [0, 3, 6, 8]].any()


@pytest.mark.parametrize("kind", [Gather, Scatter])
def test_the_index_moves_with_the_module_and_is_saved(kind: type[Gather] | type[Scatter]) -> None:
    module, index = kind(nn.Linear(2, 2), torch.tensor([0, 3]), 4), torch.tensor([1, 2])
    assert set(module.state_dict()) == {"linear.weight", "linear.bias", "index"}
    assert set(dict(module.named_buffers())) == {"index"}
    module.load_state_dict(module.state_dict() | {"index": index})
    assert torch.equal(module.index, index)


def test_no_attention_gives_the_cache_its_length() -> None:
    entries: list[tuple[Any, ...]] = []

    class Cache:
        def update(self, *entry: Any) -> None:
            entries.append(entry)

    x = torch.randn(2, 5, 8)
    output, weights = NoAttention(3)(x, past_key_values=Cache(), position_embeddings=None)
    assert weights is None
    assert torch.equal(output, torch.zeros(2, 5, 8))
    ((key, value, layer),) = entries
    assert key.shape == value.shape == (2, 1, 5, 1)
    assert layer == 3


def test_block_config_has_its_own_values_and_the_models_for_all_others() -> None:
    base = tiny("phi3").config
    own = BlockConfig(base, num_attention_heads=2)
    assert (own.num_attention_heads, own.hidden_size) == (2, 32)
    base.hidden_size = 64
    assert own.hidden_size == 64
    assert BlockConfig(own, num_attention_heads=1).num_attention_heads == 1
    assert not hasattr(own, "no_such_setting")
    assert not hasattr(own, "__no_such_method__")


def test_block_config_can_be_copied_deeply() -> None:
    own = BlockConfig(tiny("phi3").config, num_attention_heads=2)
    twin: Any = copy.deepcopy(own)
    assert (twin.num_attention_heads, twin.hidden_size) == (2, 32)
    twin.num_attention_heads = 1
    assert own.num_attention_heads == 2


@every_family
def test_a_pruned_model_can_be_copied_deeply(family: str) -> None:
    model = tiny(family)
    prune(model, FASP(0.2), [windows()])
    prune(model, FLAP(0.2), [windows()])
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))


def test_surgery_writes_down_what_it_did() -> None:
    model = tiny()
    surgery, total = Surgery(model), sum(p.numel() for p in model.parameters())
    block = surgery.blocks[1]
    before = [b.parameters() for b in surgery.blocks]
    attention, ffn = block.groups()
    surgery.keep(block, attention, torch.tensor([1, 2]), bias_gain=torch.ones(32))
    surgery.keep(block, ffn, torch.arange(48))
    plan = surgery.plan("Mine", {"sparsity": 0.3}, torch.ones(3))
    assert plan_of(model) is plan
    assert {name: keep.tolist() for name, keep in plan.keep.items()} == {
        "blocks.1.attention": [1, 2],
        "blocks.1.ffn": list(range(48)),
    }
    assert plan.sizes == {"blocks.1.attention": 4, "blocks.1.ffn": 48}
    assert (plan.before, plan.rest + sum(before)) == (before, total)
    assert plan.after == [b.parameters() for b in surgery.blocks]
    assert plan.repaired == ["model.layers.1.self_attn.o_proj.bias"]
    assert (plan.method, plan.sparsity, plan.config["model_type"]) == ("Mine", 0.3, "llama")


@pytest.mark.parametrize("trained", [True, False])
def test_a_bias_that_repair_adds_is_trained_as_the_weight_beside_it_is(trained: bool) -> None:
    model = tiny().requires_grad_(trained)
    prune(model, FLAP(0.3), [windows()])
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases
    assert all(bias.requires_grad == trained for bias in biases)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_bias_gain_is_added_to_the_bias_or_makes_one(family: str) -> None:
    model = tiny(family)
    surgery = Surgery(model)
    block = surgery.blocks[0]
    ffn = block.groups()[1]
    old = innermost(block.part(ffn.consumer.path)).bias
    old = torch.zeros(32) if old is None else old.detach().clone()
    surgery.keep(block, ffn, torch.arange(10), bias_gain=torch.arange(32.0))
    torch.testing.assert_close(innermost(block.part(ffn.consumer.path)).bias.detach(), old + torch.arange(32.0))


def test_a_repaired_weight_is_that_of_the_kept_columns_in_the_models_dtype() -> None:
    model = tiny().bfloat16()  # type: ignore[operator]
    model.requires_grad_(False)
    surgery = Surgery(model)
    block = surgery.blocks[0]
    value, _ = block.groups("value_channels")
    keep, weight = torch.tensor([0, 5, 7]), torch.randn(32, 6, dtype=torch.float64)
    surgery.keep(block, value, keep, weight=weight, bias_gain=torch.ones(32, dtype=torch.float64))
    linear = innermost(block.part("self_attn.o_proj"))
    assert torch.equal(linear.weight, weight.bfloat16())
    assert linear.weight.dtype == linear.bias.dtype == torch.bfloat16
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_weight_repaired_behind_a_gather_is_that_of_the_columns_it_reads(family: str) -> None:
    model, dense = tiny(family), tiny(family)
    surgery = Surgery(model)
    block, output = surgery.blocks[0], matrix(blocks_of(dense)[0].part(blocks_of(dense)[0].attention.consumer.path))
    value, _ = block.groups("value_channels")
    surgery.keep(block, value, chosen(value))
    attention, _ = block.groups()
    columns = attention.consumer.index[[0, 2]].flatten()
    weight = torch.randn(32, len(columns))
    surgery.keep(block, attention, torch.tensor([0, 2]), weight=weight)
    silence(blocks_of(dense)[0], attention, torch.tensor([0, 2]))
    output.data[:, columns] = weight
    silence(blocks_of(dense)[0], value, chosen(value))
    same_function(model, dense)


def test_keeping_every_unit_changes_no_value() -> None:
    model, surgery = tiny(), Surgery(tiny())
    block = surgery.blocks[0]
    surgery.keep(block, block.groups()[1], torch.arange(48), torch.zeros(32, 48), torch.ones(32))
    assert torch.equal(logits(surgery.model), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [FLAP, FASP, TwoSSP])
def test_a_plan_gives_its_shapes_on_the_meta_device(family: str, method: Callable[..., Any]) -> None:
    model = tiny(family)
    plan = prune(model, method(sparsity=0.3), [windows()])
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(tiny(family).config)
    apply(bare, plan)
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in bare.parameters())
    assert plan_of(bare) is plan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intermediate_size": 40}, "blocks.0.ffn has 48 units in the plan and 40 in the model"),
        ({"num_key_value_heads": 8}, "blocks.0.attention has 4 units in the plan and 8 in the model"),
        ({"num_hidden_layers": 2}, "blocks.2.attention has 4 units in the plan and none in the model"),
        ({"num_hidden_layers": 4}, "block 3 has 0 parameters in the plan"),
        ({"hidden_size": 64, "head_dim": 4}, "block 0 has"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(settings: dict[str, Any], message: str) -> None:
    plan, other = prune(tiny(), FLAP(0.3), [windows()]), tiny(**settings)
    before = logits(other)
    with pytest.raises(ValueError, match=message):
        apply(other, plan)
    assert torch.equal(logits(other), before)
    assert plan_of(other) is None


def test_a_repaired_weight_is_stored_as_the_family_stores_it() -> None:
    model = tiny("gpt2")
    surgery = Surgery(model)
    block = surgery.blocks[0]
    ffn, weight = block.groups()[1], torch.randn(32, 10)
    surgery.keep(block, ffn, torch.arange(10), weight=weight)
    stored = innermost(block.part("mlp.c_proj")).weight
    assert torch.equal(stored, weight.T)
    assert stored.is_contiguous()


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("gpt2", {"attn.split_size": 16}),
        ("opt", {"self_attn.num_heads": 2}),
        ("phi3", {"self_attn.config.num_attention_heads": 4, "self_attn.num_key_value_heads": 2}),
    ],
)
def test_attributes_that_the_forward_pass_reads_follow_the_heads(family: str, counts: dict[str, int]) -> None:
    block = blocks_of(tiny(family))[1]
    shrink(block, block.groups()[0], torch.tensor([0, 2]))
    assert block.attention.counts.keys() == counts.keys()
    for path, count in counts.items():
        value: Any = block.module
        for name in path.split("."):
            value = getattr(value, name)
        assert value == count


@pytest.mark.parametrize("attention", ["kv_heads", "value_channels"])
def test_decisions_that_are_replayed_give_the_shapes_they_gave(attention: Any) -> None:
    model, other = tiny(), tiny()
    surgery, block = Surgery(model), blocks_of(model)[1]
    for group in block.groups(attention):
        surgery.keep(block, group, torch.arange(len(group) - 1), bias_gain=torch.ones(32))
    torch.nn.Module.to(other, "meta")
    replay(blocks_of(other)[1], surgery.journal.decisions, other)
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (model, other)]
    assert shapes[0] == shapes[1]
    assert shapes[0]["model.layers.1.mlp.down_proj.bias"] == (32,)


def test_a_plan_goes_on_from_the_model_it_was_made_for() -> None:
    model = tiny()
    first = prune(model, TwoSSP(0.2), [windows()])
    once = copy.deepcopy(model)
    second = prune(model, TwoSSP(0.2), [windows()])
    dense = tiny()
    for start in (once, dense):
        apply(start, second)
        assert torch.equal(logits(start), logits(model))
    assert plan_of(once) is second
    assert second.previous is first


def test_a_plan_does_not_go_on_from_another_pruning() -> None:
    model = tiny()
    prune(model, TwoSSP(0.2), [windows()])
    other = prune(tiny(), FLAP(0.2), [windows()])
    with pytest.raises(ValueError, match="pruned by another"):
        apply(model, other)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])  # plain; transposed, taking turns; without gates
def test_cut_channels_of_experts_are_masked_ones_of_each_expert(kind: str) -> None:
    pruned, masked = build(kind), build(kind)
    surgery = Surgery(pruned)
    for block, whole in zip(surgery.blocks, blocks_of(masked), strict=True):
        for group in [group for group in block.groups("none") if group.experts]:
            rows = [torch.randperm(len(group))[:16].sort().values for _ in range(group.experts)]
            surgery.keep(block, group, torch.stack(rows))
            stacked = cast(Any, whole.part(whole.experts.path)).down_proj.data
            for expert, keep in enumerate(rows):
                gone = complement(keep, len(group))
                if group.consumer.axis == 2:
                    stacked[expert][:, gone] = 0
                else:
                    stacked[expert][gone] = 0
            assert block.expert_width == 16
    torch.testing.assert_close(logits(pruned), logits(masked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_parameters_of_experts_leave_as_they_cost(kind: str) -> None:
    surgery = Surgery(build(kind))
    block = surgery.blocks[0]
    (group,) = [group for group in block.groups("none") if group.experts]
    before, channel = block.parameters(), block.cost(group)
    surgery.keep(block, group, torch.arange(8).expand(8, -1))
    assert before - block.parameters() == (len(group) - 8) * channel
    before, expert = block.parameters(), block.cost(block.expert_units())
    surgery.keep(block, block.expert_units(), torch.tensor([1, 2, 7]))
    assert before - block.parameters() == 5 * expert


def test_one_block_that_caches_keys_stays() -> None:
    blocks = blocks_of(build("lfm2_moe"))  # the third alone does
    assert [block.index for block in may_leave(blocks, {0})] == [1, 3]
    drop_attention(blocks[2])  # what stands in for it still counts tokens
    assert [block.index for block in may_leave(blocks, {0})] == [1, 3]
    assert [block.index for block in first_to_leave(blocks, blocks[::-1], 2)] == [3, 1]
    with pytest.raises(
        ValueError, match="3 blocks cannot leave, but 2, as one with a cache stays: lower `drop_blocks`"
    ):
        first_to_leave(blocks, blocks[1:], 3)
