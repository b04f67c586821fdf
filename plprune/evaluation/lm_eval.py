"""Runs lm-eval tasks on a model in memory, with standard errors and scores of single examples.

Tasks, prompts and metrics are those of lm-eval: a model has the score that `lm_eval --model hf` gives to its folder.
Two models are compared example by example; the standard error of the mean difference is then much smaller than those of
the two scores.

A group with a score, such as mmlu, has a result in addition to those of its tasks, which name it as their group.
Averages are over the requested names only. A tag, or a group without a score, is replaced by its tasks.

A folder of task files holds data sets as ORG/NAME, in a form that `datasets` loads, and your own tasks as YAML files.
A task may name splits that its data set lacks, if it does not use them, such as the split for few-shot examples.
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
from typing import Any, NamedTuple, cast
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
METRICS = ("acc", "exact_match")  # the first that a task has is its result; otherwise the task's first metric
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def named(tasks: str | None) -> list[str]:
    """Names separated by commas.

    Example:
        >>> named("mmlu, piqa,")
        ['mmlu', 'piqa']
    """
    return [name.strip() for name in (tasks or "").split(",") if name.strip()]


def check_tasks(names: Sequence[str], folder: str | None = None) -> None:
    """Makes sure, before a model is loaded, that tasks can be run: loads them and their data.

    Args:
        names: lm-eval's names of tasks, groups or tags.
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
    """Runs tasks on a model on its device.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        names: lm-eval's names of tasks, groups or tags.
        limit: At most this many examples of each task; all if not given.
        folder: The folder of task files; data sets come from the hub or its cache if not given.
        batch_size: Requests that run at once.
        bos: Whether prompts begin with the BOS token; the tokenizer's default if not given.
        group: The processes that share the examples, unless a task has fewer examples than there are processes; each
            gets all results.

    Returns:
        The result of each task, and of each group with a score, by name; a group comes before its tasks.

    Raises:
        ValueError: As :func:`check_tasks`, or prompts have tokens that the model or the tokenizer lacks.
    """
    loaded = _loaded(tuple(names), folder)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    log.info("running %s%s", ", ".join(loaded.tasks), f", {limit} examples of each" if limit else "")
    with _isolated(), evaluating(model), checking_ids(model, tokenizer):
        sizes = [len(task.eval_docs) for task in loaded.tasks.values()] if group else []
        shared = group and min(limit or math.inf, *sizes) >= distributed.size(group)
        wrap, run = cast(Any, _sharing(HFLM, group) if shared else HFLM), cast(Any, lm_eval.simple_evaluate)
        own = _with_bos(tokenizer) if bos and bos_token(tokenizer) is None else tokenizer
        wrapped = wrap(model, tokenizer=own, backend="causal", batch_size=batch_size, add_bos_token=bos)
        output = run(wrapped, tasks=loaded.asked, limit=limit, task_manager=loaded.manager)
    return distributed.broadcast_object({} if distributed.rank(group) else _results(output, loaded), group)


def _sharing(wrapper: Any, group: distributed.ProcessGroup) -> type:
    """lm-eval's wrapper of a model, but sharing examples among a group instead of accelerate's processes."""

    class Sharing(wrapper):
        rank = property(lambda self: distributed.rank(group))
        world_size = property(lambda self: distributed.size(group))

        def all_gather(self, tensor: Tensor) -> Tensor | None:
            return distributed.gather_rows(tensor.reshape(1), group)

        def barrier(self) -> None:
            distributed.broadcast_object(None, group)

    return Sharing


class _Loaded(NamedTuple):
    """Tasks and groups by name, the group that each belongs to, those that were requested, and lm-eval's index."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    parents: dict[str, str]
    asked: list[Any]
    manager: Any


@functools.lru_cache(maxsize=16)  # for the check before a model is loaded, and for each model
def _loaded(names: tuple[str, ...], folder: str | None) -> _Loaded:
    if find_spec("lm_eval") is None:
        raise ValueError("running tasks needs lm-eval: pip install 'plprune[eval]'")
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"no benchmark files: {folder} is not a folder; give one that holds data sets as ORG/NAME")
    with _isolated():
        manager = _manager(names, folder)
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, 3)
                hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
                raise ValueError(f"no task {name!r}; {hint}")
        with _data_from(folder) if folder else contextlib.nullcontext():
            try:
                loaded = {name: manager.load(name) for name in names}
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                raise ValueError(_load_error(names, folder, error)) from error
    _check_disjoint(loaded)
    tasks, groups = ({k: v for each in loaded.values() for k, v in each[kind].items()} for kind in ("tasks", "groups"))
    parents = {child: name for name, group in groups.items() for child in group.child_names}
    asked = [each for name, each in (groups | tasks).items() if name not in parents]
    return _Loaded(tasks, groups, parents, asked, manager)


def _with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that puts the BOS token before texts.

    Raises:
        ValueError: There is no such token, or the tokenizer cannot be changed.
    """
    token = bos_token(tokenizer, True)
    if not tokenizer.is_fast:
        raise ValueError("bos does not reach tasks, as the tokenizer is not a fast one: leave out bos or tasks")
    changed: Any = copy.deepcopy(tokenizer)
    parts = {"single": f"{tokenizer.bos_token} $A", "pair": f"{tokenizer.bos_token} $A $B:1"}
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        **parts, special_tokens=[(tokenizer.bos_token, token)]
    )
    return changed


def _check_disjoint(loaded: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError if a group shares a task with another name, which lm-eval cannot run; tags may overlap."""
    for one, other in itertools.combinations(loaded, 2):
        a, b = (set(loaded[name]["tasks"]) for name in (one, other))
        if not a & b or not (loaded[one]["groups"] or loaded[other]["groups"]):
            continue
        if not (a <= b or b <= a):
            raise ValueError(f"{one} and {other} both contain {min(a & b)}: run them one after the other")
        inner, outer = sorted((one, other), key=lambda name: [len(loaded[name][kind]) for kind in ("tasks", "groups")])
        raise ValueError(f"{inner} is in {outer}: leave it out, as {outer} is shown with all that is in it")


def _load_error(names: Sequence[str], folder: str | None, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if folder is not None and reason.startswith("no benchmark files"):
        return reason
    more = "" if folder else ", or have them in a folder as ORG/NAME and give that as task_data"
    return f"cannot load the tasks {', '.join(names)} ({reason}): check their data{more}"


def _manager(names: Sequence[str], folder: str | None) -> Any:
    """lm-eval's index of tasks; its default tasks, which take seconds to read, only if the folder lacks a name."""
    own = _index(folder, False) if folder else None
    return own if own is not None and set(names) <= set(own.all_tasks) else _index(folder, True)


@functools.cache
def _index(folder: str | None, with_own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=with_own)


@contextlib.contextmanager
def _data_from(folder: str) -> Iterator[None]:
    """Makes tasks load their data sets from a folder, and go without missing splits."""
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
def _isolated() -> Iterator[None]:
    """Silences lm-eval, skips its queries of git and the machine, and restores the random states that it changes."""
    logger, silent = logging.getLogger("lm_eval"), not sys.stderr.isatty()
    level, others, arrays = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    queries = {"get_git_commit_hash": mock.Mock(return_value=None), "add_env_info": mock.Mock()}
    try:
        with (
            torch.random.fork_rng(),
            contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext(),
            mock.patch.multiple("lm_eval.evaluator", create=True, **queries),
        ):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(others)
        np.random.set_state(arrays)


def _results(output: dict[str, Any], loaded: _Loaded) -> dict[str, TaskResult]:
    """The results in lm-eval's output, groups before their tasks; groups without a score are left out."""
    results: dict[str, TaskResult] = {}
    for task in loaded.tasks:
        chain = [task]
        while chain[0] in loaded.parents:
            chain.insert(0, loaded.parents[chain[0]])
        parent = None
        for name in chain:
            group = loaded.groups.get(name)
            if group is None or _figures(name, output):
                if name not in results:
                    result = _of_task(name, output) if group is None else _of_group(group, output)
                    results[name] = replace(result, group=parent)
                parent = name
    return results


def _of_task(name: str, output: dict[str, Any]) -> TaskResult:
    chosen = _chosen(_figures(name, output))
    return _result(name, chosen, output, *_scores(name, chosen, output), [])


def _of_group(group: Any, output: dict[str, Any]) -> TaskResult:
    """The result of a group: a mean over its tasks, by size or not, as lm-eval computes it."""
    chosen = _chosen(_figures(group.name, output))
    by_size = next(each.weight_by_size for each in group.aggregate_metric_list if each.metric == chosen.split(",")[0])
    tasks = [each.task_name for each in group.get_all_tasks() if chosen in output["results"][each.task_name]]
    sizes = [output["results"][task]["sample_len"] for task in tasks]
    weights = [size / sum(sizes) if by_size else 1 / len(sizes) for size in sizes]
    scores, hashes = zip(*(_scores(task, chosen, output) for task in tasks), strict=True)
    known = all(len(each) == size for each, size in zip(scores, sizes, strict=True))
    joined = list(itertools.chain(*scores)) if known else []
    parts = list(zip(sizes, weights, strict=True)) if known else []
    return _result(group.name, chosen, output, joined, _hash("".join(hashes)), parts)


def _result(
    name: str, chosen: str, output: dict[str, Any], scores: list[float], examples: str, parts: list[tuple[int, float]]
) -> TaskResult:
    """A result by one of its metrics, with the other metrics."""
    figures, metric = _figures(name, output), chosen.partition(",")[0]
    return TaskResult(
        metric=metric,
        value=figures[chosen][0],
        stderr=figures[chosen][1],
        higher_is_better=output["higher_is_better"].get(name, {}).get(metric) is not False,
        scores=scores,
        examples=examples,
        others={key.removesuffix(",none"): figure for key, figure in figures.items() if key != chosen},
        parts=parts,
    )


def _figures(name: str, output: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The metrics of a task or group with their standard errors; lm-eval names them `METRIC,FILTER`."""
    values, figures = output["results"][name], {}
    for key, value in values.items():
        metric, _, way = key.partition(",")
        if way and not metric.endswith("_stderr") and isinstance(value, int | float):
            stderr = values.get(f"{metric}_stderr,{way}")  # "N/A" if there is none
            figures[key] = float(value), float(stderr) if isinstance(stderr, int | float) else None
    return figures


def _chosen(figures: dict[str, tuple[float, float | None]]) -> str:
    """The metric that is the result."""
    return next((key for metric in METRICS for key in figures if key.startswith(f"{metric},")), next(iter(figures)))


def _scores(name: str, chosen: str, output: dict[str, Any]) -> tuple[list[float], str]:
    """The scores of a task's examples, empty if the metric is not a mean over them, and a hash of the examples."""
    metric, _, way = chosen.partition(",")
    samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
    samples = [sample for sample in samples if sample["filter"] == way]
    scores = [sample.get(metric) for sample in samples]
    numeric = all(isinstance(score, int | float | np.number) for score in scores)
    examples = _hash("".join(sample["doc_hash"] for sample in samples))
    return [float(cast(Any, score)) for score in scores] if numeric else [], examples


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
