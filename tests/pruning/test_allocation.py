"""Budgets, top-k and exact rounding, on many random cases."""

import itertools
import math
import random

import pytest
import torch

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.pruning.allocation import (
    Budget,
    check_sparsity,
    fit_counts,
    importance,
    largest_remainder,
    nearest_counts,
    rescale,
    top_k,
)
from plprune.pruning.constraints import FREE, Constraint
from tests.builders import tiny


def cases(count: int = 300):
    """Shares, a total and a least that can be met."""
    dice = random.Random(0)
    for _ in range(count):
        shares = [dice.choice([dice.random(), dice.random() ** 8 * 100]) for _ in range(dice.randint(1, 40))]
        least = dice.randint(0, 3)
        yield shares, dice.randint(least * len(shares), 2000), least


def test_rounded_shares_sum_to_the_total_and_respect_the_least() -> None:
    for shares, total, least in cases():
        numbers = largest_remainder(shares, total, least)
        assert sum(numbers) == total
        assert min(numbers) >= least


def test_rounded_shares_are_within_one_of_the_exact_ones() -> None:
    free = 0
    for shares, total, least in cases():
        exact = [share * total / sum(shares) for share in shares]
        if min(exact) < least:
            continue  # the least binds
        free += 1
        numbers = largest_remainder(shares, total, least)
        assert all(abs(n - x) < 1 for n, x in zip(numbers, exact, strict=True))
    assert free > 50


def test_a_larger_share_never_gets_less() -> None:
    for shares, total, least in cases():
        numbers = largest_remainder(shares, total, least)
        ranked = [n for _, n in sorted(zip(shares, numbers, strict=True))]
        assert ranked == sorted(ranked)


def test_whole_shares_are_kept_as_they_are() -> None:
    assert largest_remainder([3, 0, 5, 1], 9, least=0) == [3, 0, 5, 1]
    assert largest_remainder([3e6 + 1, 7e6, 1], 10**7 + 2) == [3 * 10**6 + 1, 7 * 10**6, 1]


def test_shares_of_nothing_are_equal() -> None:
    assert largest_remainder([0.0, 0.0, 0.0], 8) == [3, 3, 2]


def test_top_k_takes_the_best_and_of_equals_the_first() -> None:
    dice = random.Random(0)
    for _ in range(100):
        score = [float(dice.randint(0, 5)) for _ in range(dice.randint(1, 30))]
        k = dice.randint(0, len(score))
        best = sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:k])
        assert top_k(torch.tensor(score), k).tolist() == best


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
def test_a_sparsity_outside_of_0_to_1_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\)"):
        check_sparsity(sparsity)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.999])
def test_a_sparsity_within_0_to_1_is_accepted(sparsity: float) -> None:
    assert rescale(sparsity, 10, 10, "all") == pytest.approx(sparsity)


def test_the_rescaled_fraction_removes_what_was_asked_and_what_is_added() -> None:
    fraction = rescale(0.3, total=1000, prunable=700, what="it", added=40)
    assert fraction * 700 - 40 == pytest.approx(0.3 * 1000)
    assert rescale(0.0, 1000, 700, "it", added=40) == 0


def test_a_sparsity_that_needs_all_that_can_leave_is_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"the FFN is 60.0% of the blocks.*less than 0.600"):
        rescale(0.6, 100, 60, "the FFN")


def test_importance_is_the_authors_sigmoid() -> None:
    distances = [0.05, 0.2, 0.11, 0.31]
    sums = [d * 128 * 1024 for d in distances]  # they sum over the tokens of 128 windows of 1024
    mean = sum(sums) / 4
    expected = [1 / (1 + math.exp(-(s - mean) / 1e4)) for s in sums]
    assert importance(distances).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_gain_makes_importance_steeper_and_zero_makes_it_equal() -> None:
    steep, flat = importance([0.1, 0.2], gain=3.0), importance([0.1, 0.2], gain=0.0)
    assert steep[1] - steep[0] > importance([0.1, 0.2]).diff().item() > 0
    assert flat.tolist() == [0.5, 0.5]


def allowed_counts(count: int = 200):
    """Wanted numbers, those that are allowed, costs, and a target that can be met."""
    dice = random.Random(0)
    for _ in range(count):
        groups = dice.randint(1, 6)
        counts = [sorted(dice.sample(range(1, 40), dice.randint(1, 5))) for _ in range(groups)]
        costs = [dice.choice([1, 3, 10]) for _ in range(groups)]
        wanted = [dice.random() * 40 for _ in range(groups)]
        least, most = (sum(c[end] * cost for c, cost in zip(counts, costs, strict=True)) for end in (0, -1))
        yield wanted, counts, costs, least + dice.random() * (most - least)


def test_fitted_counts_are_allowed_and_no_single_step_leads_nearer_to_the_target() -> None:
    for wanted, counts, costs, target in allowed_counts():
        found = nearest_counts(wanted, counts, costs, target)
        total = sum(n * cost for n, cost in zip(found, costs, strict=True))
        assert all(n in c for n, c in zip(found, counts, strict=True))
        for n, c, cost in zip(found, counts, costs, strict=True):
            nearby = [c[i] for i in (c.index(n) - 1, c.index(n) + 1) if 0 <= i < len(c)]
            assert all(abs(total + (m - n) * cost - target) >= abs(total - target) - 1e-9 for m in nearby)


def test_of_equal_multiples_the_nearest_total_is_found_and_at_the_least_cost() -> None:
    """Against all there are."""
    dice = random.Random(1)
    for _ in range(50):
        wanted = [dice.random() * 100 for _ in range(4)]
        found = nearest_counts(wanted, [range(16, 97, 16)] * 4, [1] * 4, sum(wanted))
        every = list(itertools.product(range(16, 97, 16), repeat=4))
        nearest = min(abs(sum(each) - sum(wanted)) for each in every)
        assert abs(sum(found) - sum(wanted)) == pytest.approx(nearest)
        same = [each for each in every if sum(each) == sum(found)]
        away = min(sum((n - w) ** 2 for n, w in zip(each, wanted, strict=True)) for each in same)
        assert sum((n - w) ** 2 for n, w in zip(found, wanted, strict=True)) == pytest.approx(away)


def test_allowed_counts_that_meet_the_target_stay_as_they_are() -> None:
    assert nearest_counts([3, 8, 2], [range(1, 10)] * 3, [5, 1, 2], 27) == [3, 8, 2]
    assert nearest_counts([1], [[4, 9]], [1], 1000) == [9]
    assert nearest_counts([6.5], [[4, 9]], [1], 6.5) == [9]


def test_what_each_block_has_to_keep_is_fitted_within_it() -> None:
    rows = [(block, group) for block in blocks_of(tiny(intermediate_size=96)) for group in block.groups()]
    wanted = [n * keep for n, keep in zip((4, 96) * 3, (1.0, 0.9, 0.6, 0.5, 0.8, 0.7), strict=True)]
    asked = Constraint(width_multiple=16, tensor_parallel=2)
    costs = [block.cost(group) for block, group in rows]
    together, apart = fit_counts(rows, wanted, 0.75, asked), fit_counts(rows, wanted, 0.75, asked, each_block=True)
    assert together != apart
    for found in (together, apart):
        assert all(n % 2 == 0 for n in found)
        assert all(n % 16 == 0 for n in found[1::2])
        assert _kept(rows, costs, found) == pytest.approx(0.75, abs=0.03)
    for i in (0, 2, 4):  # the smallest step is a ninth of a block
        assert _kept(rows[i : i + 2], costs[i : i + 2], apart[i : i + 2]) == pytest.approx(0.75, abs=1 / 18)


def _kept(rows: list[tuple[Block, UnitGroup]], costs: list[int], counts: list[int]) -> float:
    whole = sum(cost * len(group) for cost, (_, group) in zip(costs, rows, strict=True))
    return sum(cost * count for cost, count in zip(costs, counts, strict=True)) / whole


@pytest.mark.parametrize(("kept", "near"), [(72, True), (80, True), (64, True), (88, False), (56, False), (96, False)])
def test_how_near_a_budget_is_near_enough(kept: int, near: bool) -> None:
    (block, *_) = blocks_of(tiny(intermediate_size=96))
    budget = Budget([block], 0.75, Constraint(width_multiple=8))
    of = round(budget.whole * 1.8)  # steps of 8 channels are 0.046 of it
    if near:
        return budget.check(0.14, of, [kept])
    with pytest.raises(ValueError, match=r"sparsity 0.14 is out of reach with .* the nearest is 0\.\d+; ask for that"):
        budget.check(0.14, of, [kept])


def test_without_a_constraint_all_counts_are_allowed() -> None:
    for block in blocks_of(tiny()):
        assert [list(FREE.counts(block, g)) for g in block.groups()] == [[1, 2, 3, 4], list(range(1, 49))]
        assert len(FREE.counts(block, block.groups("value_channels")[0])) == 16
