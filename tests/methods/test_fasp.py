"""FASP, recomputed with torch.linalg.lstsq on the inputs that the pruned prefix produces."""

import copy
import random
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune import FASP, prune
from plprune.architecture.blocks import UnitGroup, blocks_of
from plprune.architecture.modules import innermost
from plprune.methods.fasp import column_score, kept_counts
from tests.builders import FAMILIES, tiny, windows
from tests.methods import best, inside_experts, traced, weight
from tests.zoo import build


def error(model: PreTrainedModel, ids: Tensor, block: int = 0) -> float:
    """How far a block's output is from the dense model's."""
    _, dense = traced(tiny(cast(str, model.config.model_type)), ids)
    _, pruned = traced(model, ids)
    return float((pruned[block + 1] - dense[block + 1]).norm())


def test_the_score_is_its_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 4, 2, generator=generator), torch.rand(4, 2, generator=generator)
    for unit in range(4):
        total = sum(float(w[i, unit, j].abs() * x[unit, j]) for j in range(2) for i in range(3))
        assert float(column_score(w, x)[unit]) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("attention", ["value_channels", "kv_heads", "none"])
def test_the_units_with_the_largest_scores_stay(attention: Any) -> None:
    model, ids = tiny(), windows()
    inputs, _ = traced(model, ids)
    groups = blocks_of(model)[0].groups(attention)
    scores = {}
    for group in groups:
        name = "blocks.0.ffn" if group.kind == "ffn" else "blocks.0.attention"
        norms = inputs[name].flatten(0, 1).norm(dim=0)
        column = weight(model, f"model.layers.0.{group.consumer.path}").abs().sum(0) * norms
        scores[group.name] = column[group.consumer.index].sum(1)
    plan = prune(model, FASP(0.3, attention=attention), list(ids.split(4)))
    for name, score in scores.items():
        assert plan.keep[name].tolist() == best(score, len(plan.keep[name]))
        assert 0 < len(plan.keep[name]) < len(score)


def prefix(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """The inputs of a dense block's down projection behind the pruned blocks before it, [tokens, n]."""
    hybrid = tiny()
    layers, pruned = (cast(nn.ModuleList, m.get_submodule("model.layers")) for m in (hybrid, model))
    for i in range(count):
        layers[i] = copy.deepcopy(pruned[i])
    inputs, _ = traced(hybrid, ids)
    return inputs[f"blocks.{count}.ffn"].flatten(0, 1)


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kept_columns_are_the_least_squares_solution_behind_the_pruned_prefix(block: int, bias: bool) -> None:
    model, ids = tiny(), windows(12, 16)
    plan = prune(model, FASP(0.3, attention="none", damping=0.0, bias=bias), [ids])
    x, keep = prefix(model, ids, block), plan.keep[f"blocks.{block}.ffn"]
    path = f"model.layers.{block}.mlp.down_proj"
    targets, inputs = x @ weight(tiny(), path).T, x[:, keep]
    if bias:
        inputs = torch.cat([inputs, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(inputs, targets).solution.float()
    linear = innermost(model.get_submodule(path))
    torch.testing.assert_close(linear.weight.detach(), solution[: len(keep)].T, rtol=1e-3, atol=2e-4)
    if bias:
        torch.testing.assert_close(linear.bias.detach(), solution[-1], rtol=1e-3, atol=2e-4)
    else:
        assert linear.bias is None


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "olmo2", "cohere2"])
@pytest.mark.parametrize("attention", ["value_channels", "kv_heads", "none"])
def test_restoration_brings_the_block_closer_to_the_dense_one(family: str, attention: Any) -> None:
    ids, errors = windows(), []
    all_settings: list[Any] = [{"repair": "none"}, {"repair": "compensate"}, {}]
    for settings in all_settings:
        model = tiny(family)
        prune(model, FASP(0.3, attention=attention, **settings), [ids])
        errors.append(error(model, ids))
    bare, compensated, restored = errors
    assert restored < 0.95 * compensated
    assert restored < 0.95 * bare


def test_restoration_keeps_the_mean_output_of_the_ffn() -> None:
    model, ids = tiny(), windows()
    prune(model, FASP(0.4, attention="none"), [ids])
    _, dense = traced(tiny(), ids)
    _, pruned = traced(model, ids)
    torch.testing.assert_close(pruned[1].mean((0, 1)), dense[1].mean((0, 1)), rtol=1e-5, atol=1e-5)


def test_queries_and_keys_are_never_pruned() -> None:
    model, dense = tiny(), tiny().state_dict()
    prune(model, FASP(0.5), [windows()])
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            assert torch.equal(tensor, dense[name])


def test_every_block_keeps_the_same_numbers() -> None:
    plan = prune(tiny(), FASP(0.3), [windows()])
    assert len({len(keep) for name, keep in plan.keep.items() if "value" in name}) == 1
    assert len({len(keep) for name, keep in plan.keep.items() if "ffn" in name}) == 1


@pytest.mark.parametrize(
    ("settings", "repaired"),
    [
        ({}, {"weight", "bias"}),
        ({"bias": False}, {"weight"}),
        ({"repair": "compensate"}, {"bias"}),
        ({"repair": "none"}, set()),
    ],
)
def test_the_plan_names_what_was_repaired(settings: dict[str, Any], repaired: set[str]) -> None:
    model = tiny()
    plan = prune(model, FASP(0.3, **settings), [windows()])
    assert {name.rpartition(".")[2] for name in plan.repaired} == repaired
    assert len(plan.repaired) == len(set(plan.repaired)) == 6 * len(repaired)
    assert set(plan.repaired) <= set(dict(model.named_parameters()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["value_channels", "kv_heads", "none"])
def test_kept_counts_meet_the_budget_within_half_a_channel(family: str, attention: Any) -> None:
    block = blocks_of(tiny(family))[0]
    groups: list[UnitGroup] = block.groups(attention)
    total = sum(len(g) * block.cost(g) for g in groups)
    dice, met = random.Random(0), 0
    for fraction in [0.0, *(dice.random() for _ in range(40))]:
        try:
            counts = kept_counts(block, groups, fraction)
        except ValueError as reason:
            assert "ask for a lower sparsity" in str(reason) and fraction > 0.7  # noqa: PT017, PT018
            continue
        met += 1
        assert all(1 <= count <= len(group) for count, group in zip(counts, groups, strict=True))
        left = sum(count * block.cost(group) for count, group in zip(counts, groups, strict=True))
        assert abs(total * (1 - fraction) - left) <= block.cost(groups[-1]) / 2
    assert met > 25


def test_too_few_tokens_to_restore_from_are_refused_without_damping() -> None:
    with pytest.raises(ValueError, match="raise `damping`, or num_samples"):
        prune(tiny(), FASP(0.2, damping=0.0), [windows(1, 4)])
    assert prune(tiny(), FASP(0.2), [windows(1, 4)]).reached > 0.15


def test_channels_of_experts_leave_by_their_columns() -> None:
    model, ids = build("mixtral"), windows(4, 64)
    inner = inside_experts(model, ids)["blocks.0.expert_channel"]  # later blocks see what is pruned before them
    down = blocks_of(model)[0].weight(blocks_of(model)[0].groups("none")[0]).detach().double()
    keep = prune(model, FASP(0.25, attention="none"), list(ids.split(2))).keep["blocks.0.expert_channel"]
    for expert, x in enumerate(inner):
        assert keep[expert].tolist() == best(down[:, expert].abs().sum(0) * x.norm(dim=0), keep.shape[1])
