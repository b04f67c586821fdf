"""Which parameters of routers are trained, and that they compute what is saved."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from plprune import REAP, load_pruned, prune, save_pruned
from plprune.recovery.lora import merged_state
from plprune.recovery.masters import weights_in_saved_dtype
from plprune.recovery.routers import unfreeze
from tests.builders import logits, tiny, tokenizer, windows
from tests.zoo import build

TRAINED = {  # in each block with a mixture; biases that correct the choice of experts are parameters of the last two
    "mixtral": (range(4), ["mlp.gate.weight"]),
    "gpt_oss": (range(4), ["mlp.router.weight", "mlp.router.bias"]),
    "afmoe": (range(1, 4), ["mlp.router.gate.weight"]),
    "laguna": (range(1, 4), ["mlp.gate.weight"]),
}


@pytest.mark.parametrize("family", TRAINED)
def test_routers_are_trained_and_nothing_else(family: str, tmp_path: Path) -> None:
    model = build(family)
    prune(model, REAP(0.25, sparsity_of="experts"), [windows(2)])
    save_pruned(model, tmp_path / "out", tokenizer())
    loaded = load_pruned(tmp_path / "out")
    blocks, names = TRAINED[family]
    expected = {f"model.layers.{i}.{name}" for i in blocks for name in names}
    assert set(unfreeze(loaded)) == expected
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == expected
    loaded(input_ids=windows(2), labels=windows(2), use_cache=False).loss.backward()
    for name, parameter in loaded.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in expected), name


@pytest.mark.parametrize("family", TRAINED)
def test_masters_in_float32_compute_what_is_saved(family: str) -> None:
    model = build(family).bfloat16()  # type: ignore[operator]
    before = copy.deepcopy(model)
    trained = [model.get_parameter(name) for name in unfreeze(model)]
    assert torch.equal(logits(model), logits(before))
    assert torch.equal(logits(copy.deepcopy(model)), logits(before))
    for parameter in trained:
        assert parameter.dtype == torch.float32
        parameter.data += 0.3 * torch.randn_like(parameter)  # not numbers that bfloat16 has
    masters, trained_logits = [p.detach().clone() for p in trained], logits(model)
    assert not torch.equal(trained_logits, logits(before))
    state = dict(merged_state(model, lambda p: p.detach()))
    before.load_state_dict(state)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.bfloat16}
    assert torch.equal(logits(before), trained_logits)
    with weights_in_saved_dtype(model):
        assert torch.equal(logits(model), trained_logits)
        assert {p.dtype for p in trained} == {torch.bfloat16}
    assert all(torch.equal(p, master) for p, master in zip(trained, masters, strict=True))
    assert not any(isinstance(value, torch.Tensor) for module in model.modules() for value in vars(module).values())


def test_gradients_of_masters_are_those_of_rounded_weights() -> None:
    model = build("mixtral").bfloat16()  # type: ignore[operator]
    plain = copy.deepcopy(model)
    names = unfreeze(model)
    for each in (model, plain):
        each(input_ids=windows(2), labels=windows(2), use_cache=False).loss.backward()
    for name in names:
        ours, theirs = model.get_parameter(name).grad, plain.get_parameter(name).grad
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs.float())


def test_a_model_without_routers_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"^the model has no mixture of experts, .*: set model\.train to lora$"):
        unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_router_that_fails_keeps_its_weights() -> None:
    model = build("mixtral").bfloat16()  # type: ignore[operator]
    router: nn.Module = model.get_submodule("model.layers.0.mlp.gate")
    unfreeze(model)
    with pytest.raises(RuntimeError):
        router(torch.zeros(3, 5))
    assert router.weight is router.get_parameter("weight")
