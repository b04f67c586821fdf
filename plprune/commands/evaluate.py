"""`plprune evaluate`: what a model is worth, beside the one that it was pruned from."""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from plprune.checkpoint.locate import locate
from plprune.checkpoint.stored import Dtype
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
from plprune.training.callbacks.record import summary

OWN, NONE = "auto", "none"


def evaluate(
    model: str,
    text: str = PYDOC,
    join: str | None = None,
    seq_len: int = 512,
    stride: int | None = None,
    bos: bool | None = None,
    max_windows: int | None = None,
    max_dropped: float = MAX_DROPPED,
    dense: str = OWN,
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
    """Judges a model beside the one that it was pruned from: quality, size, speed, tasks.

    Under torchrun the processes share the windows of the text and, as lm-eval does, the examples of tasks; those that
    it draws for a prompt may then be others. The first measures speed, and the others wait.

    Args:
        model: A folder, a name on the hub, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.
        text: What to read: a `.txt`, `.jsonl`, `.json` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, or
            `pydoc_data.topics`.
        join: Put between the rows of the text, which are then one document: "\\n\\n" is usual for WikiText.
        seq_len: Tokens that the model sees at once, a BOS token included.
        stride: Tokens from the start of one window to that of the next; each token is counted once, given those before
            it in the first window that holds it. Windows do not overlap if not given.
        bos: Whether the BOS token is put before each window and each prompt of a task: true or false; as the tokenizer
            itself does if not given.
        max_windows: At most this many windows from the start of the text; all if not given.
        max_dropped: The share of a text's rows that may be dropped, as they cannot be used: in [0, 1].
        dense: The model to judge beside it by the same protocol; `auto` for the one that it was pruned from, where
            that is on this machine, `none` for none.
        tasks: Names of lm-eval tasks, groups and tags, separated by commas. A group has a score of its own, and those
            of its tasks below it; the average is over what is named here.
        task_data: Folder with the data of tasks as ORG/NAME, and with tasks of your own as YAML files, for machines
            without a hub.
        limit: At most this many examples of each task; all if not given.
        batch_size: Requests of tasks that are run at once.
        speed: Whether to measure how fast the model writes, alone and in batches, and how much memory that takes.
        dtype: Of the weights; as each model is stored if not given, and float32 for a `.gguf` file.
        device: Where to compute: cpu, cuda, cuda:1; under torchrun, `cuda` is each process's own. A GPU if not given
            and there is one, and the CPU otherwise.
        output: JSON file to write, with the same numbers.
        overwrite: Whether to replace it.
    """
    check_sizes(limit=limit, batch_size=batch_size)
    protocol, place = Protocol(seq_len, stride, bos, max_windows), resolve_device(device)
    check_text(text)
    check_max_dropped(max_dropped)
    if output is not None:
        check_output_file(output, overwrite)
    names = lm_eval.named(tasks)
    stages, plan = _stages(model, dense)
    passages = {
        stage: passage(text, load_tokenizer(name), protocol, join, max_dropped) for stage, name in stages.items()
    }
    if names:
        lm_eval.check_tasks(names, task_data)
    judged = {}
    with distributed.process_group(torch.device("cpu")) as group:  # NCCL would not wait for as long as a speed may take
        asked = {"limit": limit, "folder": task_data, "batch_size": batch_size, "bos": bos, "group": group}
        for stage, name in stages.items():
            network, tokenizer = _loaded(name, dtype, place, passages[stage])
            measured = measure(network, passages[stage], group)
            results = lm_eval.run_tasks(network, tokenizer, names, **asked) if names else {}
            judged[stage] = _Judged(passages[stage], measured, results, _speed(network, group) if speed else None)
            del network
            gc.collect()  # modules hold each other, and the next one's peak of memory is not to count this one
    if distributed.launched_rank():
        return
    print("\n\n".join(_printed(judged, stages, plan, limit)))
    if output:
        with staged(output, overwrite) as temporary:
            temporary.write_text(json.dumps(_record(judged, stages, plan), indent=1) + "\n")


@dataclass
class _Judged:
    """What was found of one model."""

    passage: Passage
    measured: Measurement
    tasks: dict[str, TaskResult]
    speed: Speed | None


def _loaded(name: str, dtype: Dtype | None, place: torch.device, read: Passage) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model where it is judged, and its tokenizer."""
    network, tokenizer = load_model(name, dtype), load_tokenizer(name)
    check_ids(network, read.windows, tokenizer)
    distributed.log_device(place, network.dtype)
    return network.to(place), tokenizer  # type: ignore[arg-type]


def _speed(network: PreTrainedModel, group: distributed.ProcessGroup) -> Speed:
    """Measured by the first process, while the others wait."""
    return cast(
        Speed, distributed.broadcast_object(None if distributed.rank(group) else speeds.measure_speed(network), group)
    )


def _stages(model: str, dense: str) -> tuple[dict[str, str], PruningPlan | None]:
    """The models to judge, by what they are, and the plan of the last."""
    folder = Path(locate(model))
    plan = PruningPlan.load(folder) if (folder / FILE).is_file() else None
    if dense == OWN:
        dense = _origin(plan) if plan else NONE
    if dense == NONE:
        return {"pruned" if plan else "model": model}, plan
    return {"dense": dense, "pruned" if plan else "model": model}, plan


def _origin(plan: PruningPlan) -> str:
    """Where the model is that was pruned, if it is on this machine and of the same size."""
    first = plan.chain()[0]
    name = first.origin.get("model") or ""
    try:
        here = bool(name) and Path(locate(name)).exists()
        _, size = measurement.parameters(load_skeleton(name)) if here else (0, 0)
    except ValueError:
        return NONE
    return name if size == sum(first.before) + first.rest else NONE


def _printed(
    judged: dict[str, _Judged], stages: dict[str, str], plan: PruningPlan | None, limit: int | None
) -> list[str]:
    rows = {stage: found.measured for stage, found in judged.items()}
    parts = [
        *([summary(plan)] if plan else []),
        f"{measurement.measurement_table(rows)}\n{_protocols(judged)}",
    ]
    if "dense" in stages:
        parts[-1] += f"\ndense: {stages['dense']}"
    results = {stage: found.tasks for stage, found in judged.items()}
    if any(results.values()):
        some = f"the first {limit} examples of each task; " if limit else ""
        foot = f"{some}± is the standard error, of differences that of the paired examples"
        parts.append(f"{task_results.score_table(results)}\n{foot}")
    if measured := _speeds(judged):
        parts.append(speeds.speed_table(measured))
    return parts + ["\n".join(lines) for lines in [_not_faster(measured)] if lines]


def _protocols(judged: dict[str, _Judged]) -> str:
    """What was read, said once if both models read the same tokens."""
    first, *others = (found.passage for found in judged.values())
    if all(_same(first, other) for other in others):
        return str(first)
    each = [f"{stage} read {found.passage}" for stage, found in judged.items()]
    return "\n".join([*each, "the tokenizers differ: compare the bits per byte, not the perplexities"])


def _same(a: Passage, b: Passage) -> bool:
    return a.counts == b.counts and all(torch.equal(x, y) for x, y in zip(a.windows, b.windows, strict=True))


def _speeds(judged: dict[str, _Judged]) -> dict[str, Speed]:
    return {stage: found.speed for stage, found in judged.items() if found.speed}


def _not_faster(measured: dict[str, Speed]) -> Sequence[str]:
    return speeds.why_not_faster(*measured.values()) if len(measured) == 2 else []


def _record(judged: dict[str, _Judged], stages: dict[str, str], plan: PruningPlan | None) -> dict[str, Any]:
    """Everything that was found, as JSON."""
    results, measured = {stage: found.tasks for stage, found in judged.items()}, _speeds(judged)
    record: dict[str, Any] = {"version": 1, "kind": "run", "status": "finished"}
    record |= {"title": f"evaluation of {[*stages.values()][-1]}", "models": stages}
    record["protocol"] = {stage: found.passage.as_dict() for stage, found in judged.items()}
    record["stages"] = measurement.as_dict({stage: found.measured for stage, found in judged.items()})
    if plan:
        record["asked"] = {"method": plan.method, "settings": plan.settings, "sparsity": plan.sparsity}
        record["reached"] = {
            "sparsity": plan.reached,
            "sparsity_of_model": plan.reached_of_model,
            "parameters": sum(plan.after) + plan.rest,
            "block_parameters": sum(plan.after),
        }
    if any(results.values()):
        columns = task_results.columns(results)
        record["tasks"] = {
            stage: {name: asdict(each) for name, each in found.items()} for stage, found in results.items()
        }
        record["averages"] = {head: _json(column.get(task_results.AVERAGE)) for head, column in columns.items()}
        record["differences"] = {name: _json(each) for name, each in columns.get("difference", {}).items()}
    if measured:
        record["speed"] = {stage: asdict(each) for stage, each in measured.items()}
        record["not_faster"] = _not_faster(measured)
    return record


def _json(figure: Figure | None) -> dict[str, float | None] | None:
    return None if figure is None else {"value": figure.value, "stderr": figure.stderr}
