"""Drops attentions, FFNs, or whole blocks by greedy search: each step drops what is missed least, by the loss.

Dropping the attention or the FFN of block l changes nothing before block l. The search stores the hidden states that
enter each block, and starts each trial at its block: the same losses as full forward passes, for about half the work.
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor

from plprune.architecture.blocks import Block, UnitGroup
from plprune.io import distributed
from plprune.io.progress import Progress
from plprune.pruning.forward import logits_from, record_inputs, run_block
from plprune.pruning.hidden_states import HiddenStates
from plprune.pruning.losses import next_token_loss
from plprune.pruning.surgery import Surgery, may_leave, without

log = logging.getLogger(__name__)


class AttentionSearch:
    """Drops sub-blocks or whole blocks one at a time, each time the one whose absence gives the lowest loss.

    Args:
        surgery: Drops them; its model is in evaluation mode.
        windows: Token ids, [1, s] each.
        device: The device that runs the blocks.
        group: Processes that share the trials.
    """

    def __init__(
        self, surgery: Surgery, windows: list[Tensor], device: torch.device, group: distributed.ProcessGroup = None
    ) -> None:
        self.surgery, self.blocks, self.windows = surgery, surgery.blocks, windows
        self.device, self.group = device, group
        self.gone: set[int] = set()  # indices of blocks that pass on what they get
        self.evaluations = 0  # counts each run of a block on a window
        records = [record_inputs(surgery.model, ids) for ids in windows]
        self.calls = [[calls[b.index].to(device) for _, calls in records] for b in self.blocks]
        self.entering = [self._stored(first for first, _ in records)]  # hidden states entering blocks and head
        self._trial: tuple[int, list[HiddenStates]] = (-1, [])  # the best: its first block, the blocks' outputs
        start = time.monotonic()
        self._update(0)
        self._seconds = (time.monotonic() - start) / len(self.blocks)  # per block

    def drop(self, count: int, first: int = 0, spared: Collection[int] = ()) -> None:
        """Drops attentions, and logs the number of block evaluations.

        Args:
            count: The number of attentions to drop.
            first: Index of the first block that may lose its attention.
            spared: Indices of other blocks that may not.
        """

        def candidates() -> list[Block]:
            return [b for b in self.blocks[first:] if b.can_drop_attention and b.index not in spared]

        self._drop_parts(count, "attention", candidates, lambda block: block.groups()[0])

    def drop_ffns(self, count: int, spared: Collection[int] = ()) -> None:
        """Drops whole FFNs, like :meth:`drop`."""

        def candidates() -> list[Block]:
            return [block for block in self.blocks if block.whole_ffn and block.index not in spared]

        self._drop_parts(count, "FFN", candidates, lambda block: cast(UnitGroup, block.whole_ffn))

    def _drop_parts(
        self, count: int, unit: str, candidates: Callable[[], list[Block]], group: Callable[[Block], UnitGroup]
    ) -> None:
        self._log_duration(count, candidates())

        def drop(block: Block) -> None:
            self.surgery.keep(block, group(block), torch.zeros(0, dtype=torch.long))

        self._greedy(count, unit, candidates, lambda block: without(block, group(block).kind), drop)

    def blocks_to_drop(self, count: int, first: int = 0) -> list[int]:
        """Finds whole blocks to drop, and returns their indices, ascending; the model keeps them.

        Args:
            count: The number of blocks to drop.
            first: Index of the first block that may leave.
        """

        def candidates() -> list[Block]:
            return [block for block in may_leave(self.blocks, self.gone) if block.index >= first]

        self._greedy(count, "block", candidates, self._without_block, lambda block: self.gone.add(block.index))
        return sorted(self.gone)

    def _greedy(
        self,
        count: int,
        unit: str,
        candidates: Callable[[], list[Block]],
        without: Callable[[Block], contextlib.AbstractContextManager[None]],
        drop: Callable[[Block], None],
    ) -> None:
        plain = 0
        with Progress(count, "2SSP stage 2", unit, quiet=distributed.rank(self.group) > 0) as bar:
            for step in range(count):
                some = candidates()
                plain += len(some) * len(self.blocks) * len(self.windows)
                search = functools.partial(self._search, some, without)
                best = some[self.surgery.journal.once(f"{unit}-{step}", search)]
                drop(best)
                self._update(best.index)
                bar.update()
        evaluations = int(distributed.all_reduce_sum(torch.tensor(self.evaluations), self.group))
        log.info(
            "2SSP stage 2: %d block evaluations, %.0f%% of the plain loop's %d",
            *(evaluations, 100 * evaluations / plain, plain),
        )

    def _log_duration(self, count: int, candidates: list[Block]) -> None:
        """Logs an estimate of the duration if the blocks are on disk, as each trial loads them."""
        if self.blocks[0].home is None:
            return
        loads = count * sum(len(self.blocks) - b.index for b in candidates)
        start = time.monotonic()
        self._loss(self.entering[-1])
        seconds = loads * self._seconds + count * len(candidates) * (time.monotonic() - start)
        about = timedelta(seconds=round(seconds))
        log.info("2SSP stage 2 loads blocks up to %d times, %.2g s each: up to %s", loads, self._seconds, about)

    @contextlib.contextmanager
    def _without_block(self, block: Block) -> Iterator[None]:
        self.gone.add(block.index)
        try:
            yield
        finally:
            self.gone.remove(block.index)

    def _search(
        self, candidates: list[Block], without: Callable[[Block], contextlib.AbstractContextManager[None]]
    ) -> int:
        """The index of the candidate without which the loss is lowest; keeps the states of its trial."""
        losses, lowest = torch.zeros(len(candidates), dtype=torch.float64), math.inf
        for i in range(distributed.rank(self.group), len(candidates), distributed.size(self.group)):
            start = candidates[i].index
            with without(candidates[i]):
                states = self._run(start)
            losses[i] = loss = self._loss(states[-1])
            if loss < lowest:
                lowest, states, self._trial = loss, self._trial[1], (start, states)
            _discard(states)
        every = distributed.all_reduce_sum(losses, self.group).tolist()
        return every.index(min(every))

    def _update(self, start: int) -> None:
        """Replaces the outputs of the blocks from `start` on; takes those of the best trial if it began at `start`."""
        (index, states), self._trial = self._trial, (-1, [])
        if index != start:
            _discard(states)
            states = self._run(start)
        _discard(self.entering[start + 1 :])
        self.entering[start + 1 :] = states

    @torch.no_grad()
    def _run(self, start: int) -> list[HiddenStates]:
        """Runs the blocks from `start` on, and returns the outputs of each."""
        leaving, hidden = [], [x.to(self.device) for x in self.entering[start]]
        for block in self.blocks[start:]:
            if block.index not in self.gone:
                with block.present(self.device):
                    hidden = [run_block(block, x, c) for x, c in zip(hidden, self.calls[block.index], strict=True)]
                self.evaluations += len(hidden)
            leaving.append(self._stored(hidden))
        return leaving

    def _stored(self, hidden: Iterable[Tensor]) -> HiddenStates:
        states = self.surgery.journal.hidden_states(self.device)
        for x in hidden:
            states.append(x)
        return states

    def _loss(self, hidden: Iterable[Tensor]) -> float:
        """Mean loss per token over all windows; infinity in place of NaN."""
        model, total = self.surgery.model, torch.zeros((), dtype=torch.float64, device=self.surgery.model.device)
        for ids, x in zip(self.windows, hidden, strict=True):
            logits = logits_from(model, ids, x.to(model.device))
            total += next_token_loss(logits, ids, "sum").double()
        loss = float(total) / sum(ids[:, 1:].numel() for ids in self.windows)
        return loss if math.isfinite(loss) else math.inf


def _discard(collections: Iterable[HiddenStates]) -> None:
    for states in collections:
        states.discard()
