"""Budgets, top-k and exact rounding, on many random cases."""

import math
import random

import pytest
import torch

from plprune.allocation import check_sparsity, importance, largest_remainder, rescale, top_k


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
