"""Experts of mixtures that are laid out in different ways."""

import copy
import dataclasses

import pytest
import torch

from plprune.architecture.blocks import blocks_of
from plprune.architecture.config_keys import size_keys
from plprune.architecture.experts import Unlike, check_channels
from tests.zoo import build

OWN = {
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.gate.weight"],
    "gpt_oss": [
        "mlp.experts.down_proj_bias",
        "mlp.experts.gate_up_proj",
        "mlp.experts.gate_up_proj_bias",
        "mlp.router.bias",
        "mlp.router.weight",
    ],
    "deepseek_v3": ["mlp.experts.gate_up_proj", "mlp.gate.e_score_correction_bias", "mlp.gate.weight"],
}


@pytest.mark.parametrize("kind", OWN)
def test_whatever_has_an_entry_per_expert_is_found(kind: str) -> None:
    model = build(kind)
    found = blocks_of(model)[-1].experts
    assert sorted(each.path for each in found.units.producers) == OWN[kind]
    assert found.units.consumer.path == "mlp.experts.down_proj"
    assert len(found.units) == 8
    assert found.active == 2
    assert found.least == (4 if kind == "deepseek_v3" else 2)  # which judges groups by their best two
    assert found.groups == (2 if kind == "deepseek_v3" else 1)
    assert getattr(model.config, size_keys(model)["experts"]) == 8


def test_channels_lie_side_by_side_or_take_turns() -> None:
    (together,) = blocks_of(build("mixtral"))[0].experts.channels.producers
    assert together.index[:2].tolist() == [[0, 96], [1, 97]]
    apart, bias = blocks_of(build("gpt_oss"))[0].experts.channels.producers
    assert apart.index[:2].tolist() == bias.index[:2].tolist() == [[0, 1], [2, 3]]
    assert (apart.axis, bias.axis) == (2, 1)


def test_experts_that_are_not_laid_out_as_they_say_are_refused() -> None:
    model = build("gpt_oss")
    model.set_experts_implementation("eager")
    (block, *_) = blocks_of(model)
    plain, own = blocks_of(build("mixtral"))[0].experts.channels, block.experts.channels
    wrong = tuple(dataclasses.replace(each, index=plain.producers[0].index) for each in own.producers)
    found = dataclasses.replace(block.experts, channels=dataclasses.replace(own, producers=wrong))
    module = copy.deepcopy(block.part("mlp.experts")).double()
    check_channels(module, block.experts)
    with pytest.raises(Unlike, match=r"experts with fewer channels differ by .* from masked ones"):
        check_channels(module, found)


def test_a_first_dense_block_has_none() -> None:
    first, *others = blocks_of(build("deepseek_v3", first_k_dense_replace=1))
    assert (first.expert_count, first.idle_parameters) == (0, 0)
    assert first.channels == 96
    for block in others:
        assert block.expert_count == 8
        assert block.channels == 48  # of the shared expert
        assert block.idle_parameters == 6 * 3 * 64 * 48


def test_experts_cost_what_they_weigh() -> None:
    (block, *_) = blocks_of(build("gpt_oss"))
    own = dict(block.module.named_parameters())
    stacked = sum(own[name].numel() for name in own if name.startswith("mlp."))
    assert block.cost(block.expert_units()) == stacked // 8
    assert torch.equal(block.expert_units().consumer.index.flatten(), torch.arange(8))
