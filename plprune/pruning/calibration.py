"""Calibration text, and what was observed of a model on it."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.io import distributed
from plprune.pruning.plan import fingerprint
from plprune.pruning.statistics import BlockInfluence, Statistic


@dataclass(frozen=True)
class Calibration:
    """Calibration text, and the devices for computing with it.

    Args:
        batches: Token ids, one tensor [b, s] each, without padding.
        device: The device that the current block runs on; by default the model's.
        offload: Where hidden states are kept between blocks: in the CPU's memory, or on disk (only for a streamed
            model); by default on `device`.
        group: Processes that share the work, each with the whole text and the whole model; None for one process.
        known: Earlier observations (`plprune.pruning.observations`); used if model and text are the same.
    """

    batches: list[Tensor]
    device: torch.device | None = None
    offload: Literal["cpu", "disk"] | None = None
    group: distributed.ProcessGroup = None
    known: "Observations | None" = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    @classmethod
    def of(cls, batches: "Calibration | Iterable[Tensor]") -> "Calibration":
        """A Calibration of any batches of token ids.

        Raises:
            ValueError: There are no batches, or they do not have the shape [b, s].
        """
        calibration = batches if isinstance(batches, cls) else cls(list(batches))
        if not calibration.batches:
            raise ValueError("no calibration text: give at least one batch of token ids")
        if any(not isinstance(b, Tensor) or b.ndim != 2 or b.is_floating_point() for b in calibration.batches):
            raise ValueError("calibration batches must be integer tensors of shape [batch, seq_len]")
        return calibration

    def windows(self, count: int) -> list[Tensor]:  # [1, s] each
        """The first `count` windows, one per batch."""
        return self._windows()[:count]

    def share(self) -> list[Tensor]:  # [b, s] each
        """The batches of this process; possibly none."""
        if self.group is None:
            return self.batches
        size = max(len(ids) for ids in self.batches)
        mine = distributed.shard(self._windows(), self.group)
        alike = [list(run) for _, run in itertools.groupby(mine, lambda ids: ids.shape[1])]
        return [torch.cat(run[i : i + size]) for run in alike for i in range(0, len(run), size)]

    @property
    def first(self) -> int:
        """The index, among all windows, of this process's first."""
        return next(iter(distributed.shard(range(len(self._windows())), self.group)), 0)

    @property
    def fingerprint(self) -> str:
        """A hash of the windows; the batch size does not matter."""
        ids, lengths = [ids.flatten() for ids in self], [ids.shape[1] for ids in self for _ in ids]
        return fingerprint([("ids", torch.cat(ids).cpu()), ("lengths", torch.tensor(lengths))], values=1 << 30)

    def _windows(self) -> list[Tensor]:  # [1, s] each
        return [ids[i : i + 1] for ids in self.batches for i in range(len(ids))]


@dataclass(frozen=True)
class Observed:
    """The observations of one block.

    Args:
        influence: How far the block moves its hidden states.
        statistics: Statistics by the path of the consumer and the name of their class.
    """

    influence: BlockInfluence
    statistics: dict[str, dict[str, Statistic]]


@dataclass(frozen=True)
class Observations:
    """The observations of a model on a text: methods that need no others prune by them without a forward pass.

    Args:
        weights: Fingerprint of the model.
        text: Fingerprint of the text.
        blocks: The observations of each block.
    """

    weights: str
    text: str
    blocks: list[Observed]

    def are_of(self, model: PreTrainedModel, calibration: Calibration) -> bool:
        """Whether they are of this text and of this model with its present weights."""
        return self.text == calibration.fingerprint and self.weights == fingerprint(model.named_parameters())
