"""The descent that trains gates, gains and blocks: Adam, with a short warm-up and a decay."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from plprune.io import distributed
from plprune.io.progress import Progress

T = TypeVar("T")


def steps(
    parameters: list[dict[str, Any]], batches: Sequence[T], title: str = "", group: distributed.ProcessGroup = None
) -> Iterator[tuple[float, T]]:
    """Yields each batch with the fraction of steps done; then takes a step of Adam by the `grad` that the caller set.

    The learning rates warm up over the first sixteenth of the steps, and decay to a tenth over all steps.

    Args:
        parameters: Tensors (`params`) with their highest learning rate (`lr`).
        batches: One per step.
        title: Title of the progress bar; without one there is none.
        group: The processes; the first one shows the bar.
    """
    optimizer, count = torch.optim.Adam(parameters, betas=(0.9, 0.95)), len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 16 * (step + 1) / count) * (1 - 0.9 * step / count)
    )
    with Progress(count, title, "step", quiet=not title or distributed.rank(group) > 0) as bar:
        for step, batch in enumerate(batches):
            yield step / count, batch
            optimizer.step()
            schedule.step()
            bar.update()
