"""lm-eval's tasks on a model in memory, from local files if there are some, with standard errors and per example.

The tasks, their prompts and their metrics are lm-eval's own: a model scores here what `lm_eval --model hf` gives it
from its folder. Two models are compared example by example, as both see the same: the standard error of the mean of
the differences is much smaller than that of two accuracies.

A folder of task files holds data sets as ORG/NAME, each as `datasets` loads it, and tasks of one's own as YAML files.
Where a data set lacks a split that its task names but does not need, such as the one for examples in the prompt, the
task goes without.
"""

import contextlib
import difflib
import functools
import hashlib
import io
import logging
import math
import random
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.running import evaluating

log = logging.getLogger(__name__)
METRICS = ("acc", "exact_match")  # the first of them that a task has is its result; else its own first
AVERAGE = "average"
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class Figure(Protocol):
    """A number with its standard error."""

    @property
    def value(self) -> float: ...
    @property
    def stderr(self) -> float | None: ...


@dataclass(frozen=True)
class Difference:
    """A number made of others, with its standard error.

    Args:
        value: The number.
        stderr: Its standard error; None if it has none.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """What a model scored on one task.

    Args:
        metric: What was measured.
        value: The score.
        stderr: Its standard error, by lm-eval; None if it gives none.
        higher_is_better: Whether it is.
        scores: That of each example; empty if the metric is no mean over examples.
        examples: A hash of the examples and their order.
        others: The task's other metrics, and their standard errors.
    """

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    scores: list[float]
    examples: str
    others: dict[str, tuple[float, float | None]]


def check_tasks(names: Sequence[str], folder: str | None = None) -> None:
    """Makes sure, before a model is loaded, that tasks can be run: loads them and their data.

    Args:
        names: Of tasks, groups or tags, as lm-eval calls them.
        folder: The folder of task files; data sets come from the hub or its cache if not given.

    Raises:
        ValueError: lm-eval is not installed, a name is unknown, or data is missing.
    """
    _loaded(tuple(names), folder)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    limit: int | None = None,
    folder: str | None = None,
    batch_size: int = 8,
) -> dict[str, TaskResult]:
    """Runs tasks on a model where it is.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        names: Of tasks, groups or tags, as lm-eval calls them; a group is run as its tasks.
        limit: At most this many examples of each task; all if not given.
        folder: The folder of task files; data sets come from the hub or its cache if not given.
        batch_size: Requests that are run at once.

    Returns:
        The result of each task, by name.

    Raises:
        ValueError: As :func:`check_tasks`.
    """
    loaded = _loaded(tuple(names), folder)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    log.info("running %s%s", ", ".join(loaded["tasks"]), f", {limit} examples of each" if limit else "")
    with _undisturbed(), evaluating(model):
        wrap, run = cast(Any, HFLM), cast(Any, lm_eval.simple_evaluate)
        wrapped = wrap(model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        found = run(wrapped, tasks=list(loaded["tasks"].values()), limit=limit, task_manager=loaded["manager"])
    return {name: _result(name, found) for name in loaded["tasks"]}


def paired(dense: TaskResult, pruned: TaskResult) -> Difference | None:
    """How much higher the second scores, example by example; None if the metric is no mean over examples.

    Example:
        >>> scores = dict(metric="acc", value=0.0, stderr=None, higher_is_better=True, examples="", others={})
        >>> paired(TaskResult(scores=[1.0, 0.0], **scores), TaskResult(scores=[1.0, 1.0], **scores))
        Difference(value=0.5, stderr=0.5)

    Raises:
        ValueError: They were not measured alike.
    """
    if (dense.metric, dense.examples) != (pruned.metric, pruned.examples):
        raise ValueError("two results of other metrics or other examples cannot be paired: run both the same way")
    changes = [after - before for before, after in zip(dense.scores, pruned.scores, strict=True)]
    if not changes:
        return None
    error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
    return Difference(statistics.fmean(changes), error)


def average(figures: Iterable[Figure]) -> Difference | None:
    """The mean of several figures, whose errors are independent; None of none.

    Example:
        >>> average([Difference(0.5, 0.3), Difference(0.7, 0.4)])
        Difference(value=0.6, stderr=0.25)
    """
    figures = list(figures)
    if not figures:
        return None
    errors = [figure.stderr for figure in figures]
    known = [error for error in errors if error is not None]
    total = math.hypot(*known) / len(known) if len(known) == len(errors) else None
    return Difference(statistics.fmean(figure.value for figure in figures), total)


def columns(stages: dict[str, dict[str, TaskResult]]) -> dict[str, dict[str, Figure | None]]:
    """Results by model and task; with two models their differences, and with several tasks the averages.

    Tasks whose metric is no mean over examples have no part in the average.
    """
    found: dict[str, dict[str, Figure | None]] = {stage: dict(results) for stage, results in stages.items()}
    first, *others = stages.values()
    if len(others) == 1:
        found["difference"] = {name: paired(first[name], others[0][name]) for name in first}
    counted = [name for name, result in first.items() if result.scores]
    if len(counted) > 1:
        for column in found.values():
            column[AVERAGE] = average(cast(Figure, column[name]) for name in counted)
    return found


def table(stages: dict[str, dict[str, TaskResult]]) -> str:
    """Scores with their standard errors, a column for each model; of two, the difference too, example by example.

    Example:
        >>> result = TaskResult("acc", 0.5, 0.1, True, [], "", {})
        >>> print(table({"dense": {"piqa": result}, "pruned": {"piqa": result}}))
        task                metric        dense             pruned            difference
        piqa                acc           0.5000 ± 0.1000   0.5000 ± 0.1000   -
    """
    found, first = columns(stages), next(iter(stages.values()))
    lines = [_line("task", "metric", found)]
    for name in next(iter(found.values())):
        metric = first[name].metric if name in first else ""
        lines.append(_line(name, metric, [_cell(column[name]) for column in found.values()]))
    return "\n".join(lines)


def _line(name: str, metric: str, cells: Iterable[str]) -> str:
    return f"{name:<20}{metric:<14}{''.join(f'{cell:<18}' for cell in cells)}".rstrip()


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.value:.4f}" + ("" if figure.stderr is None else f" ± {figure.stderr:.4f}")


@functools.lru_cache(maxsize=16)  # for the check before a model is loaded, and for each model
def _loaded(names: tuple[str, ...], folder: str | None) -> dict[str, Any]:
    """The tasks, and the manager that knows them."""
    if find_spec("lm_eval") is None:
        raise ValueError("running tasks needs lm-eval: pip install 'plprune[eval]'")
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"no benchmark files: {folder} is not a folder; give one that holds data sets as ORG/NAME")
    with _undisturbed():
        manager = _manager(names, folder)
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, 3)
                meant = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
                raise ValueError(f"no task {name!r}; {meant}")
        with _data_from(folder) if folder else contextlib.nullcontext():
            try:
                tasks = manager.load(list(names))["tasks"]
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                raise ValueError(_missing(names, folder, error)) from error
    return {"manager": manager, "tasks": tasks}


def _missing(names: Sequence[str], folder: str | None, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if folder is not None and reason.startswith("no benchmark files"):
        return reason
    more = "" if folder else ", or have them in a folder as ORG/NAME and give that as task_data"
    return f"cannot load the tasks {', '.join(names)} ({reason}): check their data{more}"


def _manager(names: Sequence[str], folder: str | None) -> Any:
    """lm-eval's index of tasks; its own are read, which takes seconds, unless the folder has all that is asked for."""
    own = _index(folder, False) if folder else None
    return own if own is not None and set(names) <= set(own.all_tasks) else _index(folder, True)


@functools.cache
def _index(folder: str | None, with_own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=with_own)


@contextlib.contextmanager
def _data_from(folder: str) -> Iterator[None]:
    """Has tasks take their data sets from a folder, and go without the splits that are not there."""
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download

    def load(task: Any, dataset_kwargs: dict[str, Any] | None = None, **others: Any) -> None:
        place = Path(folder).absolute() / task.DATASET_PATH
        if place.is_dir():
            task.DATASET_PATH = str(place)
        elif "/" in task.DATASET_PATH and not callable(task.config.custom_dataset):
            raise ValueError(f"no benchmark files for {task.config.task}: {place} does not exist; put its data there")
        download(task, dataset_kwargs, **others)
        for split in SPLITS:
            if getattr(task.config, split, None) not in task.dataset:
                setattr(task.config, split, None)
        if task.fewshot_cfg.split not in task.dataset:
            task.fewshot_cfg.split = None

    with mock.patch.object(ConfigurableTask, "download", load):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves out lm-eval's lines, its look at git and at the machine, and its bars where there is no terminal.

    The random states, which it sets and uses, stay as they were.
    """
    logger, silent = logging.getLogger("lm_eval"), not sys.stderr.isatty()
    level, others, arrays = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    looks = {"get_git_commit_hash": mock.Mock(return_value=None), "add_env_info": mock.Mock()}
    try:
        with (
            torch.random.fork_rng(),
            contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext(),
            mock.patch.multiple("lm_eval.evaluator", create=True, **looks),
        ):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(others)
        np.random.set_state(arrays)


def _result(name: str, found: dict[str, Any]) -> TaskResult:
    """One task's part of what lm-eval returns: metrics are called `METRIC,FILTER` there."""
    figures = {
        key: (value, _number(found["results"][name].get(_stderr(key))))
        for key, value in found["results"][name].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    chosen = next((key for metric in METRICS for key in figures if key.startswith(f"{metric},")), next(iter(figures)))
    metric, _, way = chosen.partition(",")
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    samples = [sample for sample in samples if sample["filter"] == way]
    scores = [sample.get(metric) for sample in samples]
    mean = all(isinstance(score, int | float | np.number) for score in scores)
    return TaskResult(
        metric=metric,
        value=figures[chosen][0],
        stderr=figures[chosen][1],
        higher_is_better=found["higher_is_better"][name].get(metric) is not False,
        scores=[float(cast(Any, score)) for score in scores] if mean else [],
        examples=hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()[:16],
        others={key.removesuffix(",none"): figure for key, figure in figures.items() if key != chosen},
    )


def _stderr(key: str) -> str:
    metric, _, way = key.partition(",")
    return f"{metric}_stderr,{way}"


def _number(value: object) -> float | None:
    """lm-eval says "N/A" where it has no standard error."""
    return float(value) if isinstance(value, int | float) else None
