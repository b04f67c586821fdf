"""Calibration text, and observations of a model on it."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.io import distributed
from plprune.pruning.plan import fingerprint
from plprune.pruning.statistics import BlockInfluence, Statistic


@dataclass(frozen=True)
class Calibration:
    """Calibration text, and the devices to process it on.

    Args:
        batches: Token ids, [b, s] each, without padding.
        device: The device that the current block runs on; by default the model's.
        offload: Where to keep hidden states between blocks: in CPU memory, or on disk (only for a streamed model); by
            default on `device`.
        group: The processes that share the work, each with the whole text and the whole model; None for one process.
        known: Earlier observations (`plprune.pruning.observations`), used if model and text are the same.
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
        """Makes a Calibration from batches of token ids.

        Raises:
            ValueError: There are no batches, or they are not integer tensors of shape [b, s].
        """
        calibration = batches if isinstance(batches, cls) else cls(list(batches))
        if not calibration.batches:
            raise ValueError("no calibration text: give at least one batch of token ids")
        if any(not isinstance(b, Tensor) or b.ndim != 2 or b.is_floating_point() for b in calibration.batches):
            raise ValueError("calibration batches must be integer tensors of shape [batch, seq_len]")
        return calibration

    def windows(self, count: int | None = None) -> list[Tensor]:  # [1, s] each
        """The first `count` windows, or all of them, one per batch."""
        return [ids[i : i + 1] for ids in self.batches for i in range(len(ids))][:count]

    def part(self, first: int, last: int) -> "Calibration":
        """The windows from `first` to before `last`, in batches as large as before."""
        starts = itertools.accumulate(map(len, self.batches), initial=0)
        cut = [ids[max(0, first - at) : max(0, last - at)] for ids, at in zip(self.batches, starts, strict=False)]
        return replace(self, batches=[ids for ids in cut if len(ids)])

    def own_windows(self) -> list[Tensor]:  # [1, s] each
        """The windows of this process; can be empty."""
        return distributed.shard(self.windows(), self.group)

    def share(self) -> list[Tensor]:  # [b, s] each
        """The batches of this process; can be empty."""
        if self.group is None:
            return self.batches
        size = max(len(ids) for ids in self.batches)
        by_length = [list(run) for _, run in itertools.groupby(self.own_windows(), lambda ids: ids.shape[1])]
        return [torch.cat(run[i : i + size]) for run in by_length for i in range(0, len(run), size)]

    @property
    def first(self) -> int:
        """The index of this process's first window among all windows."""
        return next(iter(distributed.shard(range(len(self.windows())), self.group)), 0)

    @property
    def fingerprint(self) -> str:
        """A hash of the windows, independent of the batch size."""
        ids, lengths = [ids.flatten() for ids in self], [ids.shape[1] for ids in self for _ in ids]
        return fingerprint([("ids", torch.cat(ids).cpu()), ("lengths", torch.tensor(lengths))], values=1 << 30)


@dataclass(frozen=True)
class Observed:
    """The observations of one block."""

    influence: BlockInfluence
    statistics: dict[str, dict[str, Statistic]]  # by consumer path and class name


@dataclass(frozen=True)
class Observations:
    """Statistics of a model on a text. A method that needs only these can prune without a forward pass."""

    weights: str  # fingerprint of the model's weights
    text: str  # fingerprint of the text
    blocks: list[Observed]

    def are_of(self, model: PreTrainedModel, calibration: Calibration) -> bool:
        """Whether the observations belong to this text and to this model with its current weights."""
        return self.text == calibration.fingerprint and self.weights == fingerprint(model.named_parameters())
