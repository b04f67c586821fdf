"""Methods side by side: every method at every sparsity on every model, with every seed, under one protocol.

What many of these have in common is computed once: the activations of the dense model, which decide most prunings, are
observed in one pass for each seed. Every result is kept under the content of what it was made from (weights, text,
method with its settings and source, protocol), so that a comparison that was stopped goes on where it was, and a new
method costs only itself.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from transformers import PreTrainedModel

from plprune.anatomy import blocks_of
from plprune.atomic import staged
from plprune.cache import Cache
from plprune.calibration import Calibration
from plprune.checkpoint import Dtype, load_model, load_tokenizer, rebuilt, save_pruned
from plprune.data import RecoveryData
from plprune.distillation import Distillation
from plprune.evaluation import Protocol, judge, parameters, passage
from plprune.lora import LoRA, merged_state
from plprune.methods import PruningMethod, prune
from plprune.plan import PruningPlan, fingerprint
from plprune.progress import Progress
from plprune.recovery import Recovery
from plprune.report import NAME, check_ours, completed, write
from plprune.report.comparison import plots, summarised
from plprune.speed import measure_speed
from plprune.survey import load, save, survey
from plprune.tasks import TaskResult, check_tasks, paired, run_tasks
from plprune.text import check_sizes, check_source, draw, tokenised

log = logging.getLogger(__name__)
Cell = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Training:
    """How every pruned model is recovered.

    Args:
        text: What it is trained on, as for `RecoveryData`.
        steps: Optimizer steps.
        seq_len: Tokens of a window.
        batch_size: Windows of a step.
        learning_rate: Peak of the learning rate.
        lora: The adapters.
        train: What is trained: adapters (lora), or the projections whose inputs were pruned (consumers).
        distill: How the dense model is learnt from; not at all if not given.
    """

    text: str
    steps: int = 50
    seq_len: int = 256
    batch_size: int = 4
    learning_rate: float = 5e-4
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    train: Literal["lora", "consumers"] = "lora"
    distill: Distillation | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and the protocol.

    Args:
        models: Names or paths.
        methods: Methods; each is taken at every sparsity.
        sparsities: Fractions of the blocks' parameters to remove.
        seeds: Of calibration windows and recovery.
        text: What perplexity is measured on.
        calibration: What is calibrated on.
        join: Put between the rows of both texts.
        num_samples: Calibration windows.
        calibration_seq_len: Tokens of one.
        protocol: How perplexity is measured.
        recover: How pruned models are recovered; they are not if not given.
        tasks: lm-eval tasks.
        task_data: Folder with the tasks' data.
        limit: Examples of each task.
        max_batch: The largest batch that speed is measured at; it is not measured if not given.
        dtype: Of the weights.
        device: Where to compute.
    """

    models: Sequence[str]
    methods: Sequence[PruningMethod]
    sparsities: Sequence[float]
    text: str
    calibration: str
    seeds: Sequence[int] = (0,)
    join: str | None = None
    num_samples: int = 32
    calibration_seq_len: int = 256
    protocol: Protocol = dataclasses.field(default_factory=Protocol)
    recover: Training | None = None
    tasks: Sequence[str] = ()
    task_data: str | None = None
    limit: int | None = None
    max_batch: int | None = None
    dtype: Dtype = "float32"
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def check(self) -> None:
        """Makes sure, before anything is loaded, that all of it can be done.

        Raises:
            ValueError: It cannot.
        """
        empty = [name for name in ("models", "methods", "sparsities", "seeds") if not getattr(self, name)]
        if empty:
            raise ValueError(f"nothing to compare: `{empty[0]}` is empty")
        check_sizes(num_samples=self.num_samples, calibration_seq_len=self.calibration_seq_len)
        check_sizes(limit=self.limit, max_batch=self.max_batch)
        for source in (self.text, self.calibration, self.recover.text if self.recover else None):
            check_source(source)
        if self.tasks:
            check_tasks(self.tasks, self.task_data)

    @property
    def stages(self) -> list[str]:
        """In which states each pruned model is judged."""
        return ["pruned", "recovered"] if self.recover else ["pruned"]

    @property
    def size(self) -> int:
        """How many cells there are."""
        return len(self.models) * (1 + len(self.stages) * len(self.prunings()))

    def prunings(self) -> list[tuple[int, PruningMethod]]:
        """Every seed with every method at every sparsity."""
        return [
            (seed, dataclasses.replace(method, sparsity=sparsity))
            for seed in self.seeds
            for method in self.methods
            for sparsity in self.sparsities
        ]


def compare(study: Study, output: str | os.PathLike[str]) -> dict[str, Any]:
    """Computes what is not in the output's cache yet, and reports after every cell.

    Args:
        study: What is compared.
        output: Folder of the cache, of `report.html` with `report.json`, and of the plots as SVG; what is there is
            kept, and gone on with.

    Returns:
        The record, as in `report.json`.

    Raises:
        ValueError: A model, text or task is not there, or a setting is out of range.
    """
    study.check()
    check_ours(Path(output) / NAME)
    cells, start = [], time.perf_counter()
    with Progress(study.size, "comparing", "cell") as bar:
        for name in study.models:
            for cell in Bench(study, name, output).cells():
                cells.append(cell)
                bar.update()
                write(record(study, cells, "running", time.perf_counter() - start), output, overwrite=True)
    done = completed(record(study, cells, "finished", time.perf_counter() - start))
    write(done, output, overwrite=True)
    for name, svg in plots(done).items():
        with staged(Path(output) / f"{name}.svg", overwrite=True) as temporary:
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
        self.passage = passage(study.text, self.tokenizer, study.protocol, study.join)
        self._calibration: dict[int, Calibration] = {}

    def cells(self) -> Iterator[Cell]:
        """The dense model, then every pruning, and every recovery, one after another."""
        common = {"weights": self.weights, "dtype": self.study.dtype, "device": self.study.device.type}
        common |= {"plprune": version("plprune")}
        dense = self._judged(common, lambda: self.dense)
        facts = dict(zip(("block_parameters", "parameters"), parameters(self.dense), strict=True))
        yield self._cell("dense", "dense", 0.0, None) | facts | self._timed(common, lambda: self.dense) | dense
        for seed, method in self.study.prunings():
            yield from self._pruned(common, seed, method, dense)

    def _pruned(self, common: dict[str, Any], seed: int, method: PruningMethod, dense: Cell) -> Iterator[Cell]:
        """A model pruned, and recovered if the study says so."""
        cells = [self._cell(type(method).__name__, stage, method.sparsity, seed) for stage in self.study.stages]
        of = common | {"calibration": self._calibrated(seed).fingerprint, "seed": seed, "method": identity(method)}
        model = functools.cache(lambda: self._prune(method, seed))
        try:
            facts = self.cache.get(of | {"result": "plan"}, lambda: self._facts(*model()))
        except (ValueError, RuntimeError) as error:  # as of linear algebra, or of memory
            log.warning("%s at sparsity %s: %s", type(method).__name__, method.sparsity, error)
            yield from ({**cell, "error": " ".join(str(error).split())} for cell in cells)
            return
        facts |= self._timed(of, lambda: model()[0])  # recovery changes no shape
        yield self._completed(cells[0] | facts, of, lambda: model()[0], dense)
        for cell in cells[1:]:
            of = of | {"recover": self._training}
            recovered = functools.cache(lambda: self._recover(model()[0], seed))
            seconds = self.cache.get(of | {"result": "recovery"}, lambda make=recovered: {"recover": make()[1]})
            facts["seconds"] |= seconds
            yield self._completed(cell | facts, of, lambda make=recovered: make()[0], dense)

    def _completed(self, cell: Cell, of: dict[str, Any], model: Callable[[], PreTrainedModel], dense: Cell) -> Cell:
        """The cell with what is measured, tasks also by their differences from the dense model, example by example."""
        judged = self._judged(of, model)
        for name, result in judged.get("tasks", {}).items():
            difference = paired(TaskResult(**dense["tasks"][name]), TaskResult(**result))
            if difference is not None:
                result |= {"difference": difference.value, "difference_stderr": difference.stderr}
        return cell | judged | {"seconds": cell["seconds"] | judged["seconds"]}

    def _cell(self, method: str, stage: str, sparsity: float, seed: int | None) -> Cell:
        return {
            "model": Path(self.name).name.removesuffix(".gguf"),
            "method": method,
            "stage": stage,
            "sparsity": sparsity,
            "seed": seed,
        }

    def _calibrated(self, seed: int) -> Calibration:
        """The calibration windows of a seed."""
        if seed not in self._calibration:
            ids, _ = tokenised(self.study.calibration, self.tokenizer, self.study.join, seed=seed)
            windows = draw(ids, self.study.num_samples, self.study.calibration_seq_len, seed)
            self._calibration[seed] = Calibration(list(windows.split(8)), self.study.device)
        return self._calibration[seed]

    def _observed(self, seed: int) -> Calibration:
        """The calibration windows with what was observed of the dense model on them, once."""
        calibration = self._calibrated(seed)
        if calibration.known is None:
            file = self.folder / "observations" / f"{self.weights}-{calibration.fingerprint}.safetensors"
            if not file.exists():
                save(survey(self.dense, calibration), file)
            self._calibration[seed] = calibration = dataclasses.replace(calibration, known=load(file))
        return calibration

    def _prune(self, method: PruningMethod, seed: int) -> tuple[PreTrainedModel, PruningPlan, float]:
        calibration, model = self._observed(seed), deepcopy(self.dense)
        start = time.perf_counter()
        plan = prune(model, method, calibration, seed)
        return model, plan, time.perf_counter() - start

    def _facts(self, model: PreTrainedModel, plan: PruningPlan, seconds: float) -> dict[str, Any]:
        blocks = blocks_of(model)
        heads = [block.kv_heads if block.has_attention else 0 for block in blocks]
        return {
            "reached": plan.reached,
            "block_parameters": sum(plan.after),
            "parameters": sum(plan.after) + plan.rest,
            "widths": {"attention": heads, "ffn": [block.channels for block in blocks]},
            "importance": plan.importance.tolist(),
            "settings": plan.settings,
            "seconds": {"prune": seconds},
        }

    def _judged(self, of: dict[str, Any], model: Callable[[], PreTrainedModel]) -> Cell:
        """All that the study asks of a model; each is kept by itself."""
        study, cell = self.study, {}
        text = {"text": fingerprint([("ids", torch.cat([w.flatten() for w in self.passage.windows]))], values=1 << 30)}
        protocol = of | text | {"protocol": dataclasses.asdict(study.protocol)}
        cell |= self.cache.get(protocol | {"result": "quality"}, lambda: self._quality(model()))
        if study.tasks:
            limited = of | {"limit": study.limit, "lm_eval": version("lm_eval")}
            cell["tasks"] = {}
            for name in study.tasks:
                cell["tasks"] |= self.cache.get(limited | {"tasks": name}, lambda name=name: self._tasks(model(), name))
        return cell

    def _timed(self, of: dict[str, Any], model: Callable[[], PreTrainedModel]) -> Cell:
        """How fast a model is, if the study asks."""
        if self.study.max_batch is None:
            return {}
        where = machine() | {"host": platform.node()}
        timed = of | {"machine": where, "max_batch": self.study.max_batch}
        return {"speed": self.cache.get(timed, lambda: self._speed(model()))}

    def _speed(self, model: PreTrainedModel) -> Cell:
        """Without the peak of memory, in which the dense model would count too."""
        measured = measure_speed(self._placed(model), max_batch=self.study.max_batch)
        return dataclasses.asdict(measured) | {"peak": None, "saturated_peak": None}

    def _quality(self, model: PreTrainedModel) -> Cell:
        start = time.perf_counter()
        quality = dataclasses.asdict(judge(self._placed(model), self.passage))
        return quality | {"seconds": {"evaluate": time.perf_counter() - start}}

    def _tasks(self, model: PreTrainedModel, name: str) -> Cell:
        study = self.study
        results = run_tasks(self._placed(model), self.tokenizer, [name], study.limit, study.task_data)
        return {task: dataclasses.asdict(result) for task, result in results.items()}

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.to(self.study.device)  # type: ignore[arg-type]

    @functools.cached_property
    def _training(self) -> dict[str, Any]:
        """What makes a recovery that recovery, its text by its tokens."""
        training = cast(Training, self.study.recover)
        ids, _ = tokenised(training.text, self.tokenizer)
        return dataclasses.asdict(training) | {"text": fingerprint([("ids", ids)], values=1 << 30)}

    def _recover(self, model: PreTrainedModel, seed: int) -> tuple[PreTrainedModel, float]:
        """The model recovered, adapters merged, and how long it took; it goes through a folder, as a user's would."""
        training, start = cast(Training, self.study.recover), time.perf_counter()
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
            data = RecoveryData(training.text, seq_len=training.seq_len, batch_size=training.batch_size, seed=seed)
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
    loggers = [logging.getLogger(name) for name in ("plprune.recovery", "plprune.distillation", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def identity(method: PruningMethod) -> dict[str, Any]:
    """What makes a method that method: its settings, and the source that it is written in."""
    source = Path(inspect.getfile(type(method))).read_bytes()
    own = {"class": type(method).__qualname__, "source": hashlib.sha256(source).hexdigest()[:16]}
    return own | dataclasses.asdict(method)


def machine() -> dict[str, Any]:
    """What a time was measured on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": platform.machine(), "threads": torch.get_num_threads()} | gpu


def record(study: Study, cells: list[Cell], status: str, seconds: float) -> dict[str, Any]:
    """What a report is made from."""
    protocol = {
        "text": study.text,
        "calibration": study.calibration,
        "calibration_tokens": study.num_samples * study.calibration_seq_len,
        "recovery": dataclasses.asdict(study.recover) if study.recover else None,
        "tasks_limit": study.limit,
        "dtype": study.dtype,
        "seeds": list(study.seeds),
    }
    return {
        "version": 1,
        "kind": "comparison",
        "title": "Comparison of " + ", ".join(dict.fromkeys(type(method).__name__ for method in study.methods)),
        "status": status,
        "progress": {"step": len(cells), "steps": study.size},
        "protocol": protocol | dataclasses.asdict(study.protocol),
        "machine": machine(),
        "seconds": seconds,
        "versions": {name: version(name) for name in ("plprune", "torch", "transformers", "peft", "lightning")},
        "cells": cells,
    }


COLUMNS = (  # title, stage, key in a row of a report's summary, format
    ("parameters", "pruned", "parameters", ",.0f"),
    ("perplexity, pruned", "pruned", "perplexity", ".2f"),
    ("recovered", "recovered", "perplexity", ".2f"),
    ("bits per byte, pruned", "pruned", "bits_per_byte", ".3f"),
    ("recovered", "recovered", "bits_per_byte", ".3f"),
    ("tasks, pruned", "pruned", "average", ".3f"),
    ("recovered", "recovered", "average", ".3f"),
    ("tokens/s, writing", "pruned", "tokens_per_second", ".1f"),
)


def table(record: dict[str, Any]) -> str:
    """The cells of a record in Markdown: one line for a method at a sparsity, seeds as mean and range."""
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in summarised(record["cells"]):
        stage = "pruned" if row["stage"] == "dense" else row["stage"]
        rows.setdefault((row["model"], row["name"], f"{row['sparsity']:.1%}"), {})[stage] = row
    columns = [column for column in COLUMNS if any(_figure(own, *column[1:]) for own in rows.values())]
    header = ["model", "method", "sparsity", *(title for title, *_ in columns)]
    lines = [[*key, *(_figure(own, *column[1:]) for column in columns)] for key, own in rows.items()]
    errors = {f"- {c['method']} at {c['sparsity']:.1%}: {c['error']}" for c in record["cells"] if c.get("error")}
    return "\n".join([_line(header), "|" + "---|" * len(header), *map(_line, lines), *sorted(errors)])


def _figure(rows: dict[str, dict[str, Any]], stage: str, field: str, form: str) -> str:
    row = rows.get(stage, {})
    low, high = row.get(f"{field}_range", (None, None))
    seeds = "" if low is None else f" ({low:{form}} to {high:{form}})"
    return f"{row[field]:{form}}{seeds}" if field in row else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
