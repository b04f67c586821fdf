"""Reconstruction against the formula on the model's own hidden states, and against one process and one dtype."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import CFSP, FASP, FLAP, LearnedGates, TwoSSP, prune
from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.load import load_pruned
from plprune.checkpoint.save import save_pruned
from plprune.pruning.calibration import Calibration
from plprune.pruning.repair import Repair
from plprune.pruning.surgery import plan_of
from tests.builders import logits, tiny, windows
from tests.ranks import in_ranks

METHODS: dict[str, Any] = {"FLAP": FLAP, "FASP": FASP, "CFSP": CFSP, "LearnedGates": LearnedGates, "TwoSSP": TwoSSP}
FAST = {"repair_passes": 4, "repair_rate": 0.01}
BOTH: tuple[Repair, ...] = ("restore", "reconstruct")
OWN: dict[str, dict[str, Any]] = {"TwoSSP": {"drop_attentions": 0}, "LearnedGates": {"gain_rate": 0.0}}


def pair(kind: str = "llama") -> dict[Repair, PreTrainedModel]:
    return {repair: tiny(kind) for repair in BOTH}


def states(model: PreTrainedModel, ids: Tensor, index: int) -> Tensor:  # [b, s] -> [b, s, d]
    """What leaves a block."""
    found: list[Any] = []
    keep = blocks_of(model)[index].module.register_forward_hook(lambda _, __, y: found.append(y))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    keep.remove()
    return found[0]


def distance(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, index: int) -> float:
    return float(error(states(model, ids, index), states(dense, ids, index)))


def error(ours: Tensor, dense: Tensor) -> Tensor:  # [b, s, d] each -> []
    return ((ours - dense).norm(dim=-1) / dense.norm(dim=-1)).square().mean()


@pytest.mark.parametrize("name", METHODS)
def test_by_every_method_the_hidden_states_come_closer_to_the_dense_ones(name: str) -> None:
    ids, own, dense = windows(16), FAST | OWN.get(name, {}), tiny()
    models = pair()
    plans = {repair: prune(model, METHODS[name](0.3, repair=repair, **own), [ids]) for repair, model in models.items()}
    after = {repair: distance(model, dense, ids, 2) for repair, model in models.items()}
    assert after["reconstruct"] < 0.9 * after["restore"]
    assert set(plans["reconstruct"].repaired) == {
        name for name, _ in models["reconstruct"].named_parameters() if ".layers." in name
    }
    if name != "FASP":  # it chooses by what the reconstructed blocks before give
        for group, kept in plans["restore"].keep.items():
            assert torch.equal(plans["reconstruct"].keep[group], kept)


def test_one_step_is_adam_by_the_gradient_of_the_error() -> None:
    ids, dense, rate = windows(4), tiny(), 0.005
    restored, trained = tiny(), tiny()
    prune(restored, CFSP(0.3, repair="restore"), [ids])
    prune(trained, CFSP(0.3, repair="reconstruct", repair_passes=1, repair_rate=rate), [ids])
    target, found = states(dense, ids, 0), []
    handle = blocks_of(restored)[0].module.register_forward_hook(lambda _, __, y: found.append(y))
    restored.requires_grad_(True)(input_ids=ids, use_cache=False)
    handle.remove()
    weights = dict(blocks_of(restored)[0].module.named_parameters())
    loss = error(found[0], target)
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    after = dict(blocks_of(trained)[0].module.named_parameters())
    for name, weight in weights.items():
        step = rate * weight.detach().square().mean().sqrt()
        expected = weight.detach() - step * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(after[name].detach(), expected, rtol=0, atol=0.01 * float(step))


def test_a_block_that_comes_no_closer_keeps_its_weights(caplog: pytest.LogCaptureFixture) -> None:
    ids = windows(8)
    restored, far = tiny(), tiny()
    prune(restored, CFSP(0.3, repair="restore"), list(ids.split(1)))
    with caplog.at_level(logging.WARNING, "plprune"):
        prune(far, CFSP(0.3, repair="reconstruct", repair_rate=1e4), [ids])
    assert torch.equal(logits(far), logits(restored))
    said = [record.getMessage() for record in caplog.records if "did not come closer" in record.getMessage()]
    assert len(said) == 3
    assert said[0] == (
        "model.layers.0 did not come closer to the dense model, and keeps its weights: lower `repair_rate`"
    )


def test_a_block_that_lost_nothing_is_left_alone() -> None:
    dense, model = tiny(), tiny()
    prune(model, CFSP(0.0, repair="reconstruct"), [windows()])
    assert torch.equal(logits(model), logits(dense))


def test_the_batch_size_does_not_matter() -> None:
    ids, models = windows(8), [tiny(), tiny()]
    for model, size in zip(models, (1, 8), strict=True):
        prune(model, FASP(0.3, repair="reconstruct", repair_passes=1), list(ids.split(size)))
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_weights_in_bfloat16_learn_too() -> None:
    ids, dense = windows(16), tiny().bfloat16()
    models = pair()
    for repair, model in models.items():
        prune(
            model.bfloat16(), CFSP(0.3, repair=repair, repair_rate=0.003), [ids]
        )  # steps below the rounding of a weight
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    after = {repair: distance(model.float(), copy.deepcopy(dense).float(), ids, 2) for repair, model in models.items()}
    assert after["reconstruct"] < 0.95 * after["restore"]


def test_what_is_saved_is_what_was_trained(tmp_path: Any) -> None:
    model = tiny()
    plan = prune(model, FASP(0.3, repair="reconstruct", repair_passes=1), [windows()])
    save_pruned(model, tmp_path / "out")
    again = load_pruned(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert plan_of(again).digest == plan.digest  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_blocks_with_experts_are_reconstructed(kind: str) -> None:
    ids, dense = windows(16), tiny(kind)
    models = pair(kind)
    for repair, model in models.items():
        prune(model, CFSP(0.25, repair=repair, repair_passes=4, repair_rate=0.01), [ids])
    after = {repair: distance(model, dense, ids, 3) for repair, model in models.items()}
    assert after["reconstruct"] < 0.95 * after["restore"]


@pytest.mark.parametrize("settings", [{"repair_passes": 0}, {"repair_rate": 0.0}, {"repair_rate": float("inf")}])
def test_settings_that_train_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one of `repair_passes`, and a positive `repair_rate`"):
        CFSP(0.3, **settings)


def _rank(ids: Tensor, name: str) -> dict[str, Tensor]:
    model = tiny()
    group = torch.distributed.group.WORLD
    prune(model, METHODS[name](0.3, repair="reconstruct", repair_passes=2), Calibration([ids], group=group))
    return {key: value.detach() for key, value in model.named_parameters()}


@pytest.mark.multi_process
@pytest.mark.parametrize("name", ["CFSP", "FASP"])
def test_two_processes_train_as_one(name: str) -> None:
    ids = windows(14)
    one, other = in_ranks(_rank, ids, name)
    for key, value in one.items():
        assert torch.equal(value, other[key])
    alone = tiny()
    prune(alone, METHODS[name](0.3, repair="reconstruct", repair_passes=2), [ids])
    for key, value in alone.named_parameters():
        torch.testing.assert_close(one[key], value.detach(), rtol=1e-3, atol=1e-4)
