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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from plprune.architecture.anatomy import Anatomy, Part
from plprune.architecture.cutting import cut
from plprune.architecture.modeling_plprune import NoAttention, replace
from plprune.architecture.probing import TOKENS, Probes
from plprune.architecture.trials import (
    FAILURES,
    choices,
    complement,
    copied,
    differing,
    failure,
    gap,
    kept_rows,
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

    def proven(self, anatomies: Mapping[int, Anatomy], kinds: Sequence[int]) -> dict[int, Anatomy]:
        """The anatomies, by index of a block, without what fails; `kinds` has each block's first of its kind."""
        found = dict(anatomies)
        for others in ([i for i in range(len(kinds)) if i not in found], []):  # some read what others have cached
            self._passing = {f"{self.blocks}.{i}": found[kinds[i]].returned for i in others if kinds[i] in found}
            with contextlib.suppress(*FAILURES):
                self._seen(norms=False)
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
                droppable = self._droppable(found, [index])
                found[index] = dataclasses.replace(found[index], droppable=droppable)
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
                    block = copies.enter_context(copied(self.model, path))
                    kept |= {f"{path}.{name}": rows for name, rows in kept_rows(block, part, keep).items()}
                    cut(block, part.producers, part.consumer, part.counts, keep)
                    columns = part.consumer.index[keep].flatten().sort().values
                    for name in [n for n in expected if n.partition(WHERE)[2] == f"{path}.{part.consumer.path}"]:
                        expected[name] = expected[name][..., columns]
                if norms:
                    self._run(kept, False)
                found = gap(expected, self._run(kept, norms))
        except FAILURES as error:
            return f"{without(gone, units)} the model fails with a cache ({failure(error)})"
        return f"{without(gone, units)} {differing(*found)}" if found else ""

    def _droppable(self, anatomies: Mapping[int, Anatomy], indices: Iterable[int]) -> bool:
        mixers = {index: f"{self.blocks}.{index}.{anatomies[index].mixer}" for index in indices}
        consumers = {f"{self.blocks}.{i}.{a.consumer.path}" for i in mixers if (a := anatomies[i].attention)}
        masked = self._run({}, False, consumers)
        try:
            with contextlib.ExitStack() as copies:
                for index, path in mixers.items():
                    copies.enter_context(copied(self.model, path))
                    replace(self.model, path, NoAttention(index))
                dropped = self._run({}, False)
        except FAILURES:
            return False
        inside = tuple(f"{path}." for path in mixers.values())
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
        with probes.standing_in(), self._skipping():
            for step, tokens in (("prompt", TOKENS - 1), ("next token", 1)):
                probes.seen, probes.draw = {}, len(seen) > 0
                out = self.model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True, **state)
                seen |= {f"{step}{WHERE}{path}": x for path, x in probes.seen.items()}
                state = {name: x for name, x in out.items() if isinstance(x, Cache) or name in STATES}
                if not state:
                    break
        return seen

    @contextlib.contextmanager
    def _skipping(self) -> Iterator[None]:
        """Makes the blocks that are like others do nothing, for the duration of the context."""
        skipped = [(self.model.get_submodule(path), returned) for path, returned in self._passing.items()]
        for block, returned in skipped:
            block.forward = _returning(returned)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block, _ in skipped:
                del block.forward


def _returning(length: int) -> Callable[..., Any]:
    """A forward pass that returns its input, as the first of a tuple of some length unless that is 0."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (length - 1)) if length else hidden

    return forward


WHERE = " at "
