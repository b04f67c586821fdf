"""Full fine-tuning: which parameters are trained, and in which dtypes they are saved."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from plprune import CFSP, prune
from plprune.recovery.full import unfreeze
from plprune.recovery.lora import merged_state
from plprune.recovery.masters import weights_in_saved_dtype
from plprune.recovery.whole_weights import unfreeze as unfreeze_any
from tests.builders import FAMILIES, logits, tiny, windows
from tests.zoo import build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_trained_and_gets_a_gradient(family: str) -> None:
    model = tiny(family)
    assert unfreeze(model) == [name for name, _ in model.named_parameters()]
    model(input_ids=windows(2), labels=windows(2), use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_the_family_does_not_train_stays_frozen() -> None:
    model = build("afmoe")
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - own
    assert frozen
    assert set(unfreeze(model)) == own


def test_the_towers_of_a_model_that_sees_stay_frozen() -> None:
    model = build("gemma3")
    names = set(unfreeze(model))
    assert names == {name for name, _ in model.named_parameters() if "vision" not in name and "projector" not in name}
    assert names < {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba-mixture"])
def test_masters_in_float32_are_saved_in_the_dtype_that_each_had(family: str) -> None:
    model = mixed(family)
    unfreeze_any(model, "all", prune(model, CFSP(0.3), [windows()]))
    before = copy.deepcopy(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)  # not numbers that bfloat16 has
    dtypes = {name: p.dtype for name, p in mixed(family).named_parameters()}
    assert len(set(dtypes.values())) == (2 if family == "mamba-mixture" else 1)
    state = dict(merged_state(model, lambda p: p.detach()))
    with weights_in_saved_dtype(model):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtypes[name] == state[name].dtype, name
            assert torch.equal(parameter, state[name])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(logits(model), logits(before))


def mixed(family: str) -> PreTrainedModel:
    """A model in bfloat16; one with Mamba keeps some parameters in float32, in the same modules as others."""
    if family != "mamba-mixture":
        return tiny(family).bfloat16()  # type: ignore[operator]
    model = build("nemotron_h").bfloat16()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", ".D")):
            parameter.data = parameter.data.float()
    return model
