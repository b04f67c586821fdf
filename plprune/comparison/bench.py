"""One model of a study: pruned, recovered and judged, each result computed once."""

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.load import load_model, load_tokenizer, rebuild
from plprune.checkpoint.save import save_pruned
from plprune.comparison.study import CalibrationText, Study, Training
from plprune.evaluation.lm_eval import run_tasks
from plprune.evaluation.measurement import parameters
from plprune.evaluation.perplexity import Passage, judge, passage
from plprune.evaluation.speed import measure_speed
from plprune.evaluation.task_results import TaskResult, average, counted, paired
from plprune.io.atomic import file_lock
from plprune.io.cache import Cache, digest, source_digest
from plprune.io.distributed import log_device
from plprune.io.text import bos_token, draw, tokenised
from plprune.methods import PruningMethod, Request, prune
from plprune.methods.run import source_of
from plprune.pruning.calibration import Calibration, Observations
from plprune.pruning.forward import check_ids
from plprune.pruning.observations import load, save, survey
from plprune.pruning.plan import PruningPlan, fingerprint
from plprune.recovery.lora import merged_state
from plprune.training.data import RecoveryData
from plprune.training.module import Recovery
from plprune.training.round_schedule import schedule

log = logging.getLogger(__name__)
Cell = dict[str, Any]
Part = tuple[dict[str, Any], Callable[[], Iterator[Cell]]]  # what it depends on, and how its cells are made
Pruned = tuple[PreTrainedModel, PruningPlan, dict[str, float]]  # with the seconds that it took
TRAINING = ("plprune.training.module", "plprune.training.data", "plprune.training.round_schedule")
APART = 1000  # between the seeds of two rounds, beyond those of a study


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
        log_device(study.device, self.dense.dtype)

    def cells(self, first: bool = True) -> Iterator[tuple[int, Cell]]:
        """The dense model, every pruning and its recoveries, with the part each is of, as far as no one else is at it.

        Args:
            first: Whether to wait in the end for what others are at: it is read then, or computed if they have failed.
        """
        left, wait = dict(enumerate(self._parts())), False
        while left:
            for place, (of, cells) in left.items():
                with self.cache.lock(of, wait) as own:
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
            request = identity(self.study.request(method))
            of = self._common | {"calibration": calibration, "seed": seed, "method": request}
            yield of, functools.partial(self._pruned, of, text, seed, method)

    @functools.cached_property
    def _common(self) -> dict[str, Any]:
        """What all results depend on."""
        dtype = str(self.dense.dtype).removeprefix("torch.")
        common = {"weights": self.weights, "dtype": dtype, "device": self.study.device.type}
        common |= {name: version(name) for name in ("plprune", "torch", "transformers")}
        bench = Path(__file__).read_text(encoding="utf-8")
        return common | {"source": digest({"bench": bench, "models": source_digest("plprune.checkpoint.load")})}

    def _dense(self) -> Iterator[Cell]:
        """The dense model."""
        of, facts = self._common, dict(zip(("block_parameters", "parameters"), parameters(self.dense), strict=True))
        timed, judged = self._timed(of, lambda: self.dense), self._judged(of, lambda: self.dense)
        yield self._cell("dense", "dense", 0.0, None) | facts | timed | judged

    @functools.cached_property
    def _dense_tasks(self) -> dict[str, Any]:
        """What the dense model scores, once whoever is at it is done."""
        with self.cache.lock(self._common, wait=True):
            return self._judged(self._common, lambda: self.dense)["tasks"]

    def _pruned(self, of: dict[str, Any], text: CalibrationText, seed: int, method: PruningMethod) -> Iterator[Cell]:
        """A model pruned, and recovered in the ways that the study says."""
        known = {"calibration": text.name, "settings": self.study.request(method).settings}
        cells = [self._cell(type(method).__name__, stage, method.sparsity, seed) | known for stage in self.study.stages]
        model = functools.cache(lambda: self._prune(method, text, seed))
        facts = self._structure(of, model)
        yield self._completed(cells[0] | facts, of, lambda: model()[0])
        for cell, training, made_by in zip(cells[1:], self.study.recoveries, self._trainings, strict=True):
            by = of | {"recover": made_by, "by": source_digest(*TRAINING)}
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
            name = f"{self.weights}-{calibration.fingerprint}-{source_digest('plprune.pruning.observations')}"
            file = self.folder / "observations" / f"{name}.safetensors"
            with file_lock(file.parent / "locks" / name, wait=True):
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
        study = self.study
        plan = prune(model, method, calibration, seed, serve_on=study.serve_on, tensor_parallel=study.tensor_parallel)
        return model, plan, {"prune": time.perf_counter() - start}

    def _in_rounds(self, method: PruningMethod, text: CalibrationText, seed: int, training: Training) -> Pruned:
        """Prunes and recovers the dense model in turns, with the training text in another order at each turn."""
        model, dense, seconds = self.dense, parameters(self.dense)[0], {"prune": 0.0, "recover": 0.0}
        rounds = schedule(method.sparsity, training.steps, training.rounds, lambda _: parameters(model)[0] / dense)
        for each in rounds:
            turn = dataclasses.replace(method, sparsity=each.sparsity)
            model, plan, took = self._prune(turn, text, seed, model)
            model, recovering = self._recover(
                model, seed + APART * each.index, dataclasses.replace(training, steps=each.steps)
            )
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
            limited |= {"lm_eval": version("lm_eval"), "by": source_digest("plprune.evaluation.lm_eval")}
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
        protocol |= {"by": source_digest("plprune.evaluation.measurement")}
        return self.cache.get(protocol | {"result": "quality"}, lambda: self._quality(model(), text))

    def _timed(self, of: dict[str, Any], model: Callable[[], PreTrainedModel]) -> Cell:
        """How fast a model is, if the study asks."""
        if self.study.max_batch is None:
            return {}
        where = machine() | {"host": platform.node()}
        by = source_digest("plprune.evaluation.speed")
        timed = of | {"machine": where, "max_batch": self.study.max_batch, "by": by}
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
        texts_read = {each["text"] for each in made_by}
        texts = {source: fingerprint([("ids", self._ids(source))], values=1 << 30) for source in texts_read}
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
        own = rebuild(module.model, dict(merged_state(module.model, lambda p: p.detach().cpu())))
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
        for name in ("plprune.training.module", "plprune.recovery.distillation", "plprune.io.text", "lightning.pytorch")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def identity(request: Request) -> dict[str, Any]:
    """What makes a pruning that pruning: all its settings, the method's source, and that of all below it."""
    return {"class": type(request.method).__qualname__, "source": source_of(request.method)} | request.settings


def machine() -> dict[str, Any]:
    """What a time was measured on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": platform.machine(), "threads": torch.get_num_threads()} | gpu
