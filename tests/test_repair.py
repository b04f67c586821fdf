"""Closed forms against torch.linalg.lstsq on the inputs themselves."""

import pytest
import torch
from torch import Tensor

from plprune.repair import compensation, restore

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
