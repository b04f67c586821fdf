"""Results of lm-eval tasks: scores with standard errors, averages, paired differences, and their table."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from plprune.io.tables import text_table

AVERAGE = "average"


class Figure(Protocol):
    """A number with its standard error."""

    @property
    def value(self) -> float: ...
    @property
    def stderr(self) -> float | None: ...


@dataclass(frozen=True)
class Difference:
    """A number computed from others, with its standard error if that is known."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """The score of a model on one task, or on a group of tasks.

    Args:
        metric: Name of the metric.
        value: The score.
        stderr: Its standard error, by lm-eval; None if it gives none.
        higher_is_better: Whether higher scores are better.
        scores: The score of each example; empty if the metric is not a mean over examples.
        examples: A hash of the examples and their order.
        others: The task's other metrics, with their standard errors.
        group: The group that the task is a part of; None if the task was asked for by itself.
        parts: For a group, the number of examples of each task, and the weight of the task's mean in the score.
    """

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    scores: list[float]
    examples: str
    others: dict[str, tuple[float, float | None]]
    group: str | None = None
    parts: list[tuple[int, float]] = field(default_factory=list)


def paired(dense: TaskResult, pruned: TaskResult) -> Difference | None:
    """The mean difference of the second score over examples; None if the metric is not a mean over examples.

    Example:
        >>> scores = dict(metric="acc", value=0.0, stderr=None, higher_is_better=True, examples="", others={})
        >>> paired(TaskResult(scores=[1.0, 0.0], **scores), TaskResult(scores=[1.0, 1.0], **scores))
        Difference(value=0.5, stderr=0.5)

    Raises:
        ValueError: The metrics or the examples differ.
    """
    if (dense.metric, dense.examples) != (pruned.metric, pruned.examples):
        raise ValueError("results with different metrics or examples cannot be paired: run both with the same settings")
    changes = iter([after - before for before, after in zip(dense.scores, pruned.scores, strict=True)])
    parts = pruned.parts or [(len(pruned.scores), 1.0)]
    means = [_mean(list(itertools.islice(changes, count))) for count, _ in parts] if pruned.scores else []
    return _weighted(means, [weight for _, weight in parts]) if means else None


def average(figures: Iterable[Figure]) -> Difference | None:
    """The mean of figures with independent errors; None if there are no figures.

    Example:
        >>> average([Difference(0.5, 0.3), Difference(0.7, 0.4)])
        Difference(value=0.6, stderr=0.25)
    """
    figures = list(figures)
    return _weighted(figures, [1 / len(figures)] * len(figures)) if figures else None


def counted(results: dict[str, TaskResult]) -> list[str]:
    """The names that the average is over: those asked for by themselves whose metric is a mean over examples."""
    return [name for name, result in results.items() if result.scores and result.group is None]


def _mean(values: Sequence[float]) -> Difference:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Difference(statistics.fmean(values), error)


def _weighted(figures: Sequence[Figure], weights: Sequence[float]) -> Difference:
    """The weighted sum of figures with independent errors."""
    pairs = list(zip(figures, weights, strict=True))
    errors = [figure.stderr * weight for figure, weight in pairs if figure.stderr is not None]
    error = math.hypot(*errors) if len(errors) == len(pairs) else None
    return Difference(math.fsum(figure.value * weight for figure, weight in pairs), error)


def columns(stages: dict[str, dict[str, TaskResult]]) -> dict[str, dict[str, Figure | None]]:
    """Scores by model and task; for two models their differences too, and for several tasks that count the averages."""
    table: dict[str, dict[str, Figure | None]] = {stage: dict(results) for stage, results in stages.items()}
    first, *others = stages.values()
    if len(others) == 1:
        table["difference"] = {name: paired(first[name], others[0][name]) for name in first}
    names = counted(first)
    if len(names) > 1:
        for column in table.values():
            column[AVERAGE] = average(cast(Figure, column[name]) for name in names)
    return table


def score_table(stages: dict[str, dict[str, TaskResult]]) -> str:
    """A table of scores with standard errors, a column for each model; the tasks of a group are indented below it.

    Example:
        >>> result = TaskResult("acc", 0.5, 0.1, True, [], "", {})
        >>> print(score_table({"dense": {"piqa": result}, "pruned": {"piqa": result}}))
        task                metric        dense             pruned            difference
        piqa                acc           0.5000 ± 0.1000   0.5000 ± 0.1000   -
    """
    table, first = columns(stages), next(iter(stages.values()))
    rows = [["task", "metric", *table]]
    for name in next(iter(table.values())):
        metric = first[name].metric if name in first else ""
        rows.append(["  " * _depth(name, first) + name, metric, *(_cell(column[name]) for column in table.values())])
    return text_table(rows, [20, 14, *[18] * len(table)], "<" * len(rows[0]))


def _depth(name: str, results: dict[str, TaskResult]) -> int:
    """The number of groups that a task is nested in."""
    group = results[name].group if name in results else None
    return 0 if group is None else 1 + _depth(group, results)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:.4f}" + ("" if figure.stderr is None else f" ± {figure.stderr:.4f}")
