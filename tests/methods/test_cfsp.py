"""CFSP, recomputed from hooks on the dense model."""

import itertools
import math
import random
from typing import Any

import pytest
import torch

from plprune import CFSP, prune
from plprune.methods.cfsp import relative_score
from plprune.pruning.allocation import kept_fractions
from plprune.pruning.statistics import Distance
from tests.builders import tiny, windows
from tests.methods import best, inside_experts, traced
from tests.zoo import build


def widths(plan: Any) -> list[int]:
    return [len(keep) for keep in plan.keep.values()]


@pytest.mark.parametrize("distance", ["angular", "cosine", "mse", "mae"])
def test_widths_follow_the_blocks_distances(distance: Distance) -> None:
    model, ids = tiny(), windows()
    _, states = traced(model, ids)
    pairs = [(x.flatten(0, 1), y.flatten(0, 1)) for x, y in itertools.pairwise(states)]
    cosines = [torch.cosine_similarity(x, y) for x, y in pairs]
    moved = {
        "angular": [float(c.arccos().mean()) / math.pi for c in cosines],
        "cosine": [float((1 - c).mean()) for c in cosines],
        "mse": [float((x - y).square().mean()) for x, y in pairs],
        "mae": [float((x - y).abs().mean()) for x, y in pairs],
    }[distance]
    u = [1 / (1 + math.exp(-13.1072 * 2 * (s - sum(moved) / 3))) for s in moved]
    plan = prune(model, CFSP(0.3, distance=distance, a=2.0, sparsity_of="ffn"), list(ids.split(4)))
    assert plan.importance.tolist() == pytest.approx(u, rel=1e-4)
    keep = [x / (sum(u) / 3) * 0.7 for x in u]
    if max(keep) >= 1:  # drawn toward the mean, as in the authors' code
        mean = sum(u) / 3
        f = mean * (1 / 0.7 - 1) / (max(u) - mean) / 1.05
        keep = [(mean + (x - mean) * f) / mean * 0.7 for x in u]
    assert sum(widths(plan)) == round(3 * 48 * 0.7)
    assert all(abs(width - 48 * k) < 1 for width, k in zip(widths(plan), keep, strict=True))


@pytest.mark.parametrize("settings", [{"distance": "uniform"}, {"a": 0.0}])
def test_blocks_of_the_same_importance_have_the_same_width(settings: dict[str, Any]) -> None:
    plan = prune(tiny(), CFSP(0.25, sparsity_of="ffn", **settings), [windows()])
    assert widths(plan) == [36, 36, 36]


@pytest.mark.parametrize("settings", [{}, {"c": 2.0}, {"b": 3.0}])
def test_the_channels_with_the_largest_activations_stay(settings: dict[str, Any]) -> None:
    model, ids = tiny(), windows()
    inputs, _ = traced(model, ids)
    for name, keep in prune(model, CFSP(0.3, **settings), [ids]).keep.items():
        assert keep.tolist() == best(inputs[name].flatten(0, 1).norm(dim=0), len(keep))


def test_an_exponent_of_zero_makes_all_channels_equal() -> None:
    plan = prune(tiny(), CFSP(0.3, c=0.0), [windows()])
    assert all(keep.tolist() == list(range(len(keep))) for keep in plan.keep.values())


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_the_relative_score_is_of_the_weights_of_its_own_block(family: str) -> None:
    model, ids = tiny(family), windows()
    inputs, _ = traced(model, ids)
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    paths = {
        "llama": ("model.layers.{}.mlp.down_proj", ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"]),
        "phi3": ("model.layers.{}.mlp.down_proj", ["model.layers.{}.mlp.gate_up_proj"]),
        "opt": ("model.decoder.layers.{}.fc2", ["model.decoder.layers.{}.fc1"]),
    }
    plan = prune(model, CFSP(0.3, score="relative", b=2.0, c=0.5), [ids])
    out, into = paths[family]
    for i in range(3):
        producers = [state[f"{path.format(i)}.weight"] for path in into]
        if family == "phi3":
            producers = list(producers[0].chunk(2))
        norm = inputs[f"blocks.{i}.ffn"].flatten(0, 1).norm(dim=0)
        score = relative_score(state[f"{out.format(i)}.weight"], producers, norm, 2.0, 0.5)
        keep = plan.keep[f"blocks.{i}.ffn"]
        assert keep.tolist() == best(score, len(keep))


def test_the_relative_score_is_its_triple_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    down, x = torch.randn(3, 5, generator=generator).double(), torch.rand(5, generator=generator).double()
    up, gate = torch.randn(2, 5, 3, generator=generator).double()
    b, c, d, n = 1.5, 0.5, 3, 5
    for j in range(n):
        total = 0.0
        for i in range(d):
            total += abs(down[i, j]) * x[j] ** b / sum(abs(down[i, k]) * x[k] ** b for k in range(n))
            for w in (up, gate):
                total += abs(w[j, i]) / sum(abs(w[k, i]) for k in range(n))
        score = relative_score(down, [up, gate], x, b, c)[j]
        assert float(score) == pytest.approx(float(total / d * x[j] ** c), rel=1e-12)


def test_the_sum_over_the_axis_of_the_mean_would_cancel_the_weights() -> None:
    down, x = torch.randn(6, 5).double(), torch.rand(5).double()
    official = (down.abs() * x / (down.abs() * x).sum(0)).mean(0) * x
    torch.testing.assert_close(official, x / 6)


def test_kept_fractions_keep_their_mean_and_their_order_and_stay_below_1() -> None:
    dice = random.Random(0)
    drawn = 0
    for _ in range(300):
        u = torch.tensor([dice.random() ** dice.choice([1, 4]) + 1e-3 for _ in range(dice.randint(2, 40))]).double()
        p = dice.uniform(0.01, 0.95)
        k = kept_fractions(u, p)
        assert float(k.mean()) == pytest.approx(1 - p, rel=1e-9)
        assert float(k.max()) < 1
        assert torch.equal(k.argsort(stable=True), u.argsort(stable=True))
        if float(u.max() / u.mean()) * (1 - p) < 1:
            torch.testing.assert_close(k, u / u.mean() * (1 - p))
        else:
            drawn += 1
            assert float(k.max()) == pytest.approx(1 - p + p / 1.05, rel=1e-9)
    assert 50 < drawn < 250


def test_kept_fractions_are_of_all_channels_when_widths_differ() -> None:
    u, sizes = torch.tensor([0.9, 0.5, 0.2]).double(), [10, 80, 60]
    for p in (0.1, 0.5):
        k = kept_fractions(u, p, sizes)
        assert sum(n * float(x) for n, x in zip(sizes, k, strict=True)) == pytest.approx(150 * (1 - p))
        assert float(k.max()) < 1


def test_a_ragged_model_is_pruned_to_its_budget_too() -> None:
    model = tiny(intermediate_size=200)
    for _ in range(3):
        plan = prune(model, CFSP(0.2, a=40.0), [windows()])
        channel = 3 * 32
        assert sum(plan.before) - sum(plan.after) == pytest.approx(0.2 * sum(plan.before), abs=channel / 2 + 1)
        assert all(len(keep) <= plan.sizes[name] for name, keep in plan.keep.items())


@pytest.mark.parametrize("multiple", [4, 16])
def test_widths_are_the_nearest_multiples(multiple: int) -> None:
    free = widths(prune(tiny(), CFSP(0.3), [windows()]))
    rounded = widths(prune(tiny(), CFSP(0.3, multiple_of=multiple), [windows()]))
    assert all(width % multiple == 0 and width >= multiple for width in rounded)
    assert all(abs(a - b) <= multiple / 2 + 1 for a, b in zip(free, rounded, strict=True))


@pytest.mark.parametrize(("sparsity", "width"), [(0.95, 30), (0.05, 48)])
def test_widths_are_at_least_one_multiple_and_at_most_what_there_is(sparsity: float, width: int) -> None:
    method = CFSP(sparsity, distance="uniform", sparsity_of="ffn", multiple_of=30)
    assert widths(prune(tiny(), method, [windows()])) == [width] * 3


def test_sparsity_may_be_counted_as_the_paper_does() -> None:
    ours, paper = (prune(tiny(), CFSP(0.2, sparsity_of=of), [windows()]) for of in ("blocks", "ffn"))  # type: ignore[arg-type]
    assert ours.reached == pytest.approx(0.2, abs=0.003)
    assert sum(widths(paper)) == round(0.8 * 3 * 48)


def test_fewer_channels_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 FFN channels in 3 blocks: ask for a lower sparsity"):
        prune(tiny(), CFSP(0.99, sparsity_of="ffn"), [windows()])


def test_attention_is_untouched() -> None:
    model, dense = tiny(), tiny().state_dict()
    prune(model, CFSP(0.4), [windows()])
    untouched = {n: t for n, t in model.state_dict().items() if ".mlp." not in n}
    assert untouched
    assert all(torch.equal(t, dense[n]) for n, t in untouched.items())


@pytest.mark.parametrize("score", ["activation", "relative"])
def test_each_expert_keeps_channels_of_its_own(score: Any) -> None:
    model, ids = build("mixtral"), windows(4, 64)
    inner = inside_experts(model, ids)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    plan = prune(model, CFSP(0.25, score=score), list(ids.split(2)))
    assert plan.reached == pytest.approx(0.25, abs=0.02)
    for i, (name, keep) in enumerate(plan.keep.items()):
        assert keep.shape[0] == 8
        assert keep.shape[1] % 8 == 0
        for expert, x in enumerate(inner[name]):
            values = x.norm(dim=0)
            if score == "relative":
                rows = weights[f"model.layers.{i}.mlp.experts.gate_up_proj"][expert].chunk(2)
                down = weights[f"model.layers.{i}.mlp.experts.down_proj"][expert].abs() * values
                terms = (down / down.sum(1, keepdim=True)).mean(0)
                for row in rows:
                    terms = terms + (row.abs() / row.abs().sum(0)).mean(1)
                values = terms * values
            assert len(x) >= 8
            assert keep[expert].tolist() == best(values, keep.shape[1])
