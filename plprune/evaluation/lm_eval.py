"""lm-eval's tasks on a model in memory, from local files if there are some, with standard errors and per example.

The tasks, their prompts and their metrics are lm-eval's own: a model scores here what `lm_eval --model hf` gives it
from its folder. Two models are compared example by example, as both see the same: the standard error of the mean of
the differences is much smaller than that of two accuracies.

A group, such as mmlu, that lm-eval gives a score of its own has a result beside those of its tasks, which are marked as
parts of it: averages are over what was asked for. A tag, or a group without a score, only stands for what is in it.

A folder of task files holds data sets as ORG/NAME, each as `datasets` loads it, and tasks of one's own as YAML files.
Where a data set lacks a split that its task names but does not need, such as the one for examples in the prompt, the
task goes without.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import io
import itertools
import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.evaluation.task_results import TaskResult
from plprune.io import distributed
from plprune.io.text import bos_token
from plprune.pruning.forward import checking_ids, evaluating

log = logging.getLogger(__name__)
METRICS = ("acc", "exact_match")  # the first of them that a task has is its result; else its own first
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def named(tasks: str | None) -> list[str]:
    """Names that are separated by commas.

    Example:
        >>> named("mmlu, piqa,")
        ['mmlu', 'piqa']
    """
    return [name.strip() for name in (tasks or "").split(",") if name.strip()]


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
    bos: bool | None = None,
    group: distributed.ProcessGroup = None,
) -> dict[str, TaskResult]:
    """Runs tasks on a model where it is.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        names: Of tasks, groups or tags, as lm-eval calls them.
        limit: At most this many examples of each task; all if not given.
        folder: The folder of task files; data sets come from the hub or its cache if not given.
        batch_size: Requests that are run at once.
        bos: Whether prompts begin with the BOS token; as the tokenizer itself does if not given.
        group: The processes among which the examples are shared, unless a task has fewer examples than there are
            processes; each gets all results.

    Returns:
        The result of each task and of each group that has one, by name; a group comes before what is in it.

    Raises:
        ValueError: As :func:`check_tasks`, or prompts have tokens that the model or the tokenizer has not.
    """
    loaded = _loaded(tuple(names), folder)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    log.info("running %s%s", ", ".join(loaded["tasks"]), f", {limit} examples of each" if limit else "")
    with _undisturbed(), evaluating(model), checking_ids(model, tokenizer):
        sizes = [len(task.eval_docs) for task in loaded["tasks"].values()] if group else []
        shared = group and min(limit or math.inf, *sizes) >= distributed.size(group)
        wrap, run = cast(Any, _sharing(HFLM, group) if shared else HFLM), cast(Any, lm_eval.simple_evaluate)
        own = _beginning(tokenizer) if bos and bos_token(tokenizer) is None else tokenizer
        wrapped = wrap(model, tokenizer=own, backend="causal", batch_size=batch_size, add_bos_token=bos)
        found = run(wrapped, tasks=loaded["asked"], limit=limit, task_manager=loaded["manager"])
    return distributed.broadcast_object(_results(found, loaded) if not distributed.rank(group) else {}, group)


def _sharing(wrapper: Any, group: distributed.ProcessGroup) -> type:
    """A model of lm-eval that shares examples among processes, as one does among those that accelerate has started."""

    class Sharing(wrapper):
        rank = property(lambda self: distributed.rank(group))
        world_size = property(lambda self: distributed.size(group))

        def all_gather(self, tensor: Tensor) -> Tensor | None:
            return distributed.gather_rows(tensor.reshape(1), group)

        def barrier(self) -> None:
            distributed.broadcast_object(None, group)

    return Sharing


@functools.lru_cache(maxsize=16)  # for the check before a model is loaded, and for each model
def _loaded(names: tuple[str, ...], folder: str | None) -> dict[str, Any]:
    """What is asked for, the tasks and the groups in it, which group holds which, and the manager that knows them."""
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
                found = {name: manager.load(name) for name in names}
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                raise ValueError(_missing(names, folder, error)) from error
    _check_apart(found)
    tasks, groups = ({k: v for each in found.values() for k, v in each[kind].items()} for kind in ("tasks", "groups"))
    within = {child: name for name, group in groups.items() for child in group.child_names}
    asked = [each for name, each in (groups | tasks).items() if name not in within]
    return {"manager": manager, "tasks": tasks, "groups": groups, "within": within, "asked": asked}


def _beginning(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer like another, but that texts begin with the BOS token.

    Raises:
        ValueError: There is no such token, or the tokenizer cannot be made to.
    """
    token = bos_token(tokenizer, True)
    if not tokenizer.is_fast:
        raise ValueError("bos does not reach tasks, as the tokenizer is not a fast one: leave out bos or tasks")
    made: Any = copy.deepcopy(tokenizer)
    parts = {"single": f"{tokenizer.bos_token} $A", "pair": f"{tokenizer.bos_token} $A $B:1"}
    made.backend_tokenizer.post_processor = TemplateProcessing(**parts, special_tokens=[(tokenizer.bos_token, token)])
    return made


def _check_apart(loaded: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError if a task is in two of what is asked for, which lm-eval does not run; tags are no matter."""
    for one, other in itertools.combinations(loaded, 2):
        a, b = (set(loaded[name]["tasks"]) for name in (one, other))
        if not a & b or not (loaded[one]["groups"] or loaded[other]["groups"]):
            continue
        if not (a <= b or b <= a):
            raise ValueError(f"{one} and {other} both contain {min(a & b)}: run them one after the other")
        within, whole = sorted((one, other), key=lambda name: [len(loaded[name][kind]) for kind in ("tasks", "groups")])
        raise ValueError(f"{within} is in {whole}: leave it out, as {whole} is shown with all that is in it")


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


def _results(found: dict[str, Any], loaded: dict[str, Any]) -> dict[str, TaskResult]:
    """What lm-eval returns, groups before what is in them; a group without a score is left out."""
    results: dict[str, TaskResult] = {}
    for task in loaded["tasks"]:
        chain = [task]
        while chain[0] in loaded["within"]:
            chain.insert(0, loaded["within"][chain[0]])
        above = None
        for name in chain:
            group = loaded["groups"].get(name)
            if group is None or _figures(name, found):
                if name not in results:
                    own = _result(name, found) if group is None else _group(group, found)
                    results[name] = replace(own, group=above)
                above = name
    return results


def _result(name: str, found: dict[str, Any]) -> TaskResult:
    """One task's part of what lm-eval returns."""
    figures = _figures(name, found)
    chosen = _chosen(figures)
    scores, examples = _scores(name, chosen, found)
    return _scored(name, chosen, found, scores, examples, [])


def _group(group: Any, found: dict[str, Any]) -> TaskResult:
    """One group's part: a mean over its tasks, by their sizes or not, as lm-eval takes it."""
    chosen = _chosen(_figures(group.name, found))
    by_size = next(each.weight_by_size for each in group.aggregate_metric_list if each.metric == chosen.split(",")[0])
    tasks = [each.task_name for each in group.get_all_tasks() if chosen in found["results"][each.task_name]]
    sizes = [found["results"][task]["sample_len"] for task in tasks]
    weights = [size / sum(sizes) if by_size else 1 / len(sizes) for size in sizes]
    each = [_scores(task, chosen, found) for task in tasks]
    known = all(len(scores) == size for (scores, _), size in zip(each, sizes, strict=True))
    scores = [score for own, _ in each for score in own] if known else []
    parts = list(zip(sizes, weights, strict=True)) if known else []
    return _scored(group.name, chosen, found, scores, _hash("".join(examples for _, examples in each)), parts)


def _scored(
    name: str,
    chosen: str,
    found: dict[str, Any],
    scores: list[float],
    examples: str,
    parts: list[tuple[int, float]],
) -> TaskResult:
    """A result by one of its metrics, the others beside it."""
    figures, metric = _figures(name, found), chosen.partition(",")[0]
    return TaskResult(
        metric=metric,
        value=figures[chosen][0],
        stderr=figures[chosen][1],
        higher_is_better=found["higher_is_better"].get(name, {}).get(metric) is not False,
        scores=scores,
        examples=examples,
        others={key.removesuffix(",none"): figure for key, figure in figures.items() if key != chosen},
        parts=parts,
    )


def _figures(name: str, found: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The metrics of a task or group with their standard errors: they are called `METRIC,FILTER`."""
    return {
        key: (float(value), _number(found["results"][name].get(_stderr(key))))
        for key, value in found["results"][name].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


def _chosen(figures: dict[str, tuple[float, float | None]]) -> str:
    """The metric that is the result."""
    return next((key for metric in METRICS for key in figures if key.startswith(f"{metric},")), next(iter(figures)))


def _scores(name: str, chosen: str, found: dict[str, Any]) -> tuple[list[float], str]:
    """A metric of each of a task's examples, if it is a mean over them, and a hash of the examples."""
    metric, _, way = chosen.partition(",")
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    samples = [sample for sample in samples if sample["filter"] == way]
    scores = [sample.get(metric) for sample in samples]
    mean = all(isinstance(score, int | float | np.number) for score in scores)
    examples = _hash("".join(sample["doc_hash"] for sample in samples))
    return [float(cast(Any, score)) for score in scores] if mean else [], examples


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stderr(key: str) -> str:
    metric, _, way = key.partition(",")
    return f"{metric}_stderr,{way}"


def _number(value: object) -> float | None:
    """lm-eval says "N/A" where it has no standard error."""
    return float(value) if isinstance(value, int | float) else None
