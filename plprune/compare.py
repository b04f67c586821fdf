"""Methods side by side: every method at every sparsity on every model, with every seed, under one protocol.

What many of these have in common is computed once: the activations of the dense model, which decide most prunings, are
observed in one pass for each seed. Every result is kept under the content of what it was made from (weights, text,
method with its settings, protocol, and the source of all that computes it), so that a comparison that was stopped goes
on where it was, and a new method costs only itself.

Any number of processes can work in one folder, those that torchrun has started or others: each takes what nobody is at.
They send each other nothing, and may be on several machines that share the folder.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.allocation import largest_remainder, next_sparsity
from plprune.anatomy import blocks_of
from plprune.atomic import alone, resolved, staged
from plprune.cache import Cache, digest, sources
from plprune.calibration import Calibration, Observations
from plprune.checkpoint import load_model, load_tokenizer, rebuilt, save_pruned
from plprune.data import RecoveryData
from plprune.distillation import Distillation
from plprune.evaluation import Passage, Protocol, judge, parameters, passage
from plprune.lora import LoRA, merged_state
from plprune.methods import PruningMethod, prune
from plprune.methods.base import source_of
from plprune.plan import PruningPlan, fingerprint
from plprune.processes import announce, apart
from plprune.progress import Progress
from plprune.recovery import Recovery, check_rates
from plprune.report import NAME, check_ours, completed, write
from plprune.report.comparison import name_of, plots, summarised
from plprune.report.found import of_process
from plprune.report.page import at
from plprune.running import check_ids
from plprune.speed import measure_speed
from plprune.stored import Dtype
from plprune.survey import load, save, survey
from plprune.tasks import TaskResult, average, check_tasks, counted, paired, run_tasks
from plprune.text import (
    DROPPED,
    READERS,
    bos_token,
    check_seed,
    check_share,
    check_sizes,
    check_source,
    draw,
    tokenised,
)

log = logging.getLogger(__name__)
Cell = dict[str, Any]
Part = tuple[dict[str, Any], Callable[[], Iterator[Cell]]]  # what it depends on, and how its cells are made
Pruned = tuple[PreTrainedModel, PruningPlan, dict[str, float]]  # with the seconds that it took
APART = 1000  # between the seeds of two rounds, beyond those of a study


@dataclasses.dataclass(frozen=True)
class Training:
    """A way in which every pruned model is recovered.

    Args:
        text: What it is trained on, as for `RecoveryData`.
        steps: Optimizer steps.
        seq_len: Tokens of a window.
        batch_size: Windows of a step.
        learning_rate: Peak of the learning rate.
        lora: The adapters.
        train: What is trained: adapters (lora), or the projections whose inputs were pruned (consumers).
        distill: How the dense model is learnt from; not at all if not given.
        name: What the models that it recovers are called, beside `dense` and `pruned`.
        rounds: In how many rounds of pruning and recovery the sparsity is reached; they share the steps. If more than
            one, the model is not the one that is `pruned`, but pruned by the same method to the same sparsity.
    """

    text: str
    steps: int = 50
    seq_len: int = 256
    batch_size: int = 4
    learning_rate: float = 5e-4
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    train: Literal["lora", "consumers"] = "lora"
    distill: Distillation | None = None
    name: str = "recovered"
    rounds: int = 1


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """What prunings are calibrated on.

    Args:
        text: As for `RecoveryData`.
        num_samples: Calibration windows.
        seq_len: Tokens of one.
        name: What it is called; made of the others if not given.
    """

    text: str
    num_samples: int = 32
    seq_len: int = 256
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{short_name(self.text)} {self.num_samples} x {self.seq_len}")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and the protocol.

    Args:
        models: Names or paths.
        methods: Methods; each is taken at every sparsity.
        sparsities: Fractions of the blocks' parameters to remove.
        seeds: Of calibration windows and recovery.
        text: What perplexity is measured on, of several texts on each; the first is the one that is plotted.
        calibration: What is calibrated on; of several, every pruning is taken with each.
        join: Put between the rows of each of these texts.
        num_samples: Calibration windows, where only the text of them is given.
        calibration_seq_len: Tokens of one, likewise.
        protocol: How perplexity is measured; its `bos` is of calibration and recovery too.
        max_dropped: The share of a text's rows that may be dropped, as they cannot be used.
        recover: How pruned models are recovered, each in every one of these ways; they are not if not given. The first
            is the one that is plotted.
        tasks: lm-eval tasks, groups and tags.
        task_data: Folder with the tasks' data.
        limit: Examples of each task.
        max_batch: The largest batch that speed is measured at; it is not measured if not given.
        dtype: Of the weights; as each model is stored if not given, and float32 for a `.gguf` file.
        device: Where to compute.
    """

    models: Sequence[str]
    methods: Sequence[PruningMethod]
    sparsities: Sequence[float]
    text: str | Sequence[str]
    calibration: str | Sequence[CalibrationText]
    seeds: Sequence[int] = (0,)
    join: str | None = None
    num_samples: int = 32
    calibration_seq_len: int = 256
    protocol: Protocol = dataclasses.field(default_factory=Protocol)
    max_dropped: float = DROPPED
    recover: Training | Sequence[Training] | None = None
    tasks: Sequence[str] = ()
    task_data: str | None = None
    limit: int | None = None
    max_batch: int | None = None
    dtype: Dtype | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def check(self) -> None:
        """Makes sure, before anything is loaded, that all of it can be done.

        Raises:
            ValueError: It cannot.
        """
        needed = ("models", "methods", "sparsities", "text", "calibration", "seeds")
        empty = [name for name in needed if not getattr(self, name)]
        if empty:
            raise ValueError(f"nothing to compare: `{empty[0]}` is empty")
        for each in self.calibrations:
            check_sizes(num_samples=each.num_samples, calibration_seq_len=each.seq_len)
        for each in self.recoveries:
            check_sizes(steps=each.steps, rounds=each.rounds, seq_len=each.seq_len, batch_size=each.batch_size)
            check_rates(learning_rate=each.learning_rate)
            if each.rounds > each.steps:
                raise ValueError(f"{each.rounds} rounds share steps, of which there are {each.steps}: give more")
        check_sizes(limit=self.limit, max_batch=self.max_batch)
        check_share(self.max_dropped)
        for seed in self.seeds:
            check_seed(seed)
        for source in (*self.sources, *(each.text for each in (*self.calibrations, *self.recoveries))):
            check_source(source)
        check_distinct("models", self.models)
        check_distinct("text", self.sources)
        check_distinct("calibration", [each.name for each in self.calibrations])
        check_distinct("recover", ["dense", *self.stages])
        if self.tasks:
            check_tasks(self.tasks, self.task_data)

    @property
    def sources(self) -> list[str]:
        """What perplexity is measured on."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def texts(self) -> dict[str, str]:
        """These by short names, or by their own where two texts would have the same."""
        short = [short_name(source) for source in self.sources]
        return {n if short.count(n) == 1 else source: source for n, source in zip(short, self.sources, strict=True)}

    @property
    def labels(self) -> dict[str, str]:
        """What models are called: the last parts of their names, as many as tell them apart."""
        parts = {name: Path(name.removesuffix(".gguf")).parts for name in self.models}
        for depth in range(1, max(map(len, parts.values())) + 1):
            found = {name: "/".join(own[-depth:]) for name, own in parts.items()}
            if len(set(found.values())) == len(parts):
                return found
        return {name: name for name in self.models}

    @property
    def calibrations(self) -> list[CalibrationText]:
        """What is calibrated on."""
        if isinstance(self.calibration, str):
            return [CalibrationText(self.calibration, self.num_samples, self.calibration_seq_len)]
        return list(self.calibration)

    @property
    def recoveries(self) -> list[Training]:
        """How pruned models are recovered."""
        return [self.recover] if isinstance(self.recover, Training) else list(self.recover or [])

    @property
    def stages(self) -> list[str]:
        """In which states each pruned model is judged."""
        return ["pruned", *(training.name for training in self.recoveries)]

    @property
    def size(self) -> int:
        """How many cells there are."""
        return len(self.models) * (1 + len(self.stages) * len(self.prunings()))

    def prunings(self) -> list[tuple[CalibrationText, int, PruningMethod]]:
        """Every calibration and seed with every method at every sparsity."""
        return [
            (text, seed, dataclasses.replace(method, sparsity=sparsity))
            for text in self.calibrations
            for seed in self.seeds
            for method in self.methods
            for sparsity in self.sparsities
        ]


def compare(study: Study, output: str | os.PathLike[str]) -> dict[str, Any]:
    """Computes what is not in the output's cache yet, and reports after every cell.

    Of processes that torchrun has started, each computes what nobody has taken, and the first reports all. What could
    not be done is not kept, and each of them may try it.

    Args:
        study: What is compared.
        output: Folder of the cache, of `report.html` with `report.json`, and of the plots as SVG; what is there is
            kept, and gone on with.

    Returns:
        The record, as in `report.json`; in other processes than the first, of the cells that they came by.

    Raises:
        ValueError: A model, text or task is not there, or a setting is out of range.
    """
    study.check()
    output = resolved(output)
    page = output / NAME
    check_ours(page)
    found: dict[tuple[int, int], list[Cell]] = {}  # by model and part
    start = time.perf_counter()

    def so_far(status: str) -> dict[str, Any]:
        return record(study, [cell for place in sorted(found) for cell in found[place]], status, start)

    with apart() as rank, Progress(study.size, "comparing", "cell", quiet=rank > 0) as bar:
        for i, name in enumerate(study.models):
            for part, cell in Bench(study, name, output).cells(first=rank == 0):
                found.setdefault((i, part), []).append(cell)
                bar.update()
                if rank == 0:
                    write(so_far("running"), page, overwrite=True)
    done = completed(so_far("finished"))
    if rank > 0:
        return done
    write(done, page, overwrite=True)
    for name, svg in plots(done).items():
        with staged(output / f"{name}.svg", overwrite=True) as temporary:
            temporary.write_text(svg, encoding="utf-8")
    return done


class Bench:
    """One model of a study, with all that is judged of it.

    Args:
        study: The study.
        name: The model's name or path.
        folder: The study's output.
    """

    def __init__(self, study: Study, name: str, folder: str | os.PathLike[str]) -> None:
        self.study, self.name, self.folder = study, name, Path(folder)
        self.cache = Cache(self.folder / "cells")
        self.tokenizer = load_tokenizer(name)
        self.dense = load_model(name, study.dtype)
        self.weights = fingerprint(self.dense.named_parameters())
        self.passages = {
            called: passage(source, self.tokenizer, study.protocol, study.join, study.max_dropped)
            for called, source in study.texts.items()
        }
        for each in self.passages.values():
            check_ids(self.dense, each.windows, self.tokenizer)
        self.bos = bos_token(self.tokenizer, study.protocol.bos)
        self._calibrations: dict[tuple[CalibrationText, int], Calibration] = {}
        self._seen: dict[str, Observations] = {}  # the last, by the fingerprint of the calibration
        announce(study.device, self.dense.dtype)

    def cells(self, first: bool = True) -> Iterator[tuple[int, Cell]]:
        """The dense model, every pruning and its recoveries, with the part each is of, as far as no one else is at it.

        Args:
            first: Whether to wait in the end for what others are at: it is read then, or computed if they have failed.
        """
        left, wait = dict(enumerate(self._parts())), False
        while left:
            for place, (of, cells) in left.items():
                with self.cache.alone(of, wait) as own:
                    if own:
                        yield from ((place, cell) for cell in cells())
                        break
            else:
                if not first:
                    return
                log.info("waiting for other processes, which are at what is left")
                wait = True
                continue
            del left[place]
            wait = False

    def _parts(self) -> Iterator[Part]:
        """What one process computes at once: the dense model, or a pruning with its recoveries, which share it."""
        yield self._common, self._dense
        for text, seed, method in self.study.prunings():
            calibration = self._calibrated(text, seed).fingerprint
            of = self._common | {"calibration": calibration, "seed": seed, "method": identity(method)}
            yield of, functools.partial(self._pruned, of, text, seed, method)

    @functools.cached_property
    def _common(self) -> dict[str, Any]:
        """What all results depend on."""
        dtype = str(self.dense.dtype).removeprefix("torch.")
        common = {"weights": self.weights, "dtype": dtype, "device": self.study.device.type}
        common |= {name: version(name) for name in ("plprune", "torch", "transformers")}
        bench = Path(__file__).read_text(encoding="utf-8")
        return common | {"source": digest({"bench": bench, "models": sources("plprune.checkpoint")})}

    def _dense(self) -> Iterator[Cell]:
        """The dense model."""
        of, facts = self._common, dict(zip(("block_parameters", "parameters"), parameters(self.dense), strict=True))
        timed, judged = self._timed(of, lambda: self.dense), self._judged(of, lambda: self.dense)
        yield self._cell("dense", "dense", 0.0, None) | facts | timed | judged

    @functools.cached_property
    def _dense_tasks(self) -> dict[str, Any]:
        """What the dense model scores, once whoever is at it is done."""
        with self.cache.alone(self._common, wait=True):
            return self._judged(self._common, lambda: self.dense)["tasks"]

    def _pruned(self, of: dict[str, Any], text: CalibrationText, seed: int, method: PruningMethod) -> Iterator[Cell]:
        """A model pruned, and recovered in the ways that the study says."""
        known = {"calibration": text.name, "settings": dataclasses.asdict(method)}
        cells = [self._cell(type(method).__name__, stage, method.sparsity, seed) | known for stage in self.study.stages]
        model = functools.cache(lambda: self._prune(method, text, seed))
        facts = self._structure(of, model)
        yield self._completed(cells[0] | facts, of, lambda: model()[0])
        for cell, training, made_by in zip(cells[1:], self.study.recoveries, self._trainings, strict=True):
            by = of | {"recover": made_by, "by": sources("plprune.recovery", "plprune.data")}
            by |= {name: version(name) for name in ("lightning", "peft")}
            if training.rounds > 1:
                again = functools.cache(lambda training=training: self._in_rounds(method, text, seed, training))
                own = self._structure(by, again)
                yield self._completed(cell | own, by, lambda make=again: make()[0])
            elif "error" in facts:
                yield cell | facts
            else:
                recovered = functools.cache(lambda training=training: self._recover(model()[0], seed, training))
                seconds = self.cache.get(by | {"result": "recovery"}, lambda make=recovered: {"recover": make()[1]})
                own = facts | {"seconds": facts["seconds"] | seconds}
                yield self._completed(cell | own, by, lambda make=recovered: make()[0])

    def _structure(self, of: dict[str, Any], make: Callable[[], Pruned]) -> Cell:
        """What a pruning came to, and how fast that is, as recovery changes no shape; or why it could not be done."""
        try:
            facts = self.cache.get(of | {"result": "plan"}, lambda: self._facts(*make()))
        except (ValueError, RuntimeError) as error:  # as of linear algebra, or of memory
            log.warning("%s at sparsity %s: %s", of["method"]["class"], of["method"]["sparsity"], error)
            return {"error": " ".join(str(error).split())}
        return facts | self._timed(of, lambda: make()[0])

    def _completed(self, cell: Cell, of: dict[str, Any], model: Callable[[], PreTrainedModel]) -> Cell:
        """The cell with what is measured, tasks also by their differences from the dense model, example by example."""
        if "error" in cell:
            return cell
        judged = self._judged(of, model)
        for name, result in judged.get("tasks", {}).items():
            difference = paired(TaskResult(**self._dense_tasks[name]), TaskResult(**result))
            if difference is not None:
                result |= {"difference": difference.value, "difference_stderr": difference.stderr}
        return cell | judged | {"seconds": cell["seconds"] | judged["seconds"]}

    def _cell(self, method: str, stage: str, sparsity: float, seed: int | None) -> Cell:
        return {
            "model": self.study.labels[self.name],
            "method": method,
            "stage": stage,
            "sparsity": sparsity,
            "seed": seed,
        }

    def _calibrated(self, text: CalibrationText, seed: int) -> Calibration:
        """The calibration windows of a seed."""
        if (text, seed) not in self._calibrations:
            ids = self._ids(text.text, self.study.join, seed)
            windows = draw(ids, text.num_samples, text.seq_len, seed, self.bos)
            self._calibrations[text, seed] = Calibration(list(windows.split(8)), self.study.device)
        return self._calibrations[text, seed]

    def _observed(self, text: CalibrationText, seed: int) -> Calibration:
        """The calibration windows with what was observed of the dense model on them, once."""
        calibration = self._calibrated(text, seed)
        if calibration.fingerprint not in self._seen:
            name = f"{self.weights}-{calibration.fingerprint}-{sources('plprune.survey')}"
            file = self.folder / "observations" / f"{name}.safetensors"
            with alone(file.parent / "locks" / name, wait=True):
                if not file.exists():
                    save(survey(self.dense, calibration), file)
            self._seen = {calibration.fingerprint: load(file, self.study.device)}
        return dataclasses.replace(calibration, known=self._seen[calibration.fingerprint])

    def _prune(
        self, method: PruningMethod, text: CalibrationText, seed: int, model: PreTrainedModel | None = None
    ) -> Pruned:
        """A copy of a model, the dense one if not given, pruned."""
        calibration, model = self._observed(text, seed), deepcopy(self.dense if model is None else model)
        start = time.perf_counter()
        plan = prune(model, method, calibration, seed)
        return model, plan, {"prune": time.perf_counter() - start}

    def _in_rounds(self, method: PruningMethod, text: CalibrationText, seed: int, training: Training) -> Pruned:
        """The dense model pruned and recovered by turns, at each of which the training text has another order."""
        model, whole, seconds = self.dense, parameters(self.dense)[0], {"prune": 0.0, "recover": 0.0}
        for i, steps in enumerate(largest_remainder([1.0] * training.rounds, training.steps)):
            left = parameters(model)[0] / whole
            sparsity = next_sparsity(method.sparsity, left, i + 1, training.rounds)
            own = dataclasses.replace(method, sparsity=sparsity)
            model, plan, took = self._prune(own, text, seed, model)
            model, recovering = self._recover(model, seed + APART * i, dataclasses.replace(training, steps=steps))
            seconds = {"prune": seconds["prune"] + took["prune"], "recover": seconds["recover"] + recovering}
        return model, plan, seconds

    def _facts(self, model: PreTrainedModel, plan: PruningPlan, seconds: dict[str, float]) -> dict[str, Any]:
        blocks = blocks_of(model)
        heads = [block.kv_heads if block.has_attention else 0 for block in blocks]
        return {
            "reached": 1 - sum(plan.after) / parameters(self.dense)[0],
            "block_parameters": sum(plan.after),
            "parameters": sum(plan.after) + plan.rest,
            "widths": {"attention": heads, "ffn": [block.channels for block in blocks]},
            "importance": plan.importance.tolist(),
            "settings": plan.settings,
            "seconds": seconds,
        }

    def _judged(self, of: dict[str, Any], model: Callable[[], PreTrainedModel]) -> Cell:
        """All that the study asks of a model; each is kept by itself."""
        study = self.study
        cell, *others = (self._read(of, model, each) for each in self.passages.values())
        if others:
            cell["seconds"]["evaluate"] += sum(each.pop("seconds")["evaluate"] for each in others)
            cell["texts"] = dict(zip(list(self.passages)[1:], others, strict=True))
        if study.tasks:
            data = study.task_data and str(Path(study.task_data).resolve())
            limited = of | {"limit": study.limit, "bos": study.protocol.bos, "data": data}
            limited |= {"lm_eval": version("lm_eval"), "by": sources("plprune.tasks")}
            cell["tasks"] = {}
            for name in study.tasks:
                cell["tasks"] |= self.cache.get(limited | {"tasks": name}, lambda name=name: self._tasks(model(), name))
            results = {name: TaskResult(**result) for name, result in cell["tasks"].items()}
            mean = average(results[name] for name in counted(results))
            cell |= {} if mean is None else {"average": mean.value, "average_stderr": mean.stderr}
        return cell

    def _read(self, of: dict[str, Any], model: Callable[[], PreTrainedModel], text: Passage) -> Cell:
        """How well a model predicts a text."""
        tokens = fingerprint([("ids", torch.cat([ids.flatten() for ids in text.windows]))], values=1 << 30)
        protocol = of | {"text": tokens, "protocol": dataclasses.asdict(self.study.protocol)}
        protocol |= {"by": sources("plprune.evaluation")}
        return self.cache.get(protocol | {"result": "quality"}, lambda: self._quality(model(), text))

    def _timed(self, of: dict[str, Any], model: Callable[[], PreTrainedModel]) -> Cell:
        """How fast a model is, if the study asks."""
        if self.study.max_batch is None:
            return {}
        where = machine() | {"host": platform.node()}
        timed = of | {"machine": where, "max_batch": self.study.max_batch, "by": sources("plprune.speed")}
        return {"speed": self.cache.get(timed, lambda: self._speed(model()))}

    def _speed(self, model: PreTrainedModel) -> Cell:
        """Without the peak of memory, in which the dense model would count too."""
        measured = measure_speed(self._placed(model), max_batch=self.study.max_batch)
        return dataclasses.asdict(measured) | {"peak": None, "saturated_peak": None}

    def _quality(self, model: PreTrainedModel, text: Passage) -> Cell:
        start = time.perf_counter()
        quality = dataclasses.asdict(judge(self._placed(model), text))
        return quality | {"seconds": {"evaluate": time.perf_counter() - start}}

    def _tasks(self, model: PreTrainedModel, name: str) -> Cell:
        study = self.study
        placed, bos = self._placed(model), study.protocol.bos
        results = run_tasks(placed, self.tokenizer, [name], study.limit, study.task_data, bos=bos)
        return {task: dataclasses.asdict(result) for task, result in results.items()}

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.to(self.study.device)  # type: ignore[arg-type]

    def _ids(self, source: str, join: str | None = None, seed: int | None = None) -> Tensor:
        """A text's tokens."""
        ids, _ = tokenised(source, self.tokenizer, join, seed=seed, max_dropped=self.study.max_dropped)
        check_ids(self.dense, [ids], self.tokenizer)
        return ids

    @functools.cached_property
    def _trainings(self) -> list[dict[str, Any]]:
        """What makes each recovery that recovery, its text by its tokens, and whatever it is called."""
        made_by = [dataclasses.asdict(training) for training in self.study.recoveries]
        sources = {each["text"] for each in made_by}
        texts = {source: fingerprint([("ids", self._ids(source))], values=1 << 30) for source in sources}
        once = [{k: v for k, v in each.items() if k != "name" and (k, v) != ("rounds", 1)} for each in made_by]
        return [each | {"text": texts[each["text"]], "bos": self.bos} for each in once]

    def _recover(self, model: PreTrainedModel, seed: int, training: Training) -> tuple[PreTrainedModel, float]:
        """The model recovered, adapters merged, and how long it took; it goes through a folder, as a user's would."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="plprune-") as room:
            save_pruned(model, Path(room) / "model", self.tokenizer)
            pl.seed_everything(seed, verbose=False)
            distill = training.distill and dataclasses.replace(
                training.distill, teacher=training.distill.teacher or self.name
            )
            module = Recovery(
                str(Path(room) / "model"),
                self.study.dtype,
                training.lora,
                learning_rate=training.learning_rate,
                train=training.train,
                distill=distill,
            )
            data = RecoveryData(
                training.text,
                seq_len=training.seq_len,
                batch_size=training.batch_size,
                seed=seed,
                bos=self.study.protocol.bos,
                max_dropped=self.study.max_dropped,
            )
            with quietly():
                trainer(self.study.device, training.steps, self.folder).fit(module, datamodule=data)
        own = rebuilt(module.model, dict(merged_state(module.model, lambda p: p.detach().cpu())))
        return own, time.perf_counter() - start


def trainer(device: torch.device, steps: int, folder: Path) -> pl.Trainer:
    """A Trainer that trains and leaves nothing behind, but a teacher's answers in the folder, for all cells."""
    return pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.type == "cpu" else [device.index or 0],
        max_steps=steps,
        default_root_dir=folder,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what a training says of itself, as there are many of them."""
    loggers = [
        logging.getLogger(name)
        for name in ("plprune.recovery", "plprune.distillation", "plprune.text", "lightning.pytorch")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def short_name(source: str) -> str:
    """A text by the last part of its name.

    Example:
        >>> short_name("Salesforce/wikitext:wikitext-2-raw-v1:test"), short_name("data/c4.jsonl")
        ('wikitext', 'c4')
    """
    path = Path(source.partition(":")[0])
    return path.stem if path.suffix in READERS else path.name


def check_distinct(what: str, names: Sequence[str]) -> None:
    """Raises ValueError if two of a kind have one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`{what}` has {twice!r} twice: give each its own name")


def identity(method: PruningMethod) -> dict[str, Any]:
    """What makes a method that method: its settings, its source, and that of all below it."""
    return {"class": type(method).__qualname__, "source": source_of(method)} | dataclasses.asdict(method)


def machine() -> dict[str, Any]:
    """What a time was measured on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": platform.machine(), "threads": torch.get_num_threads()} | gpu


def record(study: Study, cells: list[Cell], status: str, start: float) -> dict[str, Any]:
    """What a report is made from."""
    protocol = {
        "text": ", ".join(study.sources),
        "calibration": {each.name: dataclasses.asdict(each) for each in study.calibrations},
        "recovery": {each.name: dataclasses.asdict(each) for each in study.recoveries},
        "tasks_limit": study.limit,
        "dtype": study.dtype or "as stored",
        "seeds": list(study.seeds),
    }
    return {
        "version": 1,
        "kind": "comparison",
        "title": "Comparison of " + ", ".join(dict.fromkeys(type(method).__name__ for method in study.methods)),
        "status": status,
        "process": of_process(),
        "progress": {"step": len(cells), "steps": study.size},
        "protocol": protocol | dataclasses.asdict(study.protocol),
        "machine": machine(),
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("plprune", "torch", "transformers", "peft", "lightning")},
        "cells": cells,
    }


MEASURES = (  # title, keys in a row of a report's summary, format
    ("perplexity", ("perplexity",), ".2f"),
    ("bits per byte", ("bits_per_byte",), ".3f"),
    ("tasks", ("average",), ".3f"),
)
Column = tuple[str, str, tuple[str, ...], str]  # title, stage, keys, format


def table(record: dict[str, Any]) -> str:
    """The cells of a record in Markdown: one line for a method at a sparsity, seeds as mean and range."""
    summary, rows = summarised(record["cells"]), {}
    for row in summary:
        stage = "pruned" if row["stage"] == "dense" else row["stage"]
        rows.setdefault((row["model"], row["name"], f"{row['sparsity']:.1%}"), {})[stage] = row
    columns = [column for column in _columns(summary) if any(_figure(own, *column[1:]) for own in rows.values())]
    header = ["model", "method", "sparsity", *(title for title, *_ in columns)]
    lines = [[*key, *(_figure(own, *column[1:]) for column in columns)] for key, own in rows.items()]
    failed = [cell for cell in record["cells"] if cell.get("error")]
    errors = {f"- {name_of(c, record['cells'])} at {c['sparsity']:.1%}: {c['error']}" for c in failed}
    return "\n".join([_line(header), "|" + "---|" * len(header), *map(_line, lines), *sorted(errors)])


def _columns(summary: list[dict[str, Any]]) -> list[Column]:
    """All that could be shown: of what is measured, a column for each stage."""
    stages = dict.fromkeys(["pruned", *(row["stage"] for row in summary if row["stage"] != "dense")])
    texts = dict.fromkeys(name for row in summary for name in row["texts"])
    first, *others = MEASURES
    further = [(f"perplexity on {name}", ("texts", name, "perplexity"), ".2f") for name in texts]
    measured = [
        (f"{title}, pruned" if stage == "pruned" else stage, stage, keys, form)
        for title, keys, form in (first, *further, *others)
        for stage in stages
    ]
    return [
        ("parameters", "pruned", ("parameters",), ",.0f"),
        ("seconds to prune", "pruned", ("seconds_to_prune",), ".1f"),
        *measured,
        ("tokens/s, writing", "pruned", ("tokens_per_second",), ".1f"),
    ]


def _figure(rows: dict[str, dict[str, Any]], stage: str, keys: tuple[str, ...], form: str) -> str:
    place, field = at(rows.get(stage, {}), *keys[:-1]), keys[-1]
    low, high = place.get(f"{field}_range", (None, None))
    seeds = "" if low is None else f" ({low:{form}} to {high:{form}})"
    return f"{place[field]:{form}}{seeds}" if field in place else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
