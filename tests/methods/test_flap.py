"""FLAP, recomputed from hooks on the dense model."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import FLAP, prune
from plprune.architecture.blocks import blocks_of
from plprune.architecture.cutting import complement
from plprune.architecture.modules import innermost
from plprune.methods.flap import fluctuation, weighted_norm
from plprune.planning.structures import standardised
from plprune.pruning.allocation import global_ranking
from tests.builders import tiny, windows
from tests.methods import best, inside_experts, traced, weight
from tests.methods.test_reap import judged
from tests.zoo import build

D, G, HD, N = 32, 2, 4, 48  # of the tiny Llama: width, query heads per kv head, head dimension, FFN width
HEAD, CHANNEL = 2 * G * HD * D + 2 * HD * D, 3 * D
CONSUMERS = {"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"}


def running(x: Tensor) -> Tensor:  # [samples, tokens, features]
    """The authors' recursion."""
    mean = f = torch.zeros(x.shape[-1], dtype=torch.float64)
    for k, sample in enumerate(x):
        mean = mean * k / (k + 1) + sample.mean(0) / (k + 1)
        f = f * (k - 1) / k + (sample - mean).square().sum(0) / (k + 1) if k else f
    return f / x.shape[1]


def scores(model: PreTrainedModel, ids: Tensor, method: FLAP) -> dict[str, Tensor]:  # [units, channels per unit]
    inputs, _ = traced(model, ids)
    found = {}
    for name, x in inputs.items():
        _, block, kind = name.split(".")
        w, flat = weight(model, f"model.layers.{block}.{CONSUMERS[kind]}"), x.flatten(0, 1)
        variance = running(x) if method.variance == "running" else flat.var(0)
        channels = {
            "WIFV": variance * w.square().sum(0),
            "IFV": variance,
            "WIFN": w.abs().mean(0) * flat.norm(dim=0),
        }[method.metric]
        if kind == "attention":
            channels = channels.square() if method.square_attention else channels
        found[name] = channels.view(-1, G * HD if kind == "attention" else 1)
    return found


def z_scores(score: Tensor) -> Tensor:
    return ((score - score.mean()) / score.flatten().std()).mean(1)


@pytest.mark.parametrize(
    "method",
    [
        FLAP(0.3),
        FLAP(0.3, variance="unbiased"),
        FLAP(0.3, metric="IFV"),
        FLAP(0.3, metric="WIFN"),
        FLAP(0.3, square_attention=False),
        FLAP(0.3, repair="none"),
        FLAP(0.3, sparsity_of="linears"),
    ],
    ids=str,
)
def test_one_ranking_of_everything(method: FLAP) -> None:
    model, ids = tiny(), windows()
    units = [
        (float(z), HEAD if "attention" in name else CHANNEL, name, i)
        for name, score in scores(model, ids, method).items()
        for i, z in enumerate(z_scores(score))
    ]
    total = sum(cost for _, cost, _, _ in units)
    remove = method.sparsity * total
    if method.sparsity_of == "blocks":  # the norms stay, and a bias comes to every consumer
        remove = method.sparsity * (total + 3 * 2 * D) + (6 * D if method.biased else 0)
    units.sort(reverse=True)
    off = [abs(sum(cost for _, cost, _, _ in units[:k]) - (total - remove)) for k in range(len(units) + 1)]
    kept = units[: off.index(min(off))]
    plan = prune(model, method, list(ids.split(4)))
    for name, keep in plan.keep.items():
        assert keep.tolist() == sorted(i for _, _, group, i in kept if group == name)


def test_the_bias_gains_what_the_removed_channels_gave_on_average_in_the_dense_model() -> None:
    model, ids = tiny(), windows()
    inputs, _ = traced(model, ids)
    dense = {name: weight(model, f"model.layers.{name[7]}.{CONSUMERS[name[9:]]}") for name in inputs}
    plan = prune(model, FLAP(0.3), [ids])
    groups = {group.name: group for block in blocks_of(tiny()) for group in block.groups()}
    for name, keep in plan.keep.items():
        gone = groups[name].consumer.index[complement(keep, len(groups[name]))].flatten()
        path = f"model.layers.{name[7]}.{CONSUMERS[name[9:]]}"
        bias = innermost(model.get_submodule(path)).bias
        assert (bias is None) == (not len(gone)) == (f"{path}.bias" not in plan.repaired)
        if bias is None:
            continue
        gain = dense[name][:, gone] @ inputs[name].mean((0, 1))[gone]
        torch.testing.assert_close(bias.detach(), gain.float(), rtol=1e-5, atol=1e-6)
    assert len(plan.repaired) >= 4


def test_without_compensation_nothing_is_repaired() -> None:
    model = tiny()
    assert prune(model, FLAP(0.3, repair="none"), [windows()]).repaired == []
    assert all(innermost(b.part(g.consumer.path)).bias is None for b in blocks_of(model) for g in b.groups())


def test_within_each_block_the_same_fraction_of_each_kind_goes_rounded_down() -> None:
    method, ids = FLAP(0.3, structure="UL-UM", sparsity_of="linears"), windows()
    expected = scores(tiny(), ids, method)
    plan = prune(tiny(), method, [ids])
    for name, keep in plan.keep.items():
        score = expected[name].sum(1)
        count = 4 - int(0.3 * 4) if "attention" in name else 48 - int(0.3 * 48)
        assert keep.tolist() == best(score, count)


@pytest.mark.parametrize(("sparsity", "heads", "channels"), [(0.25, 3, 36), (0.3125, 3, 33), (0.2499, 4, 37)])
def test_a_fraction_that_comes_out_even_is_not_rounded_below_itself(sparsity: float, heads: int, channels: int) -> None:
    plan = prune(tiny(), FLAP(sparsity, structure="UL-UM", sparsity_of="linears"), [windows()])
    assert [len(keep) for keep in plan.keep.values()] == [heads, channels] * 3


def test_a_given_number_of_heads_goes_and_channels_give_the_rest_in_one_ranking_per_kind() -> None:
    method, ids = FLAP(0.3, structure="AL-MM", remove_heads=4, sparsity_of="linears"), windows()
    expected = scores(tiny(), ids, method)
    plan = prune(tiny(), method, [ids])
    total = 3 * (4 * HEAD + N * CHANNEL)
    for kind, count in (("attention", 12 - 4), ("ffn", 3 * N - int((0.3 * total - 4 * HEAD) / CHANNEL))):
        ranked = [(float(z), n, i) for n, s in expected.items() if kind in n for i, z in enumerate(z_scores(s))]
        kept = sorted(ranked, reverse=True)[:count]
        for name in (n for n in expected if kind in n):
            assert plan.keep[name].tolist() == sorted(i for _, n, i in kept if n == name)


def test_a_given_number_of_heads_is_spread_evenly_over_the_blocks() -> None:
    plan = prune(tiny(), FLAP(0.3, structure="UL-MM", remove_heads=6, sparsity_of="linears"), [windows()])
    left = 0.3 * (4 * HEAD + N * CHANNEL) - 2 * HEAD
    assert [len(keep) for keep in plan.keep.values()] == [2, N - int(left / CHANNEL)] * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"structure": "UL-MM", "remove_heads": 12},
        {"structure": "AL-MM", "remove_heads": 10},
        {"structure": "AL-MM", "remove_heads": -1},
        {"structure": "AL-MM", "remove_heads": 9, "sparsity": 0.1},
        {"structure": "UL-MM", "remove_heads": 0, "sparsity": 0.75},
    ],
)
def test_heads_that_do_not_fit_the_budget_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="change `sparsity` or `remove_heads`"):
        prune(tiny(), FLAP(**settings), [windows()])


def brute_force(scores: list[list[float]], costs: list[int], p: float) -> list[list[int]] | None:
    """The number of units whose cost is nearest to what may stay, of all numbers; None if not each group gets one."""
    first = [(g, max(range(len(s)), key=lambda i: (s[i], -i))) for g, s in enumerate(scores)]
    rest = [(g, i) for g, s in enumerate(scores) for i in range(len(s)) if (g, i) not in first]
    order = first + sorted(rest, key=lambda unit: -scores[unit[0]][unit[1]])
    target = (1 - p) * sum(c * len(s) for c, s in zip(costs, scores, strict=True))
    spent, off = 0, []
    for group, _ in order:
        spent += costs[group]
        off.append(abs(spent - target))
    count = off.index(min(off)) + 1
    kept = order[:count]
    return [sorted(i for g, i in kept if g == j) for j in range(len(scores))] if count >= len(scores) else None


def test_the_global_ranking_is_the_nearest_of_all_counts() -> None:
    dice, refused = random.Random(0), 0
    for _ in range(200):
        groups = [[dice.gauss(0, 1) for _ in range(dice.randint(1, 9))] for _ in range(dice.randint(1, 6))]
        costs, p = [dice.choice([1, 1, 7, 170]) for _ in groups], dice.random()
        expected = brute_force(groups, costs, p)
        tensors = [torch.tensor(g, dtype=torch.float64) for g in groups]
        if expected is None:
            refused += 1
            with pytest.raises(ValueError, match="keeps its best head"):
                global_ranking(tensors, costs, p)
        else:
            assert [keep.tolist() for keep in global_ranking(tensors, costs, p)] == expected
    assert 0 < refused < 100


def test_the_cheapest_units_make_up_for_what_dear_ones_miss_by_their_rank() -> None:
    dice, changed = random.Random(1), 0
    for _ in range(200):
        groups = [[dice.gauss(0, 1) for _ in range(dice.randint(20, 30))] for _ in range(6)]
        costs, p = [1, 1, 1, 1, 7, 12], dice.uniform(0.2, 0.6)
        tensors = [torch.tensor(g, dtype=torch.float64) for g in groups]
        nearest, exact = (global_ranking(tensors, costs, p, each) for each in (False, True))
        whole = sum(cost * len(g) for cost, g in zip(costs, groups, strict=True))
        spent = sum(cost * len(keep) for cost, keep in zip(costs, exact, strict=True))
        assert abs(spent - (1 - p) * whole) <= 0.5
        assert [keep.tolist() for keep in exact[4:]] == [keep.tolist() for keep in nearest[4:]]
        for scores, keep in zip(tensors[:4], exact[:4], strict=True):
            assert sorted(keep.tolist()) == sorted(scores.topk(len(keep)).indices.tolist())
        kept, gone = (
            [
                float(s[i])
                for s, keep in zip(tensors[:4], exact[:4], strict=True)
                for i in range(len(s))
                if (i in keep) == k
            ]
            for k in (True, False)
        )
        best = {float(s.max()) for s in tensors}  # these stay whatever they score
        assert min([score for score in kept if score not in best], default=9.0) > max(gone, default=-9.0)
        changed += [keep.tolist() for keep in exact] != [keep.tolist() for keep in nearest]
    assert changed > 100


def test_the_last_unit_of_a_group_is_protected_whatever_its_score() -> None:
    keep = global_ranking([torch.tensor([-9.0, -8.0]), torch.arange(20.0)], [1, 1], 0.5)
    assert keep[0].tolist() == [1]
    assert keep[1].tolist() == list(range(10, 20))


def test_metrics_are_their_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    w, v = torch.randn(3, 4, generator=generator), torch.rand(4, generator=generator)
    for j in range(4):
        column = [float(w[i, j]) for i in range(3)]
        assert float(fluctuation(w, v)[j]) == pytest.approx(float(v[j]) * sum(x * x for x in column), rel=1e-5)
        assert float(weighted_norm(w, v)[j]) == pytest.approx(float(v[j]) * sum(map(abs, column)) / 3, rel=1e-5)


def test_standardised_scores_have_mean_0_and_spread_1() -> None:
    score = torch.randn(12, 1, dtype=torch.float64) * 7 + 3
    z = standardised(score)
    torch.testing.assert_close((z.mean(), z.std()), (torch.zeros_like(z[0]), torch.ones_like(z[0])))
    heads = standardised(score.view(4, 3))
    torch.testing.assert_close(heads, z.view(4, 3).mean(1))
    assert torch.equal(standardised(torch.full((5, 1), 2.0)), torch.zeros(5))
    assert torch.equal(standardised(torch.ones(1, 1)), torch.zeros(1))


def test_channels_of_experts_compete_with_heads() -> None:
    model, ids = build("mixtral"), windows(4, 64)
    inner = inside_experts(model, ids)
    down = {name: p.detach().double() for name, p in model.named_parameters() if name.endswith("experts.down_proj")}
    plan = prune(model, FLAP(0.25, variance="unbiased"), list(ids.split(2)))
    assert plan.reached == pytest.approx(0.25, abs=0.02)
    kinds = {name.rpartition(".")[2]: keep for name, keep in plan.keep.items()}
    assert kinds.keys() == {"attention", "expert_channel"}
    assert not any(name.endswith("experts.down_proj") for name in plan.repaired)
    for i in range(4):
        keep = plan.keep[f"blocks.{i}.expert_channel"]
        assert keep.shape[1] % 8 == 0
        for expert, x in enumerate(inner[f"blocks.{i}.expert_channel"]):
            score = x.var(0) * down[f"model.layers.{i}.mlp.experts.down_proj"][expert].square().sum(0)
            assert keep[expert].tolist() == best(score, keep.shape[1])


def test_structures_that_count_channels_alike_are_refused_for_experts() -> None:
    with pytest.raises(ValueError, match="set `structure` to AL-AM or UL-UM"):
        prune(build("mixtral"), FLAP(0.25, structure="AL-MM"), [windows()])


def test_whole_experts_leave_by_saliency_beside_the_channels_of_the_others() -> None:
    model, ids = build("mixtral"), windows(4, 64)
    expected = judged(build("mixtral"), ids)
    plan = prune(model, FLAP(0.4, experts=True), list(ids.split(2)))
    assert plan.reached == pytest.approx(0.4, abs=0.02)
    (count,) = {len(keep) for name, keep in plan.keep.items() if name.endswith("expert")}
    assert 2 <= count < 8
    for name, (saliency, _) in expected.items():
        assert plan.keep[name].tolist() == saliency.topk(count).indices.sort().values.tolist()
        assert plan.keep[f"{name}_channel"].shape == (count, blocks_of(model)[int(name.split(".")[1])].expert_width)


def test_experts_are_ranked_with_all_units_or_not_at_all() -> None:
    with pytest.raises(ValueError, match="`experts` ranks experts with all other units: set `structure` to AL-AM"):
        FLAP(0.3, structure="UL-UM", experts=True)
    with pytest.raises(ValueError, match="FLAP prunes experts, and the model has none that can leave"):
        prune(tiny(), FLAP(0.3, experts=True), [windows()])
