"""Computes the results of a study on one model: prunes, recovers and measures, each result once."""

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
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.load import load_model, load_tokenizer, rebuild
from plprune.checkpoint.save import save_pruned
from plprune.comparison.study import CalibrationText, Pruning, Study, Training
from plprune.evaluation.lm_eval import run_tasks
from plprune.evaluation.measurement import parameters
from plprune.evaluation.perplexity import Passage, judge, passage
from plprune.evaluation.speed import measure_speed
from plprune.evaluation.task_results import TaskResult, average, counted, paired
from plprune.io.atomic import file_lock
from plprune.io.cache import Cache, digest, source_digest
from plprune.io.distributed import log_device
from plprune.io.text import bos_token, draw, tokenised
from plprune.methods import Request
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
Cell = dict[str, Any]  # one row of a comparison, in JSON's types
Key = dict[str, Any]  # everything that a result depends on, in JSON's types
TRAINING = ("plprune.training.module", "plprune.training.data", "plprune.training.round_schedule")
CHATTY = ("plprune.training.module", "plprune.recovery.distillation", "plprune.io.text", "lightning.pytorch")
APART = 1000  # between the seeds of two rounds, more than a study has seeds


class Made(NamedTuple):
    """A model, the plan of its last pruning, and the seconds of each step that made it."""

    model: PreTrainedModel
    plan: PruningPlan | None
    seconds: dict[str, float]


Make = Callable[[], Made]


class Bench:
    """Prunes, recovers and measures one model of a study.

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
        self._observations: dict[str, Observations] = {}  # the last, by the fingerprint of the calibration
        log_device(study.device, self.dense.dtype)

    def cells(self, first: bool = True) -> Iterator[tuple[int, Cell]]:
        """Computes the dense model, then each pruning with its recoveries, except those that other processes compute.

        Args:
            first: Whether to wait at the end for the others; their results are then read, or computed if they failed.

        Returns:
            Each cell with the index of the part that it belongs to: 0 for the dense model, then that of the pruning.
        """
        left, wait = dict(enumerate([None, *self.study.prunings()])), False
        key = functools.cache(lambda part: self.key(left[part]))
        while left:
            for part, pruning in left.items():
                with self.cache.lock(key(part), wait) as own:
                    if own:
                        yield from ((part, cell) for cell in self._part(key(part), pruning))
                        break
            else:
                if not first:
                    return
                log.info("waiting for other processes, which compute the remaining cells")
                wait = True
                continue
            del left[part]
            wait = False

    def key(self, pruning: Pruning | None) -> Key:
        """Everything that the results of a pruning depend on, or those of the dense model."""
        if pruning is None:
            return self._common
        calibration = self._calibration(pruning).fingerprint
        return self._common | {"calibration": calibration, "seed": pruning.seed, "method": identity(pruning.request)}

    @functools.cached_property
    def _common(self) -> Key:
        """The key of the dense model, which is part of all others."""
        dtype = str(self.dense.dtype).removeprefix("torch.")
        common = {"weights": self.weights, "dtype": dtype, "device": self.study.device.type}
        common |= {name: version(name) for name in ("plprune", "torch", "transformers")}
        bench = Path(__file__).read_text(encoding="utf-8")
        return common | {"source": digest({"bench": bench, "models": source_digest("plprune.checkpoint.load")})}

    def _part(self, key: Key, pruning: Pruning | None) -> Iterator[Cell]:
        """The cells of the dense model, or of a pruning and its recoveries, which share the pruned model."""
        if pruning is None:
            sizes = dict(zip(("block_parameters", "parameters"), parameters(self.dense), strict=True))
            measured = self._speed(key, self._dense) | self._quality(key, self._dense)
            yield self._head("dense", "dense", 0.0, None) | sizes | measured
            return
        method = pruning.request.method
        head = self._head(type(method).__name__, "pruned", method.sparsity, pruning.seed)
        head |= {"calibration": pruning.text.name, "settings": pruning.request.settings}
        pruned = functools.cache(lambda: self._prune(pruning))
        facts = self._facts(key, pruned)
        yield self._measured(head | facts, key, pruned)
        for training, made_by in zip(self.study.recoveries, self._trainings, strict=True):
            by = key | {"recover": made_by, "by": source_digest(*TRAINING)}
            by |= {name: version(name) for name in ("lightning", "peft")}
            if training.rounds > 1:
                make = functools.cache(functools.partial(self._in_rounds, pruning, training))
                own = self._facts(by, make)
            else:
                make = functools.cache(functools.partial(self._recovered, pruned, pruning.seed, training))
                own = facts if "error" in facts else facts | self._seconds(facts, by, make)
            yield self._measured(head | {"stage": training.name} | own, by, make)

    def _head(self, method: str, stage: str, sparsity: float, seed: int | None) -> Cell:
        model = self.study.labels[self.name]
        return {"model": model, "method": method, "stage": stage, "sparsity": sparsity, "seed": seed}

    def _seconds(self, facts: Cell, key: Key, make: Make) -> Cell:
        """The seconds of a pruning and its recovery."""
        return {"seconds": facts["seconds"] | self.cache.get(key | {"result": "recovery"}, lambda: make().seconds)}

    def _facts(self, key: Key, make: Make) -> Cell:
        """The sizes that a pruning led to, and the speed, which recovery does not change; or why it failed."""
        try:
            facts = self.cache.get(key | {"result": "plan"}, lambda: self._sizes(make()))
        except (ValueError, RuntimeError) as error:  # such as of linear algebra, or of memory
            log.warning("%s at sparsity %s: %s", key["method"]["class"], key["method"]["sparsity"], error)
            return {"error": " ".join(str(error).split())}
        return facts | self._speed(key, make)

    def _sizes(self, made: Made) -> Cell:
        model, plan, seconds = made
        assert plan is not None
        blocks = blocks_of(model)
        heads = [block.kv_heads if block.has_attention else 0 for block in blocks]
        return {
            "reached": 1 - sum(plan.after) / parameters(self.dense)[0],
            "block_parameters": sum(plan.after),
            "parameters": sum(plan.after) + plan.rest,
            "widths": {"attention": heads, "ffn": [block.channels for block in blocks]},
            "importance": plan.importance[plan.remaining].tolist(),
            "settings": plan.settings,
            "seconds": seconds,
        }

    def _dense(self) -> Made:
        return Made(self.dense, None, {})

    def _prune(self, pruning: Pruning, model: PreTrainedModel | None = None) -> Made:
        """Prunes a copy of a model; of the dense one if not given."""
        calibration, model = self._observed(pruning), deepcopy(self.dense if model is None else model)
        start = time.perf_counter()
        plan = pruning.request.prune(model, calibration, pruning.seed)
        return Made(model, plan, {"prune": time.perf_counter() - start})

    def _recovered(self, pruned: Make, seed: int, training: Training) -> Made:
        return self._recover(pruned().model, seed, training)

    def _in_rounds(self, pruning: Pruning, training: Training) -> Made:
        """Prunes and recovers the dense model in turns, with the training text in another order at each turn."""
        model, plan, dense = self.dense, None, parameters(self.dense)[0]
        method, seconds = pruning.request.method, {"prune": 0.0, "recover": 0.0}
        rounds = schedule(method.sparsity, training.steps, training.rounds, lambda _: parameters(model)[0] / dense)
        for each in rounds:
            request = dataclasses.replace(pruning.request, method=dataclasses.replace(method, sparsity=each.sparsity))
            model, plan, pruning_time = self._prune(Pruning(pruning.text, pruning.seed, request), model)
            steps = dataclasses.replace(training, steps=each.steps)
            model, _, recovery_time = self._recover(model, pruning.seed + APART * each.index, steps)
            seconds = {name: seconds[name] + value for name, value in (pruning_time | recovery_time).items()}
        return Made(model, plan, seconds)

    def _recover(self, model: PreTrainedModel, seed: int, training: Training) -> Made:
        """Recovers a model and merges the adapters; the model goes through a folder, as a user's would."""
        start, study, distill = time.perf_counter(), self.study, training.distill
        if distill and not distill.teacher:
            distill = dataclasses.replace(distill, teacher=self.name)
        settings: dict[str, Any] = {"learning_rate": training.learning_rate, "train": training.train}
        text: dict[str, Any] = {
            "seq_len": training.seq_len,
            "batch_size": training.batch_size,
            "max_dropped": study.max_dropped,
        }
        with tempfile.TemporaryDirectory(prefix="plprune-") as room:
            save_pruned(model, Path(room) / "model", self.tokenizer)
            pl.seed_everything(seed, verbose=False)
            module = Recovery(str(Path(room) / "model"), study.dtype, training.lora, distill=distill, **settings)
            data = RecoveryData(training.text, seed=seed, bos=study.protocol.bos, **text)
            with quietly():
                trainer(study.device, training.steps, self.folder).fit(module, datamodule=data)
        recovered = rebuild(module.model, dict(merged_state(module.model, lambda p: p.detach().cpu())))
        return Made(recovered, None, {"recover": time.perf_counter() - start})

    def _calibration(self, pruning: Pruning) -> Calibration:
        """The calibration windows of a pruning."""
        text, seed = pruning.text, pruning.seed
        if (text, seed) not in self._calibrations:
            ids = self._ids(text.text, self.study.join, seed)
            windows = draw(ids, text.num_samples, text.seq_len, seed, self.bos)
            self._calibrations[text, seed] = Calibration(list(windows.split(8)), self.study.device)
        return self._calibrations[text, seed]

    def _observed(self, pruning: Pruning) -> Calibration:
        """The calibration windows with observations of the dense model on them, which are made once."""
        calibration = self._calibration(pruning)
        if calibration.fingerprint not in self._observations:
            name = f"{self.weights}-{calibration.fingerprint}-{source_digest('plprune.pruning.observations')}"
            file = self.folder / "observations" / f"{name}.safetensors"
            with file_lock(file.parent / "locks" / name, wait=True):
                if not file.exists():
                    save(survey(self.dense, calibration), file)
            self._observations = {calibration.fingerprint: load(file, self.study.device)}
        return dataclasses.replace(calibration, known=self._observations[calibration.fingerprint])

    def _ids(self, source: str, join: str | None = None, seed: int | None = None) -> Tensor:  # [tokens]
        ids, _ = tokenised(source, self.tokenizer, join, seed=seed, max_dropped=self.study.max_dropped)
        check_ids(self.dense, [ids], self.tokenizer)
        return ids

    @functools.cached_property
    def _trainings(self) -> list[Key]:
        """The keys of the recoveries: the tokens of their texts, and their settings except the name."""
        settings = [dataclasses.asdict(training) for training in self.study.recoveries]
        texts = {source: _text_key([self._ids(source)]) for source in {each["text"] for each in settings}}
        keys = [{k: v for k, v in each.items() if k != "name" and (k, v) != ("rounds", 1)} for each in settings]
        return [each | {"text": texts[each["text"]], "bos": self.bos} for each in keys]

    def _measured(self, cell: Cell, key: Key, make: Make) -> Cell:
        """The cell with its quality, and with the paired differences of task scores from the dense model's."""
        if "error" in cell:
            return cell
        quality = self._quality(key, make)
        for name, result in quality.get("tasks", {}).items():
            difference = paired(TaskResult(**self._dense_tasks[name]), TaskResult(**result))
            if difference is not None:
                result |= {"difference": difference.value, "difference_stderr": difference.stderr}
        return cell | quality | {"seconds": cell["seconds"] | quality["seconds"]}

    @functools.cached_property
    def _dense_tasks(self) -> Cell:
        """The task scores of the dense model; waits for a process that computes them."""
        with self.cache.lock(self._common, wait=True):
            return self._quality(self._common, self._dense)["tasks"]

    def _quality(self, key: Key, make: Make) -> Cell:
        """Everything that the study measures except speed; each result is cached by itself."""
        cell, *others = (self._perplexity(key, make, each) for each in self.passages.values())
        if others:
            cell["seconds"]["evaluate"] += sum(each.pop("seconds")["evaluate"] for each in others)
            cell["texts"] = dict(zip(list(self.passages)[1:], others, strict=True))
        return cell | (self._tasks(key, make) if self.study.tasks else {})

    def _perplexity(self, key: Key, make: Make, text: Passage) -> Cell:
        def measure() -> Cell:
            model, start = self._placed(make), time.perf_counter()
            quality = dataclasses.asdict(judge(model, text))
            return quality | {"seconds": {"evaluate": time.perf_counter() - start}}

        key = key | {"text": _text_key(text.windows), "protocol": dataclasses.asdict(self.study.protocol)}
        key |= {"by": source_digest("plprune.evaluation.measurement"), "result": "quality"}
        return self.cache.get(key, measure)

    def _tasks(self, key: Key, make: Make) -> Cell:
        study, bos, tasks = self.study, self.study.protocol.bos, {}
        data = study.task_data and str(Path(study.task_data).resolve())
        key = key | {"limit": study.limit, "bos": bos, "data": data}
        key |= {"lm_eval": version("lm_eval"), "by": source_digest("plprune.evaluation.lm_eval")}

        def run(name: str) -> Cell:
            results = run_tasks(self._placed(make), self.tokenizer, [name], study.limit, study.task_data, bos=bos)
            return {task: dataclasses.asdict(result) for task, result in results.items()}

        for name in study.tasks:
            tasks |= self.cache.get(key | {"tasks": name}, functools.partial(run, name))
        results = {name: TaskResult(**result) for name, result in tasks.items()}
        mean = average(results[name] for name in counted(results))
        return {"tasks": tasks} | ({} if mean is None else {"average": mean.value, "average_stderr": mean.stderr})

    def _speed(self, key: Key, make: Make) -> Cell:
        """The speed if the study asks for it, without the peak of memory, which would include the dense model."""
        if self.study.max_batch is None:
            return {}

        def measure() -> Cell:
            measured = measure_speed(self._placed(make), max_batch=self.study.max_batch)
            return dataclasses.asdict(measured) | {"peak": None, "saturated_peak": None}

        key = key | {"machine": machine() | {"host": platform.node()}, "max_batch": self.study.max_batch}
        return {"speed": self.cache.get(key | {"by": source_digest("plprune.evaluation.speed")}, measure)}

    def _placed(self, make: Make) -> PreTrainedModel:
        return make().model.to(self.study.device)  # type: ignore[arg-type]


def trainer(device: torch.device, steps: int, folder: Path) -> pl.Trainer:
    """A Trainer that writes nothing but a teacher's answers, which go to the folder for all cells."""
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
    """Silences everything below warnings of the many trainings."""
    levels = {logger: logger.level for logger in map(logging.getLogger, CHATTY)}
    try:
        for logger in levels:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def identity(request: Request) -> Key:
    """The key of a pruning: the method, all settings, and the source of the method and of everything below it."""
    return {"class": type(request.method).__qualname__, "source": source_of(request.method)} | request.settings


def machine() -> dict[str, Any]:
    """The machine that times are measured on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": platform.machine(), "threads": torch.get_num_threads()} | gpu


def _text_key(ids: list[Tensor]) -> str:
    return fingerprint([("ids", torch.cat([each.flatten() for each in ids]))], values=1 << 30)
