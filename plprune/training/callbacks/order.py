"""In which order callbacks must be listed, so that each sees what it is to see."""

from typing import Any, cast

import lightning.pytorch as pl

ORDER: tuple[tuple[str, str, str], ...] = (  # what is lost if the first comes second
    ("Watch", "Evaluate", "would not notice a process that is gone before"),
    ("Watch", "Report", "would not notice a process that is gone before"),
    ("Watch", "Prune", "would not notice a process that is gone before"),
    ("BarsFirst", "Evaluate", "would end the bar below the table"),
    ("Evaluate", "Prune", "would not see the dense model"),
    ("Evaluate", "Report", "would measure what the report then lacks"),
    ("Evaluate", "Export", "would measure what the model card then lacks"),
    ("Report", "Prune", "would not see the dense model"),
)


def check_order(trainer: pl.Trainer) -> None:
    """Makes sure that no callback comes too late for what it is to see, or to be seen by.

    Raises:
        ValueError: One does.
    """
    listed: list[pl.Callback] = cast(Any, trainer).callbacks
    for one, other, lost in ORDER:
        places = [
            [i for i, each in enumerate(listed) if kind in [c.__name__ for c in type(each).__mro__]]
            for kind in (one, other)
        ]
        if all(places) and max(places[0]) > min(places[1]):
            raise ValueError(f"{one} is listed after {other}, and {lost}: list {one} before {other}")
