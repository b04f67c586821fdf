"""Proves, on a whole model without weights, that cut blocks do what they do with the units masked, cached or not.

Trials (`plprune.architecture.trials`) run one block on a whole sequence. Here the model reads some tokens into a cache
of its own class, and then one more token, whole and with a block of each kind cut.

Neither needs the weights. Whatever these are, a projection passes numbers on: the stand-ins of
`plprune.architecture.probing` pass random ones. If with these every projection of the cut model gets the inputs that it
gets in the whole model, apart from the columns that left, then so it does with any weights whose masked columns are
zero, from one projection to the next. In float64, rounding is far below any true difference.
"""

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from plprune.architecture.anatomy import Anatomy, Part
from plprune.architecture.cutting import complement
from plprune.architecture.modeling_plprune import NoAttention, NoFFN, replace
from plprune.architecture.modules import passing, replaced_forwards
from plprune.architecture.probing import SAMPLES, TOKENS, BlockProbes, Call, Probes
from plprune.architecture.trials import (
    FAILURES,
    choices,
    columns_of,
    copied,
    cut_copy,
    differing,
    failure,
    gap,
    without,
)

STATES = ("cache", "past_key_values", "cache_params", "state")  # names of what a model keeps between tokens


class Proof:
    """Proves the anatomies of some blocks.

    Args:
        model: From :func:`plprune.architecture.probing.weightless`.
        blocks: The path of its list of blocks.
    """

    def __init__(self, model: PreTrainedModel, blocks: str) -> None:
        self.model, self.blocks = model, blocks
        self._passing: dict[str, int] = {}  # paths of blocks that do nothing, and the length of the tuple they return
        self._whole: dict[bool, dict[str, Tensor]] = {}
        self._runs = False  # with a cache

    def proven(self, anatomies: Mapping[int, Anatomy], kinds: Sequence[int]) -> dict[int, Anatomy]:
        """The anatomies, by index of a block, without what fails; `kinds` has each block's first of its kind."""
        found = dict(anatomies)
        for others in ([i for i in range(len(kinds)) if i not in found], []):  # some read what others have cached
            self._passing = {f"{self.blocks}.{i}": found[kinds[i]].returned for i in others if kinds[i] in found}
            with contextlib.suppress(*FAILURES):
                self._seen(norms=False)
                self._runs = True
                break
        else:
            return found  # the whole model does not run with a cache either
        for kind in ("attention", "ffn"):
            parts = {i: part for i, each in found.items() if (part := getattr(each, kind)) is not None}
            if parts and self._fault(parts):  # which of them it is
                for index, part in parts.items():
                    if fault := self._fault({index: part}):
                        found[index] = found[index].refusing(kind, f"{part.consumer.path}, as {fault}")
        droppable = [i for i, each in found.items() if each.droppable]
        if droppable and not self._droppable(found, droppable):
            for index in droppable:
                found[index] = dataclasses.replace(found[index], droppable=self._droppable(found, [index]))
        return found

    def whole_ffns(self, anatomies: Mapping[int, Anatomy]) -> dict[int, Anatomy]:
        """The anatomies, by index of a block, without the FFNs that cannot leave as a whole; after :meth:`proven`."""
        found = dict(anatomies)
        some = [i for i, each in found.items() if each.whole_ffn]
        if self._runs and some and not self._whole_ffns(found, some):
            for index in some:
                if not self._whole_ffns(found, [index]):
                    found[index] = dataclasses.replace(found[index], whole_ffn=None)
        return found

    def _fault(self, parts: Mapping[int, Part]) -> str:
        """How the model with cut blocks differs from the whole one; "" if it does not."""
        norms = any(part.tied for part in parts.values())
        expected, kept = dict(self._seen(norms)), {}
        units, gone = 0, torch.zeros(0, dtype=torch.long)
        try:
            with contextlib.ExitStack() as copies:
                for index, part in parts.items():
                    path, keep = f"{self.blocks}.{index}", choices(len(part))[-1]
                    units, gone = len(part), complement(keep, len(part))
                    kept |= copies.enter_context(cut_copy(self.model, path, part, keep))
                    for name in [n for n in expected if n.partition(WHERE)[2] == f"{path}.{part.consumer.path}"]:
                        expected[name] = expected[name][..., columns_of(part, keep)]
                if norms:
                    self._run(kept, False)
                found = gap(expected, self._run(kept, norms))
        except FAILURES as error:
            return f"{without(gone, units)} the model fails with a cache ({failure(error)})"
        return f"{without(gone, units)} {differing(*found)}" if found else ""

    def _droppable(self, anatomies: Mapping[int, Anatomy], indices: Iterable[int]) -> bool:
        own = {i: anatomies[i] for i in indices}
        consumers = {f"{self.blocks}.{i}.{each.attention.consumer.path}" for i, each in own.items() if each.attention}
        stand_ins = {f"{self.blocks}.{i}.{each.mixer}": NoAttention(i) for i, each in own.items()}
        return self._removable(stand_ins, consumers)

    def _whole_ffns(self, anatomies: Mapping[int, Anatomy], indices: Iterable[int]) -> bool:
        own = {i: anatomies[i] for i in indices}
        consumers = {f"{self.blocks}.{i}.{each.ffn.consumer.path}" for i, each in own.items() if each.ffn}
        found = {f"{self.blocks}.{i}": each.whole_ffn for i, each in own.items() if each.whole_ffn}
        stand_ins = {f"{block}.{each.path}": NoFFN(each.returned) for block, each in found.items()}
        return self._removable(stand_ins, consumers)

    def _removable(self, stand_ins: Mapping[str, nn.Module], consumers: Iterable[str]) -> bool:
        """Whether stand-ins for the modules at some paths do what zeros from their last projections do."""
        masked = self._run({}, False, consumers)
        try:
            with contextlib.ExitStack() as copies:
                for path, stand_in in stand_ins.items():
                    copies.enter_context(copied(self.model, path))
                    replace(self.model, path, stand_in)
                dropped = self._run({}, False)
        except FAILURES:
            return False
        inside = tuple(f"{path}." for path in stand_ins)
        outside = {name: x for name, x in masked.items() if not name.partition(WHERE)[2].startswith(inside)}
        return not gap(outside, dropped)

    def _seen(self, norms: bool) -> dict[str, Tensor]:
        """The inputs of all projections of the whole model."""
        if norms not in self._whole:
            self._whole[norms] = self._run({}, norms)
        return self._whole[norms]

    def _run(
        self, kept: Mapping[str, tuple[Tensor, int]], norms: bool, silent: Iterable[str] = ()
    ) -> dict[str, Tensor]:
        """The inputs of all projections, of some tokens and then of one more."""
        probes, seen, state = Probes(self.model, norms), {}, {}
        probes.kept, probes.silent = dict(kept), set(silent)
        blocks = [self.model.get_submodule(path) for path in self._passing]
        with probes.standing_in(), replaced_forwards(blocks, [*map(passing, self._passing.values())]):
            for draw, (step, tokens) in enumerate((("prompt", TOKENS - 1), ("next token", 1))):
                probes.seen, probes.draw = {}, draw
                out = self.model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True, **state)
                seen |= {f"{step}{WHERE}{path}": x for path, x in probes.seen.items()}
                state = {name: x for name, x in out.items() if isinstance(x, Cache) or name in STATES}
                if not state:
                    break
        return seen


WHERE = " at "


def reads_others(model: PreTrainedModel, blocks: str, returned: Mapping[int, int]) -> str:
    """Why blocks cannot run one by one, in words; "" if each runs once, in order, and reads hidden states alone.

    Methods run blocks one by one, with the arguments that they get in a model whose blocks do nothing.

    Args:
        model: From :func:`plprune.architecture.probing.weightless`.
        blocks: The path of its list of blocks.
        returned: The length of the tuple that each block returns, by its index.
    """
    order: list[str] = []
    doing, idle = _arguments(model, blocks, {}, order), _arguments(model, blocks, returned)
    every = [f"{blocks}.{i}" for i in range(len(cast(nn.ModuleList, model.get_submodule(blocks))))]
    if order != every:
        first = next(one or other for one, other in itertools.zip_longest(every, order) if one != other)
        return f"do not run once each, in order, on text alone (first {first})"
    probes = Probes(model)
    probes.samples = SAMPLES
    for path, (hidden, given) in doing.items():
        others = idle.get(path, (hidden, {}))[1]
        if not (names := [name for name, value in given.items() if not _equal(value, others.get(name))]):
            continue
        seen: list[dict[str, Tensor]] = []
        with probes.standing_in(), contextlib.suppress(*FAILURES):
            for values in (given, others):
                seen.append(BlockProbes(probes, Call(path, (hidden,), values), children=False).run())
        if len(seen) < 2 or gap(*seen):
            return f"read more of each other than hidden states (`{names[0]}` of {path})"
    return ""


def _arguments(
    model: PreTrainedModel, blocks: str, idle: Mapping[int, int], order: list[str] | None = None
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """The hidden states and the other arguments of each block, by its path; the blocks in `idle` do nothing.

    `order` gets the paths of the blocks as they run.
    """
    probes = Probes(model)
    probes.samples = SAMPLES
    found: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    modules = {f"{blocks}.{i}": module for i, module in enumerate(model.get_submodule(blocks).children())}

    def note(path: str, names: Sequence[str]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **{k: _held(v) for k, v in kwargs.items()}}
            found[path] = given.pop(names[0]), given
            if order is not None:
                order.append(path)
            probes.seen.clear()  # that of all blocks takes gigabytes

        return hook

    handles = []
    for path, module in modules.items():
        names = list(inspect.signature(module.forward).parameters)
        handles.append(module.register_forward_pre_hook(note(path, names), with_kwargs=True))
    still = [module for index, module in enumerate(modules.values()) if index in idle]
    with probes.standing_in(), replaced_forwards(still, [passing(idle[i]) for i in sorted(idle)]):
        model(input_ids=torch.ones(SAMPLES, TOKENS, dtype=torch.long), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _held(value: Any) -> Any:
    """What a collection holds now, as blocks may add to it."""
    return dict(value) if type(value) is dict else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if type(one) is dict and type(other) is dict:
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    return one is other or (isinstance(one, int | float | str) and one == other)
