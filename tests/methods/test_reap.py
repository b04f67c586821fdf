"""REAP, recomputed from the router's logits and the stacked weights of the dense model."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import REAP, prune
from tests.builders import logits, tiny, windows
from tests.zoo import build


@torch.no_grad()
def judged(model: PreTrainedModel, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each block of a Mixtral the saliency of its experts, and how many tokens each has."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for i, layer in enumerate(model.model.layers):

        def hook(mlp: Any, args: Any, i: int = i) -> None:
            x = args[0].flatten(0, -2).double()
            chosen = (x @ mlp.gate.weight.double().T).softmax(-1).topk(2)
            weights = chosen.values / chosen.values.sum(-1, keepdim=True)
            gates, ups = mlp.experts.gate_up_proj.double().chunk(2, 1)
            saliency, tokens = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
            for e in range(8):
                out = (torch.nn.functional.silu(x @ gates[e].T) * (x @ ups[e].T)) @ mlp.experts.down_proj[e].double().T
                own = (weights * (chosen.indices == e)).sum(-1)
                tokens[e] = (own > 0).sum()
                saliency[e] = (own * out.norm(dim=-1)).sum() / tokens[e].clamp(min=1)
            found[f"blocks.{i}.expert"] = saliency, tokens

        layer.mlp.register_forward_pre_hook(hook)
    model(input_ids=ids, use_cache=False)
    return found


@pytest.mark.parametrize("score", ["saliency", "frequency"])
def test_the_experts_with_the_largest_scores_stay(score: Any) -> None:
    ids = windows(4, 12)
    expected = judged(build("mixtral"), ids)
    plan = prune(build("mixtral"), REAP(0.375, score=score, sparsity_of="experts"), list(ids.split(2)))
    assert plan.keep.keys() == expected.keys()
    for name, keep in plan.keep.items():
        values = expected[name][score == "frequency"].tolist()
        assert keep.tolist() == sorted(sorted(range(8), key=lambda e: (-values[e], e))[:5])


def test_what_is_kept_computes_as_if_the_router_saw_no_others() -> None:
    model, masked = build("mixtral"), build("mixtral")
    plan = prune(model, REAP(0.5, sparsity_of="experts"), [windows(4, 12)])
    for i, layer in enumerate(masked.model.layers):
        keep = plan.keep[f"blocks.{i}.expert"]

        def only(gate: Any, args: Any, output: Any, keep: Tensor = keep) -> Any:
            scores = torch.full_like(output[0], -torch.inf)
            scores[:, keep] = output[0][:, keep]
            chosen = scores.softmax(-1).topk(2)
            return scores, chosen.values / chosen.values.sum(-1, keepdim=True), chosen.indices

        layer.mlp.gate.register_forward_hook(only)
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-4, atol=1e-5)


def test_groups_of_experts_stay_equal() -> None:
    plan = prune(build("deepseek_v3"), REAP(0.5, sparsity_of="experts"), [windows(4, 12)])
    for keep in plan.keep.values():
        assert [int((keep // 4 == group).sum()) for group in (0, 1)] == [2, 2]


def test_the_sparsity_is_of_the_blocks() -> None:
    model = build("mixtral")
    plan = prune(model, REAP(0.35), [windows(4, 12)])
    experts = 3 * 64 * 96 + 64  # parameters of one, with its row of the router
    gone = {plan.sizes[name] - len(keep) for name, keep in plan.keep.items()}
    assert gone == {3}
    assert sum(plan.before) - sum(plan.after) == 4 * 3 * experts
    assert plan.reached == pytest.approx(0.35, abs=0.5 * 4 * experts / sum(plan.before))


@pytest.mark.parametrize("few", ["judge", "keep"])
def test_experts_with_few_tokens_are_told(few: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids = windows(4, 12)
    tokens = {name: n for name, (_, n) in judged(build("mixtral"), ids).items()}
    with caplog.at_level(logging.WARNING):
        plan = prune(build("mixtral"), REAP(0.25, sparsity_of="experts", few_tokens=few), [ids])
    total = sum(int((n < 8).sum()) for n in tokens.values())
    assert f"{total} of 32 experts saw fewer than 8 calibration tokens" in caplog.text
    spared = all(
        set((tokens[name] < 8).nonzero().flatten().tolist()) <= set(keep.tolist()) for name, keep in plan.keep.items()
    )
    assert spared == (few == "keep")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"sparsity": 0.9, "sparsity_of": "experts"},
            "1 of 8 experts would stay, and the router needs 2; ask for at most 0.750",
        ),
        ({"sparsity": 0.01}, "less than half of 1 of 8 experts in each block; ask for 0.115"),
        ({"few_tokens": "refuse", "min_tokens": 30}, "use more text, or set `few_tokens` to judge or keep"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_alone(settings: dict[str, Any], said: str) -> None:
    model = build("mixtral")
    before = logits(model)
    with pytest.raises(ValueError, match=said):
        prune(model, REAP(**settings), [windows(4, 12)])
    assert torch.equal(logits(model), before)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="REAP prunes experts, and the model has none"):
        prune(tiny(), REAP(0.25), [windows()])
