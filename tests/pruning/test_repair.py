"""Closed forms and the walk that repairs against torch.linalg.lstsq on the inputs themselves."""

import copy
import logging
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune import CFSP, FASP, FLAP, TwoSSP, prune
from plprune.architecture.blocks import blocks_of
from plprune.architecture.cutting import complement
from plprune.architecture.modules import innermost
from plprune.methods.base import Repairing
from plprune.planning.sizes import Ledger
from plprune.pruning.constraints import Constraint
from plprune.pruning.expert_inputs import watched
from plprune.pruning.repair import DAMPINGS, compensation, held_out_errors, restore
from tests.builders import tiny, windows
from tests.methods import traced, weight
from tests.zoo import build

KEEP = torch.tensor([0, 2, 3, 6])


def problem(tokens: int = 60, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """A weight [5, 8], and correlated inputs [tokens, 8]."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, 8, generator=generator, dtype=torch.float64) @ mix + offset
    return torch.randn(5, 8, generator=generator, dtype=torch.float64), x


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def test_without_damping_it_is_the_least_squares_solution() -> None:
    weight, x = problem()
    best = torch.linalg.lstsq(x[:, KEEP], x @ weight.T).solution.T
    torch.testing.assert_close(restore(weight, second_moment(x), KEEP, 0.0), best, rtol=1e-9, atol=1e-12)


def test_damping_pulls_toward_the_kept_weights() -> None:
    weight, x = problem()
    pull = (0.3 * second_moment(x)[KEEP, KEEP].mean() * len(x)).sqrt() * torch.eye(4, dtype=torch.float64)
    rows, targets = torch.cat([x[:, KEEP], pull]), torch.cat([x @ weight.T, pull @ weight[:, KEEP].T])
    best = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(restore(weight, second_moment(x), KEEP, 0.3), best, rtol=1e-9, atol=1e-12)


def test_boundless_damping_leaves_the_kept_weights() -> None:
    weight, x = problem()
    restored = restore(weight, second_moment(x), KEEP, damping=1e12)
    torch.testing.assert_close(restored, weight[:, KEEP], rtol=1e-9, atol=1e-9)


def test_centred_inputs_and_compensation_are_least_squares_with_an_intercept() -> None:
    weight, x = problem(offset=3.0)
    restored = restore(weight, torch.cov(x.T, correction=0), KEEP, 0.0)
    gain = compensation(weight, x.mean(0), KEEP, restored)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x[:, KEEP], ones], 1), x @ weight.T).solution.T
    torch.testing.assert_close(torch.cat([restored, gain[:, None]], 1), best, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("restoring", [True, False])
def test_compensation_keeps_the_mean_output(restoring: bool) -> None:
    weight, x = problem(offset=3.0)
    new = restore(weight, second_moment(x), KEEP, 0.1) if restoring else weight[:, KEEP]
    gain = compensation(weight, x.mean(0), KEEP, new if restoring else None)
    outputs = x[:, KEEP] @ new.T + gain
    torch.testing.assert_close(outputs.mean(0), (x @ weight.T).mean(0), rtol=1e-10, atol=1e-10)


def test_compensation_without_restoration_is_what_the_removed_columns_gave_on_average() -> None:
    weight, x = problem(offset=1.0)
    gone = [1, 4, 5, 7]
    gain = compensation(weight.float(), x.mean(0), KEEP)
    torch.testing.assert_close(gain, weight[:, gone] @ x.mean(0)[gone], rtol=1e-6, atol=1e-6)


def test_inputs_that_do_not_determine_the_weights_are_refused_unless_damped() -> None:
    weight, x = problem()
    x[:, 3] = x[:, 2] = 0
    with pytest.raises(ValueError, match="raise `damping`, or num_samples"):
        restore(weight, second_moment(x), KEEP, 0.0)
    assert restore(weight, second_moment(x), KEEP, 1e-3).isfinite().all()


def test_keeping_everything_changes_nothing() -> None:
    weight, x = problem()
    everything = torch.arange(8)
    assert torch.equal(restore(weight, second_moment(x), everything, 0.01), weight)
    assert not compensation(weight, x.mean(0), everything).any()


def test_inputs_are_left_as_they_were() -> None:
    weight, x = problem()
    moments = second_moment(x)
    restore(weight, moments, KEEP, 0.5)
    assert torch.equal(moments, second_moment(x))


# ---- a damping chosen by what is held out


@pytest.mark.parametrize("bias", [True, False])
def test_held_out_errors_are_those_of_the_outputs(bias: bool) -> None:
    weight, x = problem(80, offset=2.0)
    fitting, judging = x[:60], x[60:]
    mean = fitting.mean(0) if bias else torch.zeros(8, dtype=torch.float64)
    errors = held_out_errors(weight, second_moment(fitting - mean), second_moment(judging - mean), KEEP)
    for error, damping in zip(errors, DAMPINGS, strict=True):
        new = restore(weight, second_moment(fitting - mean), KEEP, damping)
        gain = compensation(weight, mean, KEEP, new)
        off = judging[:, KEEP] @ new.T + gain - judging @ weight.T
        torch.testing.assert_close(error, off.square().sum() / len(off), rtol=1e-9, atol=1e-12)


def output_error(new: Tensor, gain: Tensor, x: Tensor, keep: Tensor, dense: Tensor) -> float:
    return float((x[:, keep] @ new.T + gain - x @ dense.T).square().sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "settings"), [(CFSP, {"repair": "restore"}), (FASP, {"attention": "none"})])
def test_auto_takes_what_errs_least_on_every_fourth_window(kind: Any, settings: dict[str, Any], bias: bool) -> None:
    ids, path = windows(7, 10), "model.layers.0.mlp.down_proj"
    models = {damping: tiny() for damping in ("auto", *DAMPINGS)}
    keeps = [
        prune(model, kind(0.3, damping=damping, bias=bias, **settings), list(ids.split(3))).keep["blocks.0.ffn"]
        for damping, model in models.items()
    ]
    assert all(torch.equal(keep, keeps[0]) for keep in keeps)
    x, dense, errors = traced(tiny(), ids)[0]["blocks.0.ffn"], weight(tiny(), path), {}
    fitting, judging = x[[0, 2, 3, 4, 6]].flatten(0, 1), x[[1, 5]].flatten(0, 1)
    mean = fitting.mean(0) if bias else torch.zeros(48, dtype=torch.float64)
    for damping in DAMPINGS:
        new = restore(dense, second_moment(fitting - mean), keeps[0], damping)
        errors[damping] = output_error(new, compensation(dense, mean, keeps[0], new), judging, keeps[0], dense)
    best = min(DAMPINGS, key=errors.__getitem__)
    assert errors[best] < 0.99 * errors[DAMPINGS[0]]
    torch.testing.assert_close(weight(models["auto"], path), weight(models[best], path), rtol=1e-4, atol=1e-5)


def test_auto_needs_two_windows() -> None:
    with pytest.raises(ValueError, match="there is only one: raise num_samples, or give `damping` a number"):
        prune(tiny(), CFSP(0.3, repair="restore", damping="auto"), [windows(1)])


# ---- repair by every method


EVERY: dict[str, Any] = {"FLAP": FLAP, "FASP": FASP, "CFSP": CFSP, "TwoSSP": TwoSSP}
WALKING: list[Repairing] = [
    FLAP(0.3, repair="restore", damping=0.0),
    CFSP(0.3, repair="restore", damping=0.0),
    TwoSSP(0.3, drop_attentions=0, repair="restore", damping=0.0),
    CFSP(0.3, repair="restore", damping=0.0, repair_share=0.45),
]


def behind(model: PreTrainedModel, ids: Tensor, block: int, kind: str) -> Tensor:
    """The inputs of a dense consumer behind what was pruned before it, the attention of its own block too."""
    hybrid = tiny()
    layers, pruned = (cast(nn.ModuleList, m.get_submodule("model.layers")) for m in (hybrid, model))
    for i in range(block):
        layers[i] = copy.deepcopy(pruned[i])
    if kind == "ffn":
        cast(Any, layers[block]).self_attn = copy.deepcopy(pruned[block].self_attn)
    return traced(hybrid, ids)[0][f"blocks.{block}.{kind}"].flatten(0, 1)


@pytest.mark.parametrize("how", WALKING, ids=lambda how: f"{type(how).__name__} {how.repair_share}")
def test_consumers_are_restored_one_after_another_behind_the_pruned_ones(how: Repairing) -> None:
    model, ids, restored = tiny(), windows(12, 16), 0
    plan = prune(model, how, list(ids.split(5)))
    ids = ids[: {1.0: 12, 0.45: 6}[how.repair_share]]
    for group in (group for block in blocks_of(tiny()) for group in block.groups()):
        keep = plan.keep.get(group.name, torch.arange(len(group)))
        if len(keep) == len(group):
            continue
        path, columns = f"model.layers.{group.block}.{group.consumer.path}", group.consumer.index[keep].flatten()
        x = behind(model, ids, group.block, group.kind)
        inputs = torch.cat([x[:, columns], torch.ones(len(x), 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(inputs, x @ weight(tiny(), path).T).solution.float()
        linear = innermost(model.get_submodule(path))
        torch.testing.assert_close(linear.weight.detach(), solution[:-1].T, rtol=1e-3, atol=5e-4)
        torch.testing.assert_close(linear.bias.detach(), solution[-1], rtol=1e-3, atol=5e-4)
        restored += 1
    assert restored >= (4 if isinstance(how, FLAP) else 3)


def test_a_share_of_the_windows_repairs_and_all_of_them_choose() -> None:
    whole, part = (prune(tiny(), CFSP(0.3, repair="restore", repair_share=share), [windows()]) for share in (1.0, 0.5))
    assert part.keep.keys() == whole.keep.keys()
    assert all(torch.equal(part.keep[name], keep) for name, keep in whole.keep.items())
    with pytest.raises(ValueError, match="`repair_share` is 0, but must be above 0 and at most 1"):
        CFSP(repair_share=0)
    with pytest.raises(ValueError, match=r"FASP repairs in the pass that chooses channels.*leave out `repair_share`"):
        FASP(repair_share=0.5)


@pytest.mark.parametrize("how", [CFSP(0.3, repair="compensate"), TwoSSP(0.3, drop_attentions=0, repair="compensate")])
def test_compensation_is_by_the_means_behind_the_pruned_prefix(how: Repairing) -> None:
    model, ids = tiny(), windows()
    plan = prune(model, how, list(ids.split(4)))
    for block in range(3):
        path = f"model.layers.{block}.mlp.down_proj"
        gone = complement(plan.keep[f"blocks.{block}.ffn"], 48)
        mean = behind(model, ids, block, "ffn").mean(0)
        expected = weight(tiny(), path)[:, gone] @ mean[gone]
        linear = innermost(model.get_submodule(path))
        torch.testing.assert_close(linear.bias.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", EVERY)
def test_each_repair_is_nearer_to_the_dense_block(name: str, family: str) -> None:
    ids, errors = windows(12, 16), []
    settings: dict[str, Any] = {"drop_attentions": 0} if name == "TwoSSP" else {}
    dense = traced(tiny(family), ids)[1][1]
    for repair in ("none", "compensate", "restore"):
        model = tiny(family)
        prune(model, EVERY[name](0.3, repair=repair, **settings), [ids])
        errors.append(float((traced(model, ids)[1][1] - dense).norm()))
    bare, compensated, restored = errors
    assert restored < 0.95 * compensated
    assert restored < 0.95 * bare
    assert compensated < bare or family == "llama"  # where the biases are new, and units pay for them


@pytest.mark.parametrize("repair", ["compensate", "restore"])
@pytest.mark.parametrize("kind", [CFSP, TwoSSP])
def test_added_biases_are_paid_for(kind: Any, repair: Any) -> None:
    model = tiny()
    ledger, blocks = Ledger(model, biased=True), sum(block.parameters() for block in blocks_of(model))
    for sparsity in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35):
        for case in kind(sparsity, repair=repair).predict_sizes(model):
            off = ledger.dense - ledger.parameters(case) - sparsity * blocks
            assert abs(off) <= (1.02 if kind is CFSP else 3 * 0.51) * ledger.costs["blocks.0.ffn"]
    plan = prune(model, kind(0.3, repair=repair), [windows()])
    assert plan.reached == pytest.approx(0.3, abs=0.01)
    assert sum(name.endswith("bias") for name in plan.repaired) == 3


@pytest.mark.parametrize("name", EVERY)
def test_without_a_bias_weights_are_restored_by_inputs_as_they_are(name: str) -> None:
    model = tiny()
    plan = prune(model, EVERY[name](0.3, repair="restore", bias=False), [windows()])
    assert plan.repaired
    assert all(name.endswith("weight") for name in plan.repaired)
    assert not any(name.endswith("proj.bias") for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", EVERY)
def test_settings_that_contradict_each_other(name: str) -> None:
    with pytest.raises(ValueError, match="compensation is a bias: set `bias` to true, or `repair` to none or restore"):
        EVERY[name](0.3, repair="compensate", bias=False)
    with pytest.raises(ValueError, match="`damping` is -1, but it is auto, or a number that is not negative"):
        EVERY[name](0.3, damping=-1)


@pytest.mark.parametrize("name", EVERY)
def test_where_no_bias_may_be_added_a_restoration_without_one_is_named(name: str) -> None:
    asked = Constraint(dense_biases=True)
    said = ["no bias may be added: set `repair` to none, or to restore with `bias` false"]
    for repair in ("compensate", "restore"):
        assert EVERY[name](0.3, repair=repair).conflicts(asked) == said
    assert EVERY[name](0.3, repair="restore", bias=False).conflicts(asked) == []
    assert EVERY[name](0.3, repair="none").conflicts(asked) == []


def test_what_a_repair_takes_is_foreseen() -> None:
    model = tiny()
    for kind in EVERY.values():
        plain, means, restored, auto, trained = (
            kind(0.3, repair=repair, damping=damping).work(model, 4, 16)
            for repair, damping in (
                ("none", 0.01),
                ("compensate", 0.01),
                ("restore", 0.01),
                ("restore", "auto"),
                ("reconstruct", 0.01),
            )
        )
        assert plain.flops <= means.flops <= restored.flops == auto.flops
        assert plain.single == means.single == 0 < restored.single < auto.single
        assert 0 < restored.bytes < auto.bytes
        assert trained.flops > 3 * restored.flops
        if kind is not FASP:
            half = kind(0.3, repair="restore", repair_share=0.5).work(model, 4, 16)
            assert plain.flops <= half.flops < restored.flops
            assert half.single < restored.single
        assert trained.bytes > restored.bytes


# ---- experts, each by its own tokens


@torch.no_grad()
def of_experts(model: PreTrainedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Rows of the tokens of each expert of the first block with some, its inner activations and its outputs."""
    block, found = next(block for block in blocks_of(model) if block.expert_count), {}

    def see(expert: int, tokens: Tensor, weights: Tensor, inner: Tensor, outputs: Tensor) -> None:
        found[expert] = tokens, inner.double(), outputs.double()

    with watched(block.part(block.experts.path), see):
        model(input_ids=ids, use_cache=False)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # plain; transposed, with biases
def test_experts_are_restored_by_least_squares_over_their_own_tokens(
    kind: str, bias: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ids, model, dense = windows(20, 16), build(kind), build(kind)
    with caplog.at_level(logging.WARNING):
        plan = prune(model, CFSP(0.35, repair="restore", damping=0.0, bias=bias), list(ids.split(6)))
    (index, keep), few = next((name.split(".")[1], keep) for name, keep in plan.keep.items()), 0
    before, after = of_experts(dense, ids), of_experts(model, ids)
    for expert, (_, inner, outputs) in before.items():
        x, found = inner[:, keep[expert]], after[expert][2]
        if len(x) < keep.shape[1]:
            few += 1
            continue
        constant = torch.ones(len(x), int(bias and kind == "gpt_oss"), dtype=torch.float64)
        inputs, own = torch.cat([x, constant], 1), 0.0
        if kind == "gpt_oss" and not bias:
            own = cast(Any, dense).model.layers[int(index)].mlp.experts.down_proj_bias[expert].detach().double()
        best = inputs @ torch.linalg.lstsq(inputs, outputs - own).solution + own
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)
    assert 0 < few < len(before)
    assert f"layers.{index}: {few} of 8 experts saw fewer than {keep.shape[1]} calibration tokens" in caplog.text
    assert {name.rpartition(".")[2] for name in plan.repaired} == {
        "down_proj",
        *(["down_proj_bias"] if bias and kind == "gpt_oss" else []),
    }


@pytest.mark.parametrize("kind", [CFSP, FLAP, FASP])
def test_biases_of_experts_gain_what_their_channels_gave_on_average(kind: Any) -> None:
    ids, model, dense = windows(8, 16), build("gpt_oss"), cast(Any, build("gpt_oss"))
    own: dict[str, Any] = {"attention": "none"} if kind is FASP else {}
    keep = prune(model, kind(0.3, repair="compensate", **own), list(ids.split(3))).keep["blocks.0.expert_channel"]
    old, new = (cast(Any, m).model.layers[0].mlp.experts for m in (dense, model))
    for expert, (_, x, _) in of_experts(dense, ids).items():
        gone = complement(keep[expert], x.shape[1])
        gain = x.mean(0)[gone] @ old.down_proj[expert, gone].detach().double() if len(x) >= 8 else torch.zeros(64)
        torch.testing.assert_close(new.down_proj_bias[expert], (old.down_proj_bias[expert] + gain).float())


def test_experts_without_a_bias_are_not_compensated_and_this_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for kind in (CFSP, FLAP):
        caplog.clear()
        model = build("mixtral")
        with caplog.at_level(logging.WARNING):
            plan = prune(model, kind(0.3, repair="compensate"), [windows(8, 16)])
        assert "have no bias, so what their channels gave on average is not compensated" in caplog.text
        assert not any("experts" in name for name in plan.repaired)
        for index in range(4):
            keep = plan.keep[f"blocks.{index}.expert_channel"]
            old, new = (cast(Any, m).model.layers[index].mlp.experts.down_proj for m in (build("mixtral"), model))
            assert torch.equal(new, old.gather(2, keep[:, None].expand(-1, 64, -1)))


def test_auto_holds_out_the_same_windows_for_all_experts() -> None:
    ids, errors, model = windows(24, 16), {}, build("gpt_oss")
    auto = CFSP(0.35, repair="restore", damping="auto", bias=False)
    keeps = prune(model, auto, list(ids.split(5))).keep["blocks.0.expert_channel"]
    seen = of_experts(build("gpt_oss"), ids)
    expert = max(seen, key=lambda e: len(seen[e][0]))
    (rows, x, _), keep = seen[expert], keeps[expert]
    held = rows // 16 % 4 == 1
    dense, found = (
        cast(Any, m).model.layers[0].mlp.experts.down_proj[expert].detach().double().T
        for m in (build("gpt_oss"), model)
    )
    for damping in DAMPINGS:
        new = restore(dense, second_moment(x[~held]), keep, damping)
        errors[damping] = float((x[held][:, keep] @ new.T - x[held] @ dense.T).square().sum())
    best = restore(dense, second_moment(x), keep, min(DAMPINGS, key=errors.__getitem__))
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
