"""What a pruned model may be at most, and the sparsity that this asks for."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import cast

from plprune.io.checks import check_required
from plprune.io.units import parse_amount
from plprune.planning.sizes import Ledger


@dataclasses.dataclass(frozen=True)
class Target:
    """What a pruned model may be at most: the sparsity is then found by it, and what is given for it does not count.

    Of two limits the stricter counts; without any there is no target.

    Args:
        parameters: How many parameters the whole model may have, like 5.0B or 100M.
        memory: What its weights and the keys and values of `batch` sequences may take, like 8GiB or 500MB.
        batch: Sequences for which `memory` has to do.
        context: Tokens of each.
    """

    parameters: int | str | None = None
    memory: int | str | None = None
    batch: int = 1
    context: int = 4096

    def __post_init__(self) -> None:
        check_required(self, "target.")
        if self.batch < 1 or self.context < 1:
            raise ValueError("target.memory is of at least one sequence of one token: target.batch and target.context")
        _ = self.limits

    @property
    def limits(self) -> dict[str, int]:
        """Parameters, and bytes of memory; empty if there is no target."""
        given = {"parameters": (self.parameters, ""), "memory": (self.memory, "B")}
        return {name: parse_amount(at, f"target.{name}", unit) for name, (at, unit) in given.items() if at is not None}

    def sizes(self, ledger: Ledger, counts: Mapping[str, int] = {}) -> dict[str, int]:
        """What a model would be, in terms of the limits, if its groups kept so many units."""
        memory = ledger.memory(counts, self.batch, self.context)
        every = {"parameters": ledger.parameters(counts), "memory": memory}
        return {name: every[name] for name in self.limits}


def least_sparsity(excess: Callable[[float], float | None], steps: int = 16) -> tuple[float, float]:
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
        >>> sparsity, share = least_sparsity(lambda s: (1 - s) / 0.7 if s < 0.9 else None)
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
