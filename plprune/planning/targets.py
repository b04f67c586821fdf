"""The sparsity that a target asks for."""

import math
from collections.abc import Callable
from typing import cast


def solve(excess: Callable[[float], float | None], steps: int = 16) -> tuple[float, float]:
    """The least sparsity at which a model is small enough, nearly, and by how much it misses.

    Where sizes come in steps, a smaller sparsity may rarely do too.

    Args:
        excess: What a sparsity leaves, as a share of what may be: at most 1 is enough. None if the method refuses it.
        steps: Parts of the range that are looked at one after another.

    Returns:
        The sparsity, and its excess: above 1 if none is enough, for the one that leaves least.

    Raises:
        ValueError: The method refuses every sparsity.

    Example:
        >>> sparsity, share = solve(lambda s: (1 - s) / 0.7 if s < 0.9 else None)
        >>> round(sparsity, 3), round(share, 3)
        (0.3, 1.0)
    """
    below, best = 0.0, (0.0, math.inf)
    for i in range(steps + 1):
        at = min(i / steps, 1 - 1e-6)
        share = excess(at)
        if share is not None and share <= 1:
            return _refined(excess, below, (at, share)) if at else (at, share)
        if share is None and best[1] < math.inf:  # beyond what the method can do; how far does that go?
            found = _farthest(excess, best[0], at)
            best = min(best, found, key=lambda one: one[1])
            if best[1] <= 1:
                return _refined(excess, below, best)
        if share is not None:
            below, best = at, min(best, (at, share), key=lambda one: one[1])
    if math.isinf(best[1]):
        raise ValueError("no sparsity is possible")
    return best


def _refined(
    excess: Callable[[float], float | None], low: float, found: tuple[float, float], steps: int = 18
) -> tuple[float, float]:
    """Between a sparsity that is too low and one that is enough, the least that is."""
    for _ in range(steps):
        if found[1] > 1 - 1e-4 or found[0] - low < 1e-6:
            break
        middle = (low + found[0]) / 2
        share = excess(middle)
        if share is not None and share <= 1:
            found = middle, share
        else:
            low = middle
    return found


def _farthest(excess: Callable[[float], float | None], low: float, high: float, steps: int = 12) -> tuple[float, float]:
    """Between a sparsity that the method can do and one that it cannot, the one that leaves least."""
    best = low, cast(float, excess(low))
    for _ in range(steps):
        middle = (low + high) / 2
        share = excess(middle)
        if share is None:
            high = middle
        else:
            low, best = middle, min(best, (middle, share), key=lambda one: one[1])
    return best
