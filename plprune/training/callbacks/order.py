"""The order in which callbacks must be listed."""

from typing import Any, cast

import lightning.pytorch as pl

ORDER: tuple[tuple[str, str, str], ...] = (  # the first must be listed before the second; why
    ("Watch", "Evaluate", "would not notice a process that dies before"),
    ("Watch", "Report", "would not notice a process that dies before"),
    ("Watch", "Prune", "would not notice a process that dies before"),
    ("CloseBar", "Evaluate", "would end the bar below the table"),
    ("Evaluate", "Prune", "would not see the dense model"),
    ("Evaluate", "Report", "would measure too late for the report"),
    ("Evaluate", "Export", "would measure too late for the model card"),
    ("Report", "Prune", "would not see the dense model"),
)


def check_order(trainer: pl.Trainer) -> None:
    """Refuses a list of callbacks in which one comes too late.

    Raises:
        ValueError: One does.
    """
    listed: list[pl.Callback] = cast(Any, trainer).callbacks
    for first, second, reason in ORDER:
        positions = [
            [i for i, each in enumerate(listed) if kind in [c.__name__ for c in type(each).__mro__]]
            for kind in (first, second)
        ]
        if all(positions) and max(positions[0]) > min(positions[1]):
            raise ValueError(f"{first} is listed after {second}, and {reason}: list {first} before {second}")
