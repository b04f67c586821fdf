"""Which projections are trained whole, and that they compute as before."""

import copy
from typing import Any

import pytest
import torch

from plprune import FASP, FLAP, TwoSSP, prune
from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import innermost
from plprune.pruning.surgery import plan_of
from plprune.recovery.consumers import unfreeze
from plprune.recovery.lora import merged_state
from plprune.recovery.masters import weights_in_saved_dtype
from tests.builders import FAMILIES, logits, tiny, windows


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_consumers_are_trained_without_a_plan(family: str) -> None:
    model = tiny(family)
    names = unfreeze(model, None)
    paths = [
        (block, path) for block in blocks_of(model) for path in (block.attention.consumer.path, block.ffn.consumer.path)
    ]
    assert names == [f"{block.path}.{path}" for block, path in paths]
    assert trained(model) == {
        f"{name}.{kind}" for name in names for kind in dict(model.get_submodule(name).named_parameters())
    }


@pytest.mark.parametrize("method", [FASP(0.3), FLAP(0.3), TwoSSP(0.3, drop_attentions=2)])
def test_only_consumers_that_lost_units_are_trained(method: Any) -> None:
    model = tiny()
    plan = prune(model, method, [windows()])
    unfreeze(model, plan)
    expected = set()
    for block in blocks_of(model):
        for group in [*block.groups("kv_heads"), *block.groups("value_channels")]:
            if group.name in plan.keep and len(plan.keep[group.name]) < plan.sizes[group.name]:
                linear = innermost(block.part(group.consumer.path))
                expected |= {id(p) for p in linear.parameters()}
    assert expected
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected


def test_an_earlier_plan_counts_too_and_one_that_removed_nothing_is_refused() -> None:
    model = tiny()
    prune(model, FLAP(0.3), [windows()])
    prune(model, FASP(0.1, attention="none"), [windows()])
    unfreeze(model, plan_of(model))
    assert any("self_attn.o_proj" in name for name in trained(model))
    with pytest.raises(ValueError, match="removed nothing"):
        unfreeze(whole := tiny(), prune(whole, FLAP(0.0), [windows()]))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_masters_in_float32_are_saved_in_the_dtype_of_the_rest(family: str) -> None:
    model = tiny(family).bfloat16()  # type: ignore[operator]
    plan = prune(model, FLAP(0.3), [windows()])
    before = copy.deepcopy(model)
    unfreeze(model, plan)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), logits(before), rtol=0.02, atol=0.05)
    model(input_ids=windows(2), labels=windows(2)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    masters = [p.detach().clone() for p in model.parameters()]
    with weights_in_saved_dtype(model):
        assert torch.equal(logits(model), logits(before))
    state = dict(merged_state(model, lambda p: p.detach()))
    for (name, value), p, master in zip(before.named_parameters(), model.parameters(), masters, strict=True):
        assert torch.equal(state[name], value)
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(p, master)
