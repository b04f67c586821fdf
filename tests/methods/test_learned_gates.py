"""Learned gates against the definition: the budget, the gradient by finite differences, and what training is for."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from plprune import CFSP, LearnedGates, prune
from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import matrix
from plprune.methods.learned_gates import (
    COLD,
    LIKELIEST,
    Lesson,
    frozen,
    lesson,
    ones,
    opened,
    scaled,
    started,
    train_gains,
    train_gates,
    within_budget,
)
from plprune.pruning.surgery import Surgery
from tests.builders import logits, tiny, windows


def scores(count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(count, generator=generator, dtype=torch.float64)
    return theta, torch.randint(1, 4, (count,), generator=generator).double()


def rows_of(model):
    return [(block, block.groups("none")[0]) for block in blocks_of(model)]


@pytest.mark.parametrize("temperature", [2.0, 0.5, 0.05])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_gates_cost_the_budget_and_follow_the_scores(temperature: float, share: float) -> None:
    theta, cost = scores()
    gates = opened(theta, cost, share * float(cost.sum()), temperature)
    assert float((gates * cost).sum()) == pytest.approx(share * float(cost.sum()), rel=1e-5)
    assert torch.equal(gates[theta.argsort()].sort().values, gates[theta.argsort()])


def test_cold_gates_are_the_best_units() -> None:
    theta, cost = scores()[0], torch.ones(40, dtype=torch.float64)
    gates = opened(theta, cost, 15.0, 1e-4)
    assert torch.equal(gates.round().nonzero().flatten(), theta.topk(15).indices.sort().values)


def test_the_gradient_is_that_of_the_loss_along_the_budget() -> None:
    (theta, cost), temperature, h = scores(12), 0.5, 1e-4
    gradient, budget = torch.linspace(-2, 1, 12, dtype=torch.float64), 0.4 * float(cost.sum())
    found = within_budget(opened(theta, cost, budget, temperature), gradient, cost) * cost / temperature
    for j in range(12):
        step = torch.zeros_like(theta).index_fill_(0, torch.tensor([j]), h)
        ends = [opened(theta + sign * step, cost, budget, temperature) @ gradient for sign in (1, -1)]
        assert float(ends[0] - ends[1]) / (2 * h) == pytest.approx(float(found[j]), abs=1e-5)


def test_scores_start_in_the_order_of_the_norms_with_the_fraction_above_0() -> None:
    norm = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = started(norm, 0.3)
    assert torch.equal(theta.argsort(), norm.argsort())
    assert int((theta > 0).sum()) == 60


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "gemma2"])
def test_a_closed_gate_is_a_column_of_zeros(family: str) -> None:
    model, other = tiny(family), tiny(family)
    rows = rows_of(model)
    gates = torch.ones(sum(len(group) for _, group in rows)).index_fill_(0, torch.arange(0, 90, 7), 0.0)
    parts = gates.split([len(group) for _, group in rows])
    factors = [(block.part(group.consumer.path), own) for (block, group), own in zip(rows, parts, strict=True)]
    with scaled(factors), torch.no_grad():
        found = logits(model)
    for (block, group), own in zip(rows_of(other), parts, strict=True):
        matrix(block.part(group.consumer.path)).data[:, own == 0] = 0
    torch.testing.assert_close(found, logits(other))
    assert torch.equal(logits(model), logits(tiny(family)))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "gemma2", "gpt_neox"])
def test_gains_are_in_the_columns_of_the_weights(family: str) -> None:
    model, other = tiny(family), tiny(family)
    generator, places = torch.Generator().manual_seed(0), []
    for block in blocks_of(model):
        linears = {id(m) for m in block.module.modules() if isinstance(m, torch.nn.Linear | Conv1D)}
        assert len(block.projections) == len(linears)
        places += [(block, path) for path in block.projections]
    gains = ones([block.part(path) for block, path in places], torch.device("cpu"))
    for _, gain in gains:
        gain.uniform_(0.5, 1.5, generator=generator)
    with scaled(gains), torch.no_grad():
        found = logits(model)
    surgery = Surgery(other)
    for (block, path), (_, gain) in zip(places, gains, strict=True):
        surgery.scale(surgery.blocks[block.index], path, gain)
    torch.testing.assert_close(found, logits(other), atol=1e-5, rtol=1e-5)


def test_a_lesson_is_what_the_model_says_and_with_what_the_text_says_a_loss() -> None:
    teacher, model, ids = tiny(), tiny(seed=1), windows(1)
    taught, said = lesson(teacher, ids), logits(model, ids)
    right, own = (logits(m, ids)[0, :-1].double().softmax(-1) for m in (teacher, model))
    best = right.topk(LIKELIEST).indices
    p, q = (torch.cat([e.gather(-1, best), 1 - e.gather(-1, best).sum(-1, keepdim=True)], -1) for e in (own, right))
    following = -own.gather(-1, ids[0, 1:, None]).log().mean()
    divergence = (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(taught.divergence(said).double(), divergence, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(taught.loss(said).double(), (divergence + following) / 2, atol=1e-5, rtol=1e-5)


def test_gates_lower_the_divergence_that_a_pruning_by_norms_has_and_gains_lower_the_loss_further() -> None:
    text, own = list(windows(4, 24).split(1)), {"passes": 30, "learning_rate": 0.3}
    lessons, found = [lesson(tiny(), ids) for ids in text], []
    for method in (
        CFSP(0.3),
        LearnedGates(0.3, gain_rate=0.0, repair="none", **own),
        LearnedGates(0.3, gain_rate=0.02, repair="none", **own),
    ):
        model = tiny()
        prune(model, method, text)
        said = [logits(model, each.ids) for each in lessons]
        found.append([sum(map(of, lessons, said)) for of in (Lesson.divergence, Lesson.loss)])
    assert found[1][0] < 0.9 * found[0][0]
    assert found[2][1] < 0.9 * found[1][1]


def test_weights_stay_as_they_are_without_repair() -> None:
    model = tiny()
    plan = prune(model, LearnedGates(0.3, gain_rate=0.0, repair="none"), [windows()])
    assert not plan.repaired
    for block, dense in zip(blocks_of(model), blocks_of(tiny()), strict=True):
        keep = plan.keep[f"blocks.{block.index}.ffn"]
        own, whole = (matrix(b.part(b.family.ffn_out)) for b in (block, dense))
        assert torch.equal(own, whole[:, keep])


def test_what_was_repaired_is_named_once() -> None:
    plan = prune(tiny(), LearnedGates(0.3), [windows()])
    assert len(plan.repaired) == len(set(plan.repaired)) == 3 * 7


def test_training_leaves_the_model_as_it_was() -> None:
    model, text = tiny(), list(windows(4).split(1))
    rows = rows_of(model)
    next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    theta = torch.cat([torch.linspace(-3, 3, len(group)) for _, group in rows])
    lessons = [lesson(model, ids) for ids in text]
    start, blocks = theta.clone(), blocks_of(model)
    gains = ones([block.part(path) for block in blocks for path in block.projections], model.device)
    with frozen(model):
        train_gates(model, rows, theta, torch.ones(len(theta)), 0.5, lessons, 0.1)
        train_gains(model, gains, lessons, 0.1)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model), logits(tiny()))
    assert not torch.equal(theta, start)
    assert all((gain != 1).any() and not gain.requires_grad for _, gain in gains)


def test_more_passes_are_more_steps() -> None:
    text = [windows()]
    plans = [prune(tiny(), LearnedGates(0.3, passes=n, learning_rate=0.5), text) for n in (1, 8)]
    assert plans[0].reached == pytest.approx(plans[1].reached, abs=1e-3)
    assert plans[0].digest != plans[1].digest


def test_in_the_end_gates_are_open_or_closed() -> None:
    model, text = tiny(), list(windows(64).split(1))
    rows = rows_of(model)
    theta = torch.cat([torch.linspace(-3, 3, len(group)) for _, group in rows])
    cost = torch.ones(len(theta))
    with frozen(model):
        train_gates(model, rows, theta, cost, 0.5, [lesson(model, ids) for ids in text], 0.1)
    gates = opened(theta, cost, 0.5 * len(theta), COLD)
    assert float(((gates > 0.1) & (gates < 0.9)).sum()) <= 0.05 * len(gates)


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"learning_rate": 0.0}, {"gain_rate": -0.1}])
def test_what_does_not_train_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="at least one of `passes`, with a positive `learning_rate`, and gains"):
        LearnedGates(**wrong)
