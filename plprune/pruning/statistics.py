r"""Running statistics of a projection's inputs, accumulated in float64. How samples are batched does not matter.

Symbols: X inputs, b samples (sequences), s tokens per sample, d features, t token index over all samples.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from plprune.io.distributed import ProcessGroup, all_reduce_sum, gather_rows

Distance = Literal["angular", "cosine", "mse", "mae", "uniform"]
HALF = (torch.bfloat16, torch.float16)


class Stateful(ABC):
    """What batches add to, with `state_dict` and `load_state_dict` like a module.

    A subclass lists all its attributes in `state_fields`. Each is a tensor, a number, a string, another statistic, or a
    list or dictionary of tensors, numbers and strings.
    """

    state_fields: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def merge(self, group: ProcessGroup) -> None:
        """Adds the batches of all other processes. Afterwards every process holds the statistic of all batches."""

    def state_dict(self) -> dict[str, Any]:
        """Returns all attributes by name, nested statistics as dictionaries.

        Raises:
            ValueError: An attribute is not listed in `state_fields`.
        """
        if missing := sorted(vars(self).keys() - set(self.state_fields)):
            raise ValueError(
                f"{type(self).__name__} cannot be kept for --resume: add {', '.join(missing)} to its `state_fields`"
            )
        values = {name: getattr(self, name) for name in self.state_fields}
        return {name: v.state_dict() if isinstance(v, Stateful) else v for name, v in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_fields:
            value = getattr(self, name)
            if isinstance(value, Stateful):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


class Statistic(Stateful):
    """A running statistic of the inputs of one projection."""

    @abstractmethod
    def update(self, x: Tensor) -> None:  # [b, s, d]
        """Adds one batch."""


class StatisticGroup(Statistic):
    """Several named statistics of the same inputs."""

    def __init__(self, parts: dict[str, Statistic]) -> None:
        self.parts = parts

    def update(self, x: Tensor) -> None:  # [b, s, d]
        for part in self.parts.values():
            part.update(x)

    def merge(self, group: ProcessGroup) -> None:
        for part in self.parts.values():
            part.merge(group)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class Moments(Statistic):
    r"""Mean, variance and norm of every feature over all tokens.

    Example:
        >>> m = Moments()
        >>> m.update(torch.tensor([[[1.0], [2.0]]]))
        >>> m.update(torch.tensor([[[5.0], [8.0]]]))
        >>> m.mean, m.variance
        (tensor([4.], dtype=torch.float64), tensor([10.], dtype=torch.float64))
    """

    state_fields = ("_counts", "_means", "_m2")

    def __init__(self) -> None:
        self._counts: list[int] = []  # tokens of each sample
        self._means: list[Tensor] = []  # [b, d] each
        self._m2: list[Tensor] = []  # [b, d] each, squared deviations from the mean of the sample, summed over tokens

    def update(self, x: Tensor) -> None:  # [b, s, d]
        s, mean = x.shape[1], x.mean(1, dtype=torch.float64)
        pivot = mean.float()  # deviations from a rounded mean, in float32; the last line corrects for rounding
        m2 = torch.linalg.vector_norm(x - pivot[:, None], dim=1, dtype=torch.float64).square()
        self._counts += [s] * len(x)
        self._means.append(mean)
        self._m2.append(m2 - s * (mean - pivot).square())

    def merge(self, group: ProcessGroup) -> None:  # samples keep their order: bit-equal to one process
        for rows in (self._means, self._m2):
            rows[:] = [merged] if (merged := gather_rows(torch.cat(rows) if rows else None, group)) is not None else []
        counts = gather_rows(torch.tensor(self._counts, dtype=torch.int64) if self._counts else None, group)
        self._counts = counts.tolist() if counts is not None else []

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def mean(self) -> Tensor:  # [d]
        return (self._weights() * torch.cat(self._means)).sum(0) / self.count

    @property
    def variance(self) -> Tensor:  # [d]
        """Unbiased variance; needs at least two tokens."""
        spread = self._weights() * (torch.cat(self._means) - self.mean).square()
        return (torch.cat(self._m2) + spread).sum(0) / (self.count - 1)

    @property
    def running_variance(self) -> Tensor:  # [d]
        r"""Variance as FLAP's authors estimate it, with :math:`\bar X^{(c)}` the mean of samples 1 to c.

        .. math:: \frac{1}{C - 1} \sum_{c=2}^{C} \frac{c - 1}{c} \, \frac1s \sum_t (X_{ctj} - \bar X^{(c)}_j)^2

        A single sample gives the plain variance.
        """
        if len(self._counts) == 1:
            return self.variance
        means, weights = torch.cat(self._means), self._weights()
        running = (weights * means).cumsum(0) / weights.cumsum(0)
        about = torch.cat(self._m2) / weights + (means - running).square()
        c = torch.arange(1, len(means) + 1, dtype=means.dtype, device=means.device)[:, None]
        return ((c - 1) / c * about).sum(0) / (len(means) - 1)

    @property
    def norm(self) -> Tensor:  # [d]
        return (torch.cat(self._m2) + self._weights() * torch.cat(self._means).square()).sum(0).sqrt()

    def _weights(self) -> Tensor:  # [samples, 1]
        return torch.tensor(self._counts, dtype=torch.float64, device=self._means[0].device)[:, None]


class Norms(Statistic):
    r"""Euclidean norm of every feature: averaged over samples (`mean`), or over all tokens at once (`pooled`).

    Example:
        >>> n = Norms()
        >>> n.update(torch.tensor([[[3.0], [4.0]], [[0.0], [12.0]]]))
        >>> n.mean, n.pooled
        (tensor([8.5000], dtype=torch.float64), tensor([13.], dtype=torch.float64))
    """

    state_fields = ("samples", "_sum", "_squares")

    def __init__(self) -> None:
        self.samples = 0
        self._sum = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, x: Tensor) -> None:  # [b, s, d]
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        self._sum = self._sum.to(x.device) + norms.sum(0)
        self._squares = self._squares.to(x.device) + norms.square().sum(0)
        self.samples += len(x)

    def merge(self, group: ProcessGroup) -> None:
        self._sum, self._squares = all_reduce_sum(self._sum, group), all_reduce_sum(self._squares, group)
        self.samples = int(all_reduce_sum(torch.tensor(self.samples), group))

    @property
    def mean(self) -> Tensor:  # [d]
        r""":math:`\frac1C \sum_c \lVert X_{c,:,j} \rVert_2`"""
        return self._sum / self.samples

    @property
    def pooled(self) -> Tensor:  # [d]
        return self._squares.sqrt()


class Gram(Statistic):
    r"""Second moments :math:`X^\top X` and mean of all features.

    Products are computed in float32 and summed in float64. To keep digits where features are far from zero, the mean of
    the first batch is subtracted from all inputs. On a GPU, products of bfloat16 and float16 inputs are computed in
    TF32, which rounds factors to 11 bits; such inputs have 8 or 11.

    Example:
        >>> g = Gram()
        >>> g.update(torch.tensor([[[1.0, 2.0], [3.0, 2.0]]]))
        >>> g.covariance()
        tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64)
    """

    state_fields = ("count", "_pivot", "_sum", "_products")
    tile = 256  # columns per product: X'X is symmetric, so tiles below the diagonal are skipped

    def __init__(self) -> None:
        self.count = 0
        self._pivot: Tensor | None = None  # [d], subtracted from all inputs
        self._sum = torch.zeros((), dtype=torch.float64)
        self._products = torch.zeros((), dtype=torch.float64)  # [d, d], upper tiles

    def update(self, x: Tensor) -> None:  # [b, s, d]
        rounded = in_tf32(x.dtype, x.device.type)
        x = x.flatten(0, -2).float()
        x = x - (self._start(x.mean(0)) if self._pivot is None else self._pivot)
        with tf32() if rounded else contextlib.nullcontext():
            for i, tile in zip(range(0, x.shape[1], self.tile), self._tiles(), strict=True):
                tile += x[:, i : i + self.tile].T @ x[:, i:]
        self._sum += x.sum(0, dtype=torch.float64)
        self.count += len(x)

    def merge(self, group: ProcessGroup) -> None:
        """Converts all sums to the pivot of the first process that has one, and adds them up."""
        pivots = gather_rows(None if self._pivot is None else self._pivot[None], group)
        if pivots is None:  # no process has had an update
            return
        if self._pivot is None:
            self._start(pivots[0])
        self._move(pivots[0])
        self._sum = all_reduce_sum(self._sum, group)
        self.count = int(all_reduce_sum(torch.tensor(self.count), group))
        upper = all_reduce_sum(torch.cat([tile.flatten() for tile in self._tiles()]), group)
        for tile, part in zip(self._tiles(), upper.split([tile.numel() for tile in self._tiles()]), strict=True):
            tile.copy_(part.view_as(tile))

    def add(self, other: "Gram") -> None:
        """Adds the batches of another Gram, which changes to this one's pivot."""
        assert self._pivot is not None, "no update yet"
        other._move(self._pivot)
        self._sum += other._sum
        self._products += other._products
        self.count += other.count

    def _move(self, pivot: Tensor) -> None:
        assert self._pivot is not None, "no update yet"
        shift = (self._pivot - pivot).double()
        self._products.addr_(shift, self._sum).addr_(self._sum, shift).addr_(shift, shift, alpha=self.count)
        self._pivot, self._sum = pivot, self._sum + self.count * shift

    def _start(self, pivot: Tensor) -> Tensor:
        self._pivot, d = pivot, len(pivot)
        self._sum = torch.zeros(d, dtype=torch.float64, device=pivot.device)
        self._products = torch.zeros(d, d, dtype=torch.float64, device=pivot.device)
        return pivot

    def _tiles(self) -> list[Tensor]:
        """Returns views of the upper tiles of the products."""
        return [self._products[i : i + self.tile, i:] for i in range(0, len(self._products), self.tile)]

    @property
    def mean(self) -> Tensor:  # [d]
        assert self._pivot is not None, "no update yet"
        return self._pivot + self._sum / self.count

    def second_moment(self) -> Tensor:  # [d, d]
        return self.covariance().addr_(self.mean, self.mean)

    def covariance(self) -> Tensor:  # [d, d]
        for i in range(self.tile, len(self._products), self.tile):
            self._products[i:, i - self.tile : i] = self._products[i - self.tile : i, i:].T
        offset = self._sum / self.count
        return (self._products / self.count).addr_(offset, offset, alpha=-1)

    def about(self, point: Tensor) -> Tensor:  # [d] -> [d, d]
        """The second moment about a point."""
        offset = self.mean - point
        return self.covariance().addr_(offset, offset)

    def release(self) -> None:
        """Frees the second moments, which can be larger than a block. The mean stays available."""
        self._products = torch.zeros((), dtype=torch.float64)

    @property
    def norm(self) -> Tensor:  # [d], or a scalar zero before the first update
        if not self.count:
            return self._sum
        offset = self._sum / self.count
        return (self._products.diagonal() + self.count * (self.mean.square() - offset.square())).clamp(min=0).sqrt()


def in_tf32(dtype: torch.dtype, device: str) -> bool:
    """Whether :class:`Gram` multiplies inputs of this dtype in TF32."""
    return dtype in HALF and device == "cuda"


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Within the context, CUDA computes float32 products in TF32."""
    matmul: Any = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


class HoldoutGram(Statistic):
    r"""Two Grams of the same features: `held_out` over every fourth sample, `fitting` over the others.

    Args:
        first: Index of this process's first sample among the samples of all processes.

    Example:
        >>> p = HoldoutGram()
        >>> p.update(torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]))
        >>> p.fitting.mean, p.held_out.mean, p.norm.square()
        (tensor([2.], dtype=torch.float64), tensor([6.], dtype=torch.float64), tensor([84.], dtype=torch.float64))
    """

    state_fields = ("next", "fitting", "held_out")

    def __init__(self, first: int = 0) -> None:
        self.next, self.fitting, self.held_out = first, Gram(), Gram()

    def update(self, x: Tensor) -> None:  # [b, s, d]
        held_out = torch.arange(self.next, self.next + len(x)) % 4 == 1  # the second sample, so that two suffice
        for gram, mask in ((self.fitting, ~held_out), (self.held_out, held_out)):
            if mask.any():  # indices instead of the mask: a mask on a GPU would synchronise
                gram.update(x[mask.nonzero().flatten().to(x.device, non_blocking=True)])
        self.next += len(x)

    def merge(self, group: ProcessGroup) -> None:
        self.fitting.merge(group)
        self.held_out.merge(group)

    def pooled(self) -> Gram:
        """Merges both Grams into one and returns it. This statistic must not be used afterwards."""
        if not self.fitting.count:
            return self.held_out
        if not self.held_out.count:
            return self.fitting
        self.fitting.add(self.held_out)
        self.held_out.release()
        return self.fitting

    @property
    def norm(self) -> Tensor:  # [d]
        return torch.hypot(self.fitting.norm, self.held_out.norm)


class BlockInfluence:
    r"""Distances between a block's input and output, averaged over tokens.

    Example:
        >>> influence = BlockInfluence()
        >>> influence.update(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))
        >>> influence.distance("angular"), influence.distance("mae")
        (0.5, 1.0)
    """

    def __init__(self) -> None:
        self.count = 0
        names, zero = ("angular", "cosine", "mse", "mae"), torch.zeros((), dtype=torch.float64)
        self._sums: dict[str, Tensor] = dict.fromkeys(names, zero)  # stay on the GPU, to avoid synchronising

    def update(self, x: Tensor, y: Tensor) -> None:  # [b, s, d], [b, s, d]
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        cosine = torch.cosine_similarity(x, y).clamp(-1, 1)  # rounding can exceed 1, whose arc cosine is NaN
        change = y - x
        values = {
            "angular": cosine.arccos() / math.pi,
            "cosine": 1 - cosine,
            "mse": change.square().mean(-1),
            "mae": change.abs().mean(-1),
        }
        for name, value in values.items():
            self._sums[name] = self._sums[name].to(value.device) + value.sum(dtype=torch.float64)
        self.count += len(x)

    def merge(self, group: ProcessGroup) -> None:
        sums = all_reduce_sum(torch.tensor([*self._sums.values(), self.count], dtype=torch.float64), group)
        self._sums, self.count = dict(zip(self._sums, sums, strict=False)), int(sums[-1])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, **self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self._sums = state["count"], {name: state[name] for name in self._sums}

    def distance(self, name: Distance) -> float:
        """Returns the mean distance over tokens; `uniform` is 1 for every block."""
        return 1.0 if name == "uniform" else float(self._sums[name]) / self.count
