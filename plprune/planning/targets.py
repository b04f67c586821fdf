"""Limits on a pruned model's parameters and memory, and the search for the least sparsity that meets them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import cast

from plprune.io.checks import check_required
from plprune.io.units import parse_amount
from plprune.planning.sizes import Ledger


@dataclasses.dataclass(frozen=True)
class Target:
    """Limits on the size of a pruned model. The least sparsity that meets them replaces the method's `sparsity`.

    All limits must hold. Without a limit, there is no target.

    Args:
        parameters: The most parameters of the whole model, like 5.0B or 100M.
        memory: The most memory for weights and the KV cache of `batch` sequences, like 8GiB or 500MB.
        batch: The number of sequences that `memory` includes.
        context: Tokens per sequence.
        active_parameters: The most parameters that one token reaches, with only the experts that run for it.
    """

    parameters: int | str | None = None
    memory: int | str | None = None
    batch: int = 1
    context: int = 4096
    active_parameters: int | str | None = None

    def __post_init__(self) -> None:
        check_required(self, "target.")
        if self.batch < 1 or self.context < 1:
            raise ValueError("target.memory needs at least one sequence of one token: check target.batch and context")
        _ = self.limits

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are set, in parameters and bytes; empty if there is no target."""
        given = {"parameters": (self.parameters, ""), "memory": (self.memory, "B")}
        given |= {"active_parameters": (self.active_parameters, "")}
        return {name: parse_amount(at, f"target.{name}", unit) for name, (at, unit) in given.items() if at is not None}

    def sizes(self, ledger: Ledger, counts: Mapping[str, int] = {}) -> dict[str, int]:
        """The size of a model in the units of the limits, if its groups keep the given numbers of units."""
        memory = ledger.memory(counts, self.batch, self.context)
        every = {"parameters": ledger.parameters(counts), "memory": memory}
        every |= {"active_parameters": ledger.active_parameters(counts)}
        return {name: every[name] for name in self.limits}


def least_sparsity(excess: Callable[[float], float | None], steps: int = 16) -> tuple[float, float]:
    """Searches for the least sparsity at which a model is small enough.

    Sizes can change in steps, so a smaller sparsity may exist in rare cases.

    Args:
        excess: Returns the size at a sparsity as a share of the limit, so that 1 or less is small enough. Returns None
            if the method refuses the sparsity.
        steps: The number of intervals of the first, coarse search.

    Returns:
        The sparsity and its share. If no sparsity is small enough, the one with the least share, above 1.

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
        if share is None and best[1] < math.inf:  # the method refuses this one, but not all before it
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
    """Bisects between a sparsity that is too low and one that is enough, for the least that is enough."""
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
    """Bisects between a sparsity that the method accepts and one that it refuses, for the least share."""
    best = low, cast(float, excess(low))
    for _ in range(steps):
        middle = (low + high) / 2
        share = excess(middle)
        if share is None:
            high = middle
        else:
            low, best = middle, min(best, (middle, share), key=lambda one: one[1])
    return best
