"""The rounds of a schedule end together where a single one would, whatever each of them misses."""

import pytest

from plprune.training.round_schedule import schedule


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("error", [0.0, 0.02, -0.02])
def test_rounds_make_up_for_what_earlier_ones_missed(count: int, error: float) -> None:
    left, steps = [1.0], []
    for each in schedule(0.6, 7, count, left.__getitem__):
        steps.append(each.steps)
        left.append(left[-1] * (1 - each.sparsity + (error if each.index < count - 1 else 0.0)))
    assert left[-1] == pytest.approx(0.4)
    assert (sum(steps), len(steps), max(steps) - min(steps) <= 1) == (7, count, True)
