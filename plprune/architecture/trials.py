"""Cuts units of a block without weights, and sees whether it still computes the same for those that stay.

Some forward passes read numbers from attributes instead of shapes (`num_heads`). Which of them must change with the
number of units is found by trying.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plprune.architecture.anatomy import Part, by_producer
from plprune.architecture.cutting import complement, cut
from plprune.architecture.modeling_plprune import NoAttention, replace
from plprune.architecture.modules import is_projection, width
from plprune.architecture.probing import BlockProbes, Call, Probes


@dataclass
class Trial:
    """Cuts units of a block, and sees whether it still computes the same for the others."""

    model: nn.Module
    call: Call
    norms: bool

    def counts(self, part: Part, mixer: str) -> dict[str, int] | None:
        """The attributes that must change with the number of units; None if the block fails whatever they are."""
        if len(part) == 1:
            return {}
        block = self.model.get_submodule(self.call.path)
        modules, configs = _numbers(block, part, mixer)
        start = next((c for c in _guesses(modules, configs) if self.passes(dataclasses.replace(part, counts=c))), None)
        if start is None:
            return None
        needed = dict(start)
        for path in reversed(list(start)):
            fewer = {p: n for p, n in needed.items() if p != path}
            if self.passes(dataclasses.replace(part, counts=fewer)):
                needed = fewer
        return needed

    def passes(self, part: Part) -> bool:
        """Whether a cut block computes what the whole one computes for the units that stay."""
        return all(self._passes(part, keep) for keep in _choices(len(part)))

    def droppable(self, part: Part, mixer: str) -> bool:
        """Whether zeros in the place of the mixer's output do what zeros from its last projection do."""
        if not mixer:
            return False
        before = self._seen(silent=f"{self.call.path}.{part.consumer.path}")
        with self._copy() as block:
            replace(block, mixer, NoAttention(0))
            after = self._seen()
        inside = f"{mixer}."
        return _same({c: x for c, x in before.items() if not c.startswith(inside)}, after)

    def _passes(self, part: Part, keep: Tensor) -> bool:
        block = self.model.get_submodule(self.call.path)
        kept = {}
        for (path, _), index in by_producer(part.producers).items():
            if rows := projection_rows(block, path):
                gone = index[complement(keep, len(part))].flatten()
                kept[f"{self.call.path}.{path}"] = complement(gone, rows), rows
        after: dict[str, Tensor] = {}
        with self._copy() as own, contextlib.suppress(*FAILURES):
            cut(own, part.producers, part.consumer, part.counts, keep)
            after = self._seen(kept)
        path, columns = part.consumer.path, part.consumer.index[keep].flatten().sort().values
        return _same(self._whole | {path: self._whole[path][..., columns]}, after)

    @functools.cached_property
    def _whole(self) -> dict[str, Tensor]:
        """What the whole block computes."""
        return self._seen()

    @contextlib.contextmanager
    def _copy(self) -> Iterator[nn.Module]:
        """Puts a copy in the place of the block, for the duration of the context."""
        whole = self.model.get_submodule(self.call.path)
        own = copy.deepcopy(whole)
        replace(self.model, self.call.path, own)
        try:
            yield own
        finally:
            replace(self.model, self.call.path, whole)

    def _seen(self, kept: dict[str, tuple[Tensor, int]] | None = None, silent: str = "") -> dict[str, Tensor]:
        """The inputs of all projections, and the output; nothing if the block fails."""
        probes = Probes(self.model, self.norms)
        probes.kept, probes.silent = kept or {}, silent
        with probes.standing_in(), contextlib.suppress(*FAILURES):
            return BlockProbes(probes, self.call, children=False).run()
        return {}


# of blocks with odd shapes
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError)


def projection_rows(block: nn.Module, path: str) -> int:
    """The number of outputs of the projection at a path; 0 if there is another module, or a parameter."""
    module = dict(block.named_modules()).get(path)
    return width(module, "out_features") if module is not None and is_projection(module) else 0


def _same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        before[c].shape == after[c].shape and torch.allclose(before[c], after[c], rtol=1e-6, atol=1e-9) for c in before
    )


def _guesses(modules: dict[str, int], configs: dict[str, int]) -> Iterator[dict[str, int]]:
    """Which attributes may have to change, likely ones first; some have a value of the same size by chance."""
    every = modules | configs
    yield from ({}, modules, every)
    for size in (1, 2, len(every) - 1, len(every) - 2, 3):
        yield from (dict(some) for some in itertools.combinations(every.items(), max(0, size)))


def _choices(units: int) -> list[Tensor]:
    """Units to keep in trials: all but one, and every second."""
    return [complement(torch.tensor([units // 2]), units), torch.arange(0, units, 2)]


def _numbers(block: nn.Module, part: Part, mixer: str) -> tuple[dict[str, int], dict[str, int]]:
    """Attributes of modules, and of their configs, that may hold a size of the units; and their values per unit."""
    units = len(part)
    sizes = {units * index.shape[1] for index in by_producer(part.producers).values()}
    sizes |= {units, part.consumer.index.numel()}
    sizes |= {part.consumer.index.numel() // n for n in _dims(part)}
    modules, configs = {}, {}
    for name, module in block.named_modules():
        if not f"{name}.".startswith(f"{mixer}." if mixer else "") or is_projection(module):
            continue
        prefix = f"{name}." if name else ""
        own = {k: v for k, v in vars(module).items() if type(v) is int and v in sizes}
        modules |= {f"{prefix}{k}": v // units for k, v in own.items()}
        if (config := getattr(module, "config", None)) is not None:
            values = {k: v for k, v in vars(config).items() if type(v) is int and v in sizes}
            configs |= {f"{prefix}config.{k}": v // units for k, v in values.items()}
    return modules, configs


def _dims(part: Part) -> set[int]:
    """Sizes that a head may have."""
    together, apart = by_producer(part.producers).values(), (each.index for each in part.producers)
    own = {index.shape[1] for index in (*together, *apart)}
    return {n for n in own if part.consumer.index.numel() % n == 0}
