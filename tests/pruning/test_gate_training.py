"""Gates and gains against their definitions: the budget, the gradient by finite differences, closed gates."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plprune.architecture.blocks import blocks_of
from plprune.architecture.cutting import held
from plprune.architecture.modules import matrix, requiring_grad
from plprune.pruning import losses
from plprune.pruning.gate_training import (
    COLD,
    LIKELIEST,
    Costs,
    Factors,
    TeacherSample,
    align,
    by_group,
    gate_values,
    mean_gradients,
    scaled_inputs,
    states_of,
    teacher_sample,
    train_gains,
    train_gates,
    unit_gains,
    within_budget,
)
from plprune.pruning.surgery import Surgery
from plprune.recovery.distillation import recorded_outputs
from tests.builders import logits, tiny, windows
from tests.zoo import build


def scores(count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(count, generator=generator, dtype=torch.float64)
    return theta, torch.randint(1, 4, (count,), generator=generator).double()


def rows_of(model):
    return [(block, block.groups("none")[0]) for block in blocks_of(model)]


NESTED = torch.arange(4, 10), torch.tensor([0, 0, 0, 1, 1, 1])  # units 4 to 9 lie within units 0 and 1


def nested() -> Costs:
    cost = scores(12)[1]
    for own in (0, 1):
        cost[own] += cost[NESTED[0][NESTED[1] == own]].sum()
    return Costs(cost, *NESTED)


@pytest.mark.parametrize("temperature", [2.0, 0.5, 0.05])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_gates_cost_the_budget_and_follow_the_scores(temperature: float, share: float) -> None:
    theta, cost = scores()
    gates = gate_values(theta, Costs(cost), share * float(cost.sum()), temperature)
    assert float((gates * cost).sum()) == pytest.approx(share * float(cost.sum()), rel=1e-5)
    assert torch.equal(gates[theta.argsort()].sort().values, gates[theta.argsort()])


def test_cold_gates_are_the_best_units() -> None:
    theta, cost = scores()[0], torch.ones(40, dtype=torch.float64)
    gates = gate_values(theta, Costs(cost), 15.0, 1e-4)
    assert torch.equal(gates.round().nonzero().flatten(), theta.topk(15).indices.sort().values)


def test_what_lies_within_a_closed_unit_costs_nothing() -> None:
    costs = nested()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        gates = torch.rand(12, generator=generator).round().double()
        open_ = [i for i in range(12) if gates[i]]
        alone = {own: costs.each[own] - costs.each[NESTED[0][NESTED[1] == own]].sum() for own in (0, 1)}
        within = dict(zip(*(each.tolist() for each in NESTED), strict=True))
        paid = sum(float(alone.get(i, costs.each[i])) for i in open_ if gates[within.get(i, i)])
        assert float(costs.spent(gates)) == pytest.approx(paid)
    gates = torch.rand(12, generator=generator, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(costs.spent(gates), gates)
    torch.testing.assert_close(costs.marginal(gates.detach()), slope)


def test_the_costs_of_experts_are_the_parameters_that_leave_with_them() -> None:
    model = build("qwen2_moe")
    whole = [(block, block.expert_units()) for block in blocks_of(model)]
    rows = [*whole, *[(block, group) for block in blocks_of(model) for group in block.groups("none")]]
    costs = Costs.of(rows, torch.device("cpu"))
    unit = min(block.cost(group) / max(1, group.experts) for block, group in rows)
    gates = by_group(torch.ones(len(costs.each)), rows)
    before = float(costs.spent(torch.cat([own.flatten() for own in gates]))) * unit
    dense = sum(block.parameters() for block in blocks_of(model))
    for (block, group), own in zip(rows, gates, strict=True):
        own[..., -2:] = 0  # the last two experts, shared channels and channels of each expert
        Surgery(model).keep(block, group, torch.arange(len(group) - 2).expand(*((6,) if group.experts else ()), -1))
    after = float(costs.spent(torch.cat([own.flatten() for own in gates]))) * unit
    assert before - after == pytest.approx(dense - sum(block.parameters() for block in blocks_of(model)), rel=1e-4)


@pytest.mark.parametrize("costs", [Costs(scores(12)[1]), nested()], ids=["plain", "nested"])
def test_the_gradient_is_that_of_the_loss_along_the_budget(costs: Costs) -> None:
    (theta, _), temperature, h = scores(12), 0.5, 1e-4
    whole = float(costs.spent(torch.ones(12, dtype=torch.float64)))
    gradient, budget = torch.linspace(-2, 1, 12, dtype=torch.float64), 0.4 * whole
    gates = gate_values(theta, costs, budget, temperature)
    assert float(costs.spent(gates)) == pytest.approx(budget, rel=1e-5)
    found = within_budget(gates, gradient, costs) * costs.each / temperature
    for j in range(12):
        step = torch.zeros_like(theta).index_fill_(0, torch.tensor([j]), h)
        ends = [gate_values(theta + sign * step, costs, budget, temperature) @ gradient for sign in (1, -1)]
        assert float(ends[0] - ends[1]) / (2 * h) == pytest.approx(float(found[j]), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "gemma2"])
def test_a_closed_gate_is_a_column_of_zeros(family: str) -> None:
    model, other = tiny(family), tiny(family)
    rows = rows_of(model)
    gates = torch.ones(sum(len(group) for _, group in rows)).index_fill_(0, torch.arange(0, 90, 7), 0.0)
    parts = gates.split([len(group) for _, group in rows])
    factors = [(block.part(group.consumer.path), own) for (block, group), own in zip(rows, parts, strict=True)]
    with scaled_inputs(factors), torch.no_grad():
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
    gains = unit_gains([block.part(path) for block, path in places], torch.device("cpu"))
    for _, gain in gains:
        gain.uniform_(0.5, 1.5, generator=generator)
    with scaled_inputs(gains), torch.no_grad():
        found = logits(model)
    surgery = Surgery(other)
    for (block, path), (_, gain) in zip(places, gains, strict=True):
        surgery.scale(surgery.blocks[block.index], path, gain)
    torch.testing.assert_close(found, logits(other), atol=1e-5, rtol=1e-5)


def logits_with_gradient(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def check_scaled(model: PreTrainedModel, other: PreTrainedModel, factors: Factors) -> None:
    """Checks that factors make the logits of another model, within the context alone."""
    before = logits(model)
    with scaled_inputs(factors), torch.no_grad():
        found = logits(model)
    torch.testing.assert_close(found, logits(other))
    assert not torch.equal(found, before)
    assert torch.equal(logits(model), before)


MIXTURES = ["mixtral", "gpt_oss", "nemotron_h"]  # plain; transposed, with biases; without gates


@pytest.mark.parametrize("kind", MIXTURES)
def test_factors_of_the_channels_of_experts_are_in_the_columns_of_their_weights(kind: str) -> None:
    model, other, factors = build(kind), build(kind), []
    surgery, generator = Surgery(other), torch.Generator().manual_seed(0)
    for block, same in zip(blocks_of(model), surgery.blocks, strict=True):
        if block.expert_count:
            own = torch.rand(block.expert_count, block.expert_width, generator=generator).round(decimals=0)
            factors.append((block.part(block.experts.path), own))
            surgery.scale(same, block.experts.channels.consumer.path, own)
    check_scaled(model, other, factors)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_gate_of_an_expert_multiplies_what_it_adds(kind: str) -> None:
    model, other, factors = build(kind), build(kind), []
    for block, same in zip(blocks_of(model), blocks_of(other), strict=True):
        if block.expert_count:
            own = torch.rand(block.expert_count, generator=torch.Generator().manual_seed(block.index))
            factors.append((block.part(block.experts.path), own))
            for path in (block.experts.channels.consumer.path, block.expert_bias):
                if path:
                    tensor = held(same.module, path)
                    assert tensor is not None
                    tensor.data *= own.view(-1, *[1] * (tensor.ndim - 1))
    check_scaled(model, other, factors)


def test_experts_of_all_blocks_have_the_same_scores_and_so_have_their_groups() -> None:
    blocks = [block for block in blocks_of(build("deepseek_v3", first_k_dense_replace=1)) if block.expert_count]
    rows = [(block, block.expert_units()) for block in blocks]
    theta = scores(8 * len(rows))[0]
    before = theta.clone().view(-1, 4)  # groups of four experts
    align(theta, rows)
    after = theta.view(-1, 4)
    assert len(before) == 2 * len(blocks) > 2
    assert torch.equal(after.argsort(dim=1), before.argsort(dim=1))
    torch.testing.assert_close(after.sort(dim=1).values, before.sort(dim=1).values.mean(0).expand_as(after))


def test_experts_of_a_block_have_the_same_scores_in_their_own_order() -> None:
    model = build("qwen2_moe")
    rows = [(block, group) for block in blocks_of(model) for group in block.groups("none")]
    theta = scores(sum(len(group) * max(1, group.experts) for _, group in rows))[0]
    before = [own.clone() for own in by_group(theta, rows)]
    align(theta, rows)
    for (_, group), old, new in zip(rows, before, by_group(theta, rows), strict=True):
        if not group.experts:
            assert torch.equal(new, old)
            continue
        assert torch.equal(new.argsort(dim=1), old.argsort(dim=1))
        torch.testing.assert_close(new.sort(dim=1).values, old.sort(dim=1).values.mean(0).expand(8, -1))


def test_a_teacher_sample_is_what_the_model_says_and_with_what_the_text_says_a_loss() -> None:
    teacher, model, ids = tiny(), tiny(seed=1), windows(1)
    sample, states = teacher_sample(teacher, ids), states_of(model, ids)
    right, own = (logits(m, ids)[0, :-1].double().softmax(-1) for m in (teacher, model))
    best = right.topk(LIKELIEST).indices
    p, q = (torch.cat([e.gather(-1, best), 1 - e.gather(-1, best).sum(-1, keepdim=True)], -1) for e in (own, right))
    following = -own.gather(-1, ids[0, 1:, None]).log().mean()
    divergence = (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(sample.divergence(states).double(), divergence, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sample.loss(states).double(), (divergence + following) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "cohere2"])  # logits are capped, and scaled
def test_gradients_of_a_step_are_those_of_all_logits(family: str) -> None:
    teacher, model, text = tiny(family), tiny(family, seed=1), windows(3, 24).split(1)
    samples = [teacher_sample(teacher, ids) for ids in text]
    generator, parts = torch.Generator().manual_seed(0), [b.part(p) for b in blocks_of(model) for p in b.projections]
    gains = unit_gains(parts, model.device)
    of = [gain.uniform_(0.5, 1.5, generator=generator).requires_grad_() for _, gain in gains]
    total = torch.zeros((), dtype=torch.float64)
    for ids in text:
        with scaled_inputs(gains), requiring_grad(model.parameters(), False):
            own = logits_with_gradient(model, ids)[0, :-1].double().softmax(-1)
        right = logits(teacher, ids)[0, :-1].double().softmax(-1)
        best = right.topk(LIKELIEST).indices
        p, q = (torch.cat([e.gather(-1, best), 1 - e.gather(-1, best).sum(-1, keepdim=True)], -1) for e in (own, right))
        following = -own.gather(-1, ids[0, 1:, None]).log().mean()
        total = total + ((q * (q / p).log()).sum(-1).mean() + following) / 2
    wanted = torch.autograd.grad(total / 3, of)
    with requiring_grad(model.parameters(), False):
        found = mean_gradients(model, samples, gains, TeacherSample.loss, of, None)
    largest = max(float(each.abs().max()) for each in wanted)
    torch.testing.assert_close(found, list(wanted), rtol=1e-3, atol=1e-5 * largest)


def test_a_teacher_speaks_from_its_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LEAST_ROWS", 5)
    monkeypatch.setattr(losses, "CHUNK_BYTES_ON_CPU", 0)
    model, ids = tiny("gemma2"), windows(1)
    with recorded_outputs(model, [2]) as outputs:
        expected = teacher_sample(model, ids)
    for block in blocks_of(model):
        block.part(block.ffn.consumer.path).register_forward_hook(lambda *_: pytest.fail("a block ran"))
    found = teacher_sample(model, ids, outputs[0])
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.tokens, expected.tokens)


def test_training_leaves_the_model_as_it_was() -> None:
    model, text = tiny(), list(windows(4).split(1))
    rows = rows_of(model)
    next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    theta = torch.cat([torch.linspace(-3, 3, len(group)) for _, group in rows])
    samples = [teacher_sample(model, ids) for ids in text]
    start, blocks = theta.clone(), blocks_of(model)
    gains = unit_gains([block.part(path) for block in blocks for path in block.projections], model.device)
    with requiring_grad(model.parameters(), False):
        train_gates(model, rows, theta, Costs(torch.ones(len(theta))), 0.5, [samples[:3], samples[3:]], 0.1)
        train_gains(model, gains, [samples[:3], samples[3:]], 0.1)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model), logits(tiny()))
    assert not torch.equal(theta, start)
    assert all((gain != 1).any() and not gain.requires_grad for _, gain in gains)


def test_in_the_end_gates_are_open_or_closed() -> None:
    model, text = tiny(), list(windows(64).split(1))
    rows = rows_of(model)
    theta = torch.cat([torch.linspace(-3, 3, len(group)) for _, group in rows])
    cost = torch.ones(len(theta))
    with requiring_grad(model.parameters(), False):
        train_gates(model, rows, theta, Costs(cost), 0.5, [[teacher_sample(model, ids)] for ids in text], 0.1)
    gates = gate_values(theta, Costs(cost), 0.5 * len(theta), COLD)
    assert float(((gates > 0.1) & (gates < 0.9)).sum()) <= 0.05 * len(gates)
