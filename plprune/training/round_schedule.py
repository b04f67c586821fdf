"""The schedule of several rounds of pruning and recovery: the sparsity and the training steps of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from plprune.pruning.allocation import largest_remainder, next_sparsity


@dataclass(frozen=True)
class Round:
    """One of several rounds.

    Args:
        index: Its index, from 0.
        sparsity: The fraction to remove of the block parameters that are left before the round.
        steps: Its training steps.
    """

    index: int
    sparsity: float
    steps: int


def schedule(sparsity: float, steps: int, rounds: int, remaining: Callable[[int], float]) -> Iterator[Round]:
    """Divides a pruning and its recovery into rounds; a round makes up for what the ones before it missed.

    Args:
        sparsity: The fraction of the original block parameters to remove in all rounds together.
        steps: Training steps of all rounds together.
        rounds: The number of rounds.
        remaining: Maps a round's index to the fraction of the original block parameters that is left before it. It is
            called only once the round before has ended.
    """
    for index, share in enumerate(largest_remainder([1.0] * rounds, steps)):
        yield Round(index, next_sparsity(sparsity, remaining(index), index + 1, rounds), share)
