"""Cuts units of a block without weights, and sees whether it still computes the same for those that stay.

Some forward passes read numbers from attributes instead of shapes (`num_heads`). Which of them must change with the
number of units is found by trying.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plprune.architecture.anatomy import Part, by_producer
from plprune.architecture.cutting import complement, cut
from plprune.architecture.modeling_plprune import NoAttention, replace
from plprune.architecture.modules import is_projection, own_parameter, width
from plprune.architecture.probing import BlockProbes, Call, Probes


@dataclass(frozen=True)
class Fault:
    """Why units cannot leave.

    Args:
        gap: The largest difference from the block with these units masked, relative to the largest value there;
            infinite if the cut block fails.
        said: What happens.
    """

    gap: float
    said: str


@dataclass
class Trial:
    """Cuts units of a block, and sees whether it still computes the same for the others."""

    model: nn.Module
    call: Call
    norms: bool

    def counts(self, part: Part, mixer: str) -> dict[str, int] | Fault:
        """The attributes that must change with the number of units; or how the block fails whatever they are."""
        if len(part) == 1:
            return {}
        block = self.model.get_submodule(self.call.path)
        guesses, faults = _guesses(*_numbers(block, part, mixer)), []
        for start in guesses:
            fault = self.fault(dataclasses.replace(part, counts=start))
            if fault is None:
                return self._needed(part, start)
            faults.append(fault)
        return min(faults, key=lambda fault: fault.gap)

    def passed(self, part: Part, mixer: str) -> str:
        """The argument with values for all units, without some of which the cut block would work; "" if none is."""
        block = self.model.get_submodule(self.call.path)
        guesses = list(itertools.islice(_guesses(*_numbers(block, part, mixer)), 3))
        keep, names = choices(len(part))[-1], list(inspect.signature(block.forward).parameters)
        given = dict(zip(names[1:], self.call.args[1:], strict=False)) | self.call.kwargs
        for name, value in given.items():
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if size % len(part) == 0:
                    fewer = value.index_select(axis, torch.arange(size).view(-1, len(part))[:, keep].flatten())
                    call = Call(self.call.path, self.call.args[:1], given | {name: fewer})
                    if any(not self._fault(dataclasses.replace(part, counts=each), keep, call) for each in guesses):
                        return name
        return ""

    def fault(self, part: Part) -> Fault | None:
        """How a cut block differs from the whole one for the units that stay; None if it does not."""
        faults = (self._fault(part, keep) for keep in choices(len(part)))
        return next((fault for fault in faults if fault is not None), None)

    def droppable(self, part: Part, mixer: str) -> bool:
        """Whether zeros in the place of the mixer's output do what zeros from its last projection do."""
        return bool(mixer) and self.removable(mixer, NoAttention(0), [part.consumer.path])

    def removable(self, path: str, stand_in: nn.Module, consumers: Iterable[str]) -> bool:
        """Whether a stand-in for the module at a path does what zeros from its last projections do."""
        before = self._seen(silent={f"{self.call.path}.{consumer}" for consumer in consumers})
        with copied(self.model, self.call.path) as block, contextlib.suppress(*FAILURES):
            replace(block, path, stand_in)
            inside = f"{path}."
            return not gap({c: x for c, x in before.items() if not c.startswith(inside)}, self._seen())
        return False

    def _needed(self, part: Part, start: dict[str, int]) -> dict[str, int]:
        """Those of some attributes that are needed."""
        needed = dict(start)
        for path in reversed(list(start)):
            fewer = {p: n for p, n in needed.items() if p != path}
            if self.fault(dataclasses.replace(part, counts=fewer)) is None:
                needed = fewer
        return needed

    def _fault(self, part: Part, keep: Tensor, call: Call | None = None) -> Fault | None:
        gone = complement(keep, len(part))
        try:
            with cut_copy(self.model, self.call.path, part, keep) as kept:
                after = self._seen(kept, call=call)
                if self.norms:  # these must run too, whatever they compute of fewer inputs
                    self._seen(kept, call=call, norms=False)
        except FAILURES as error:
            return Fault(math.inf, f"{without(gone, len(part))} the block fails ({failure(error)})")
        path = part.consumer.path
        found = gap(self._whole | {path: self._whole[path][..., columns_of(part, keep)]}, after)
        return found and Fault(found[0], f"{without(gone, len(part))} {differing(*found)}")

    @functools.cached_property
    def _whole(self) -> dict[str, Tensor]:
        """What the whole block computes."""
        return self._seen()

    def _seen(
        self,
        kept: dict[str, tuple[Tensor, int]] | None = None,
        silent: Collection[str] = (),
        call: Call | None = None,
        norms: bool | None = None,
    ) -> dict[str, Tensor]:
        """The inputs of all projections, and the output."""
        probes = Probes(self.model, self.norms if norms is None else norms)
        probes.kept, probes.silent = kept or {}, set(silent)
        with probes.standing_in():
            return BlockProbes(probes, call or self.call, children=False).run()


# of blocks with odd shapes
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError, KeyError)


def projection_rows(block: nn.Module, path: str) -> int:
    """The number of outputs of the projection at a path; 0 if there is another module, or a parameter."""
    module = dict(block.named_modules()).get(path)
    return width(module, "out_features") if module is not None and is_projection(module) else 0


@contextlib.contextmanager
def copied(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Puts a copy in the place of a block, for the duration of the context."""
    whole = model.get_submodule(path)
    own = copy.deepcopy(whole)
    replace(model, path, own)
    try:
        yield own
    finally:
        replace(model, path, whole)


@contextlib.contextmanager
def cut_copy(model: nn.Module, path: str, part: Part, keep: Tensor) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Puts a copy that has lost all units but some in the place of a block, for the duration of the context.

    Gives the rows that its projections keep, and how many they had, by their paths in the model.
    """
    with copied(model, path) as block:
        kept = {}
        for (name, _), index in by_producer(part.producers).items():
            if rows := projection_rows(block, name):
                kept[f"{path}.{name}"] = complement(index[complement(keep, len(part))].flatten(), rows), rows
        cut(block, part.producers, part.consumer, part.counts, keep)
        yield kept


def columns_of(part: Part, keep: Tensor) -> Tensor:
    """The consumer's columns of some units, ascending."""
    return part.consumer.index[keep].flatten().sort().values


def gap(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[float, str] | None:
    """The largest relative difference and where it is, if there is any beyond rounding."""
    gaps: dict[str, float] = {}
    for path in before.keys() | after.keys():
        x, y = before.get(path), after.get(path)
        if x is None or y is None or x.shape != y.shape:
            gaps[path] = math.inf
        elif not torch.allclose(x, y, rtol=1e-6, atol=1e-9):
            gaps[path] = float((y - x).abs().max() / x.abs().max().clamp(min=1e-30))
    worst = max(gaps, key=lambda path: gaps[path], default="")
    return (gaps[worst], worst) if gaps else None


def without(gone: Tensor, units: int) -> str:
    """The units that left in a trial, in words."""
    some = ", ".join(map(str, gone[:4].tolist())) + (", ..." if len(gone) > 4 else "")
    return f"without unit{'s' * (len(gone) > 1)} {some} of {units}"


def differing(by: float, path: str) -> str:
    """The difference from the masked block, in words."""
    where = f"the inputs of {path}" if path else "the outputs"
    how = "have other sizes than" if math.isinf(by) else f"differ by {by:.2g} of the largest from"
    return f"{where} {how} those of the masked block"


def failure(error: Exception) -> str:
    """An error of the model's own code, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _guesses(modules: dict[str, int], configs: dict[str, int]) -> Iterator[dict[str, int]]:
    """Which attributes may have to change, likely ones first; some have a value of the same size by chance."""
    every = modules | configs
    yield from ({}, modules, every)
    alike: dict[str, dict[str, int]] = {}  # those of one name in several modules
    for path, each in modules.items():
        alike.setdefault(path.rpartition(".")[2], {})[path] = each
    for count in (1, 2):
        for some in itertools.combinations(alike.values(), count):
            yield {path: each for own in some for path, each in own.items()}
    sizes = {path: each for path, each in modules.items() if each > 1}
    numbers = [pair for pair in every.items() if pair[0] not in sizes]
    for size in (1, 0, 2):
        yield from (sizes | dict(some) for some in itertools.combinations(numbers, size))
    for size in (1, 2, len(every) - 1, len(every) - 2, 3):
        yield from (dict(some) for some in itertools.combinations(every.items(), max(0, size)))


def choices(units: int) -> list[Tensor]:
    """Units to keep in trials: all but one, and a random half."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(units))
    return [complement(torch.tensor([units // 2]), units), order[: units - units // 2].sort().values]


def _numbers(block: nn.Module, part: Part, mixer: str) -> tuple[dict[str, int], dict[str, int]]:
    """Attributes of modules, and of their configs, that may hold a size of the units; and what each unit has of it."""
    units, columns = len(part), part.consumer.index.numel()
    rows = {source: index.shape[1] for source, index in by_producer(part.producers).items()}
    each = {_size(block, *source): own for source, own in rows.items()}  # some of its rows may belong to no unit
    sizes = {units, columns, *(units * own for own in rows.values())}
    each |= {size: size // units for size in (*sizes, *(columns // n for n in _dims(part)))}
    modules, configs = {}, {}
    for name, module in block.named_modules():
        if not f"{name}.".startswith(f"{mixer}." if mixer else "") or is_projection(module):
            continue
        prefix = f"{name}." if name else ""
        modules |= {f"{prefix}{k}": each[v] for k, v in vars(module).items() if type(v) is int and v in each}
        if (config := getattr(module, "config", None)) is not None:
            values = {k: v for k, v in vars(config).items() if type(v) is int and v in each}
            configs |= {f"{prefix}config.{k}": each[v] for k, v in values.items()}
    return modules, configs


def _size(block: nn.Module, path: str, axis: int) -> int:
    """The size of a producer."""
    owner, _, name = path.rpartition(".")
    parameter = own_parameter(block.get_submodule(owner), name)
    return width(block.get_submodule(path), "out_features") if parameter is None else parameter.shape[axis]


def _dims(part: Part) -> set[int]:
    """Sizes that a head may have."""
    together, apart = by_producer(part.producers).values(), (each.index for each in part.producers)
    own = {index.shape[1] for index in (*together, *apart)}
    return {n for n in own if part.consumer.index.numel() % n == 0}
