"""`plprune evaluate`: quality, size and speed of a model, beside the model that it was pruned from."""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from plprune.checkpoint.locate import locate
from plprune.checkpoint.stored import Dtype
from plprune.commands.options import shared_help
from plprune.evaluation import lm_eval, measurement, task_results
from plprune.evaluation import speed as speeds
from plprune.evaluation.measurement import Measurement, measure
from plprune.evaluation.perplexity import Passage, Protocol, passage
from plprune.evaluation.speed import Speed
from plprune.evaluation.task_results import Figure, TaskResult
from plprune.io import distributed
from plprune.io.atomic import check_output_file, staged
from plprune.io.checks import check_max_dropped, check_sizes
from plprune.io.distributed import resolve_device
from plprune.io.readers import PYDOC, check_text
from plprune.io.text import MAX_DROPPED
from plprune.pruning.forward import check_ids
from plprune.pruning.plan import FILE, PruningPlan
from plprune.pruning.plan_summary import plan_summary

AUTO, NONE = "auto", "none"


@shared_help
def evaluate(
    model: str,
    text: str = PYDOC,
    join: str | None = None,
    seq_len: int = 512,
    stride: int | None = None,
    bos: bool | None = None,
    max_windows: int | None = None,
    max_dropped: float = MAX_DROPPED,
    dense: str = AUTO,
    tasks: str | None = None,
    task_data: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    speed: bool = False,
    dtype: Dtype | None = None,
    device: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Compares a model with its dense original: perplexity, size, speed, tasks.

    Processes of torchrun share the windows of the text and, as in lm-eval, the examples of tasks; few-shot examples
    that lm-eval draws at random may then differ. Only the first process measures speed.

    Args:
        seq_len: Tokens per window, a BOS token included.
        stride: Tokens between the starts of two windows. Each token is counted once, in the first window that holds it.
            If not given, windows do not overlap.
        bos: Whether a BOS token precedes each window and each prompt of a task, true or false. If not given, as the
            tokenizer does.
        max_windows: Number of windows, from the start of the text; all if not given.
        dense: Model to compare with, under the same protocol. `auto` is the model that was pruned, if this machine has
            it; `none` is no model.
        tasks: Names of lm-eval tasks, groups and tags, separated by commas. The average is over the names given here; a
            group's row is followed by the rows of its tasks.
        batch_size: Requests of tasks per forward pass.
        speed: Measure speed and memory of generation, for one sequence and for batches.
        output: JSON file to write the same numbers to.
    """
    check_sizes(limit=limit, batch_size=batch_size)
    protocol, where = Protocol(seq_len, stride, bos, max_windows), resolve_device(device)
    check_text(text)
    check_max_dropped(max_dropped)
    if output is not None:
        check_output_file(output, overwrite)
    names = lm_eval.named(tasks)
    found = _models(model, dense)
    for stage, name in found.models.items():
        found.passages[stage] = passage(text, load_tokenizer(name), protocol, join, max_dropped)
    if names:
        lm_eval.check_tasks(names, task_data)
    with distributed.process_group(torch.device("cpu")) as group:  # NCCL's timeout is shorter than a speed measurement
        settings = {"limit": limit, "folder": task_data, "batch_size": batch_size, "bos": bos, "group": group}
        for stage, name in found.models.items():
            network, tokenizer = _load(name, dtype, where, found.passages[stage])
            found.measured[stage] = measure(network, found.passages[stage], group)
            found.tasks[stage] = lm_eval.run_tasks(network, tokenizer, names, **settings) if names else {}
            if speed:
                found.speeds[stage] = _speed(network, group)
            del network
            gc.collect()  # modules refer to each other; the next model's peak of memory must not include this one
    if distributed.launched_rank():
        return
    print("\n\n".join(_report(found, limit)))
    if output:
        with staged(output, overwrite) as temporary:
            temporary.write_text(json.dumps(_record(found), indent=1) + "\n")


@dataclass
class _Evaluation:
    """Measurements by stage: of the dense model and the pruned one, or of one model."""

    models: dict[str, str]  # the name of each stage's model
    plan: PruningPlan | None
    passages: dict[str, Passage] = field(default_factory=dict)
    measured: dict[str, Measurement] = field(default_factory=dict)
    tasks: dict[str, dict[str, TaskResult]] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)

    @property
    def not_faster(self) -> Sequence[str]:
        """Why the pruned model is not faster, if it is not."""
        return speeds.why_not_faster(*self.speeds.values()) if len(self.speeds) == 2 else []


def _load(name: str, dtype: Dtype | None, where: torch.device, read: Passage) -> tuple[Any, PreTrainedTokenizerBase]:
    network, tokenizer = load_model(name, dtype), load_tokenizer(name)
    check_ids(network, read.windows, tokenizer)
    distributed.log_device(where, network.dtype)
    return network.to(where), tokenizer  # type: ignore[arg-type]


def _speed(network: PreTrainedModel, group: distributed.ProcessGroup) -> Speed:
    """The speed as measured by the first process; the others wait for it."""
    measured = None if distributed.rank(group) else speeds.measure_speed(network)
    return cast(Speed, distributed.broadcast_object(measured, group))


def _models(model: str, dense: str) -> _Evaluation:
    """The models to evaluate, and the plan of a pruned one; nothing is measured yet."""
    folder = Path(locate(model))
    plan = PruningPlan.load(folder) if (folder / FILE).is_file() else None
    if dense == AUTO:
        dense = _origin(plan) if plan else NONE
    models = {"pruned" if plan else "model": model}
    return _Evaluation(models if dense == NONE else {"dense": dense} | models, plan)


def _origin(plan: PruningPlan) -> str:
    """The name of the model that was pruned, if it is on this machine and has the same size; `none` otherwise."""
    first = plan.chain()[0]
    name = first.origin.get("model") or ""
    try:
        here = bool(name) and Path(locate(name)).exists()
        _, size = measurement.parameters(load_skeleton(name)) if here else (0, 0)
    except ValueError:
        return NONE
    return name if size == sum(first.before) + first.rest else NONE


def _report(found: _Evaluation, limit: int | None) -> list[str]:
    """The paragraphs to print."""
    parts = [plan_summary(found.plan)] if found.plan else []
    parts.append(f"{measurement.measurement_table(found.measured)}\n{_protocols(found.passages)}")
    if "dense" in found.models:
        parts[-1] += f"\ndense: {found.models['dense']}"
    if any(found.tasks.values()):
        some = f"the first {limit} examples of each task; " if limit else ""
        foot = f"{some}± is the standard error; for differences, that of the paired examples"
        parts.append(f"{task_results.score_table(found.tasks)}\n{foot}")
    if found.speeds:
        parts.append(speeds.speed_table(found.speeds))
    return parts + ["\n".join(found.not_faster)] * bool(found.not_faster)


def _protocols(passages: dict[str, Passage]) -> str:
    """What was read: one line if all models read the same tokens."""
    first, *others = passages.values()
    if all(_same(first, other) for other in others):
        return str(first)
    each = [f"{stage} read {read}" for stage, read in passages.items()]
    return "\n".join([*each, "the tokenizers differ: compare the bits per byte, not the perplexities"])


def _same(a: Passage, b: Passage) -> bool:
    return a.counts == b.counts and all(torch.equal(x, y) for x, y in zip(a.windows, b.windows, strict=True))


def _record(found: _Evaluation) -> dict[str, Any]:
    """All numbers, in JSON's types."""
    record: dict[str, Any] = {"version": 1, "kind": "run", "status": "finished"}
    record |= {"title": f"evaluation of {[*found.models.values()][-1]}", "models": found.models}
    record["protocol"] = {stage: read.as_dict() for stage, read in found.passages.items()}
    record["stages"] = measurement.as_dict(found.measured)
    if plan := found.plan:
        record["asked"] = {"method": plan.method, "settings": plan.settings, "sparsity": plan.sparsity}
        record["reached"] = {
            "sparsity": plan.reached,
            "sparsity_of_model": plan.reached_of_model,
            "parameters": sum(plan.after) + plan.rest,
            "block_parameters": sum(plan.after),
        }
    if any(found.tasks.values()):
        columns = task_results.columns(found.tasks)
        record["tasks"] = {
            stage: {name: asdict(each) for name, each in results.items()} for stage, results in found.tasks.items()
        }
        record["averages"] = {head: _figure(column.get(task_results.AVERAGE)) for head, column in columns.items()}
        record["differences"] = {name: _figure(each) for name, each in columns.get("difference", {}).items()}
    if found.speeds:
        record["speed"] = {stage: asdict(each) for stage, each in found.speeds.items()}
        record["not_faster"] = found.not_faster
    return record


def _figure(figure: Figure | None) -> dict[str, float | None] | None:
    return None if figure is None else {"value": figure.value, "stderr": figure.stderr}
