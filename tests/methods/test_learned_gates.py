"""Learned gates: what training is for, and what is refused."""

from typing import Any

import pytest
import torch

from plprune import CFSP, FLAP, LearnedGates, prune
from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import matrix
from plprune.methods import learned_gates
from plprune.methods.learned_gates import initial_scores
from plprune.pruning import gate_training
from plprune.pruning.constraints import Constraint
from plprune.pruning.gate_training import (
    WARM,
    TeacherSample,
    by_group,
    gate_values,
    states_of,
    teacher_sample,
)
from tests.builders import logits, tiny, windows
from tests.zoo import build


def test_scores_start_in_the_order_of_the_norms_with_the_fraction_above_0() -> None:
    norm = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = initial_scores(norm, 0.3)
    assert torch.equal(theta.argsort(), norm.argsort())
    assert int((theta > 0).sum()) == 60


def test_gates_lower_the_divergence_that_a_pruning_by_norms_has_and_gains_lower_the_loss_further() -> None:
    text, own = list(windows(4, 24).split(1)), {"passes": 30, "learning_rate": 0.3}
    samples, found = [teacher_sample(tiny(), ids) for ids in text], []
    for method in (
        CFSP(0.3),
        LearnedGates(0.3, gain_rate=0.0, repair="none", **own),
        LearnedGates(0.3, gain_rate=0.02, repair="none", **own),
    ):
        model = tiny()
        prune(model, method, text)
        said = [states_of(model, each.ids) for each in samples]
        found.append([sum(map(of, samples, said)) for of in (TeacherSample.divergence, TeacherSample.loss)])
    assert found[1][0] < 0.9 * found[0][0]
    assert found[2][1] < 0.9 * found[1][1]


def test_weights_stay_as_they_are_without_repair() -> None:
    model = tiny()
    plan = prune(model, LearnedGates(0.3, gain_rate=0.0, repair="none"), [windows()])
    assert not plan.repaired
    for block, dense in zip(blocks_of(model), blocks_of(tiny()), strict=True):
        keep = plan.keep[f"blocks.{block.index}.ffn"]
        own, whole = (matrix(b.part(b.ffn.consumer.path)) for b in (block, dense))
        assert torch.equal(own, whole[:, keep])


def test_what_was_repaired_is_named_once() -> None:
    plan = prune(tiny(), LearnedGates(0.3), [windows()])
    assert len(plan.repaired) == len(set(plan.repaired)) == 3 * 7


def test_more_passes_are_more_steps() -> None:
    text = [windows()]
    plans = [prune(tiny(), LearnedGates(0.3, passes=n, learning_rate=0.5), text) for n in (1, 8)]
    assert plans[0].reached == pytest.approx(plans[1].reached, abs=1e-3)
    assert plans[0].digest != plans[1].digest


def test_gates_take_a_share_of_the_windows_and_gains_all(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, text = {}, windows(7)
    for name in ("train_gates", "train_gains"):
        own = getattr(learned_gates, name)

        def spy(*args: Any, name: str = name, own: Any = own) -> Any:
            (steps,) = [each for each in args if isinstance(each, list) and isinstance(each[0], list)]
            taken[name] = [torch.cat([sample.ids for sample in step]) for step in steps]
            return own(*args)

        monkeypatch.setattr(learned_gates, name, spy)
    prune(tiny(), LearnedGates(0.3, gate_share=0.4, windows_per_step=2, passes=2), [text[:4], text[4:]])
    for name, windows_of_steps in (("train_gates", [text[:2], text[2:3]]), ("train_gains", text.split(2))):
        assert all(map(torch.equal, taken[name], [*windows_of_steps, *windows_of_steps])), name
        assert len(taken[name]) == 2 * len(windows_of_steps)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_that_will_wait_are_told(count: int, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(learned_gates.distributed, "size", lambda _: 2)
    prune(tiny(), LearnedGates(0.3, windows_per_step=count, repair="none"), [windows(4)])
    said = f"of which there are {count}, so some processes wait: set `windows_per_step` to a multiple of 2"
    assert [said in message for message in caplog.messages] == [True] * (count % 2)


def test_experts_lose_as_many_channels_each_its_own_and_lower_the_divergence_that_norms_have() -> None:
    text = list(windows(4, 48).split(1))
    samples, found = [teacher_sample(build("mixtral"), ids) for ids in text], []
    own = {"passes": 6, "learning_rate": 0.3, "repair": "none"}
    for method in (CFSP(0.25), LearnedGates(0.25, gain_rate=0.0, **own), LearnedGates(0.25, gain_rate=0.02, **own)):
        model = build("mixtral")
        plan = prune(model, method, text)
        said = [states_of(model, each.ids) for each in samples]
        found.append([sum(map(of, samples, said)) for of in (TeacherSample.divergence, TeacherSample.loss)])
    assert found[1][0] < 0.9 * found[0][0]
    assert found[2][1] < found[1][1]
    assert plan.reached == pytest.approx(0.25, abs=0.01)
    for block in blocks_of(model):
        keep = plan.keep[f"blocks.{block.index}.expert_channel"]
        assert keep.shape == (8, block.expert_width)
        assert block.expert_width % 8 == 0
        assert len(keep.unique(dim=0)) == 8
        assert f"{block.path}.mlp.experts.down_proj" in plan.repaired


def test_whole_experts_compete_with_channels_and_every_block_keeps_as_many() -> None:
    text = list(windows(4, 48).split(1))
    samples, found = [teacher_sample(build("mixtral"), ids) for ids in text], []
    own = {"passes": 6, "learning_rate": 0.3, "repair": "none", "gain_rate": 0.0}
    for method in (FLAP(0.4, experts=True, repair="none"), LearnedGates(0.4, experts=True, **own)):
        model = build("mixtral")
        plan = prune(model, method, text)
        found.append(sum(sample.divergence(states_of(model, sample.ids)) for sample in samples))
    assert found[1] < 0.9 * found[0]
    assert plan.reached == pytest.approx(0.4, abs=0.01)
    (count,) = {len(keep) for name, keep in plan.keep.items() if name.endswith("expert")}
    assert 2 <= count < 8
    for block in blocks_of(model):
        assert plan.keep[f"blocks.{block.index}.expert_channel"].shape == (count, block.expert_width)
    assert not plan.repaired


def test_heads_compete_with_channels_and_what_leaves_matters_less() -> None:
    text, own = list(windows(4, 24).split(1)), {"passes": 30, "learning_rate": 0.3, "repair": "none"}
    samples, found = [teacher_sample(tiny(), ids) for ids in text], []
    for method in (
        FLAP(0.6, repair="none"),
        LearnedGates(0.6, gain_rate=0.0, attention="kv_heads", **own),
    ):
        model = tiny()
        plan = prune(model, method, text)
        found.append(sum(sample.divergence(states_of(model, sample.ids)) for sample in samples))
    assert found[1] < 0.9 * found[0]
    heads = [len(keep) for name, keep in plan.keep.items() if name.endswith("attention")]
    assert 3 <= sum(heads) < 12
    assert plan.reached == pytest.approx(0.6, abs=0.02)


def test_the_gate_of_a_head_scales_its_query_heads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense, taken = tiny(), tiny(), []
    rows = [(block, group) for block in blocks_of(model) for group in block.groups("kv_heads")]

    def spy(_: Any, samples: Any, factors: Any, *others: Any) -> list[torch.Tensor]:
        taken.append(factors)
        return [torch.zeros_like(others[1][0])]

    monkeypatch.setattr(gate_training, "mean_gradients", spy)
    theta = torch.cat([torch.linspace(-3, 3, len(group)) for _, group in rows])
    costs = gate_training.Costs.of(rows, model.device)
    gate_training.train_gates(model, rows, theta, costs, 0.5, [[teacher_sample(model, windows(1))]], 0.0)
    gates = by_group(gate_values(theta, costs, 0.5 * float(costs.spent(torch.ones_like(theta))), WARM), rows)
    for (block, group), own, (part, factor) in zip(rows, gates, taken[0], strict=True):
        other, scaled = blocks_of(dense)[block.index].part(group.consumer.path), matrix(part) * factor
        for unit, columns in enumerate(group.consumer.index):
            torch.testing.assert_close(scaled[:, columns], matrix(other)[:, columns] * own[unit])


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        (Constraint(dense_heads=True), "no head may leave: set `attention` to none"),
        (Constraint(uniform=True), "all blocks must have the same sizes: set `attention` to none"),
    ],
)
def test_heads_that_must_stay(constraint: Constraint, said: str) -> None:
    assert said in LearnedGates(attention="kv_heads").conflicts(constraint)
    assert LearnedGates().conflicts(constraint) == []


def test_heads_and_experts_are_not_ranked_together() -> None:
    with pytest.raises(ValueError, match="`experts` and heads are not ranked together: set `attention` to none"):
        LearnedGates(experts=True, attention="kv_heads")


def test_groups_of_experts_keep_as_many_each() -> None:
    model = build("deepseek_v3", first_k_dense_replace=1)
    plan = prune(model, LearnedGates(0.4, experts=True), list(windows(6, 32).split(1)))
    for name, keep in plan.keep.items():
        if name.endswith("expert"):
            assert (keep < 4).sum() * 2 == len(keep) < 8
    assert logits(model).isfinite().all()


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(ValueError, match="LearnedGates prunes experts, and the model has none that can leave"):
        prune(tiny(), LearnedGates(0.3, experts=True), [windows()])


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"learning_rate": 0.0}, {"gain_rate": -0.1}])
def test_what_does_not_train_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="at least one of `passes`, with a positive `learning_rate`, and gains"):
        LearnedGates(**wrong)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_of_the_windows_is_a_fraction(share: float) -> None:
    with pytest.raises(ValueError, match=f"`gate_share` is {share}, but must be above 0 and at most 1"):
        LearnedGates(gate_share=share)
