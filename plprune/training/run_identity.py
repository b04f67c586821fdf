"""Identifies the run that a checkpoint belongs to, so that no run continues from another run's checkpoint.

A run is identified by the options of its module, data module and trainer, except those in :data:`FREE`. A text is
identified by its windows and a model by its weights, wherever they are stored.
"""

import dataclasses
import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from plprune.methods.run import Request

log = logging.getLogger(__name__)
Run = dict[str, Any]  # values by option name; for texts and models, their place and a hash of their content

FREE = {  # options that may change when a run is resumed; texts and models are compared by their content
    "model": {"name_or_path", "dtype", "gradient_checkpointing", "compile", "trust_remote_code"},
    "data": {"train", "validation", "test", "calibration", "tokenizer", "num_workers"}
    | {"num_samples", "calibration_seq_len", "calibration_batch_size"},  # the plan depends on these, and is compared
    "trainer": {"accelerator", "strategy", "devices", "num_nodes", "plugins", "sync_batchnorm"}
    | {"max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run", "use_distributed_sampler"}
    | {"logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"}
    | {"limit_val_batches", "limit_test_batches", "limit_predict_batches", "num_sanity_val_steps"}
    | {"val_check_interval", "check_val_every_n_epoch", "inference_mode", "reload_dataloaders_every_n_epochs"}
    | {"deterministic", "benchmark", "detect_anomaly", "profiler", "barebones"}
    | {"default_root_dir", "enable_autolog_hparams", "model_registry"}
    | {"callbacks"},  # `Recovery` refuses callbacks that influence training
}
TRAINER = ("precision", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "overfit_batches")
TRAINER += ("accumulate_grad_batches",)  # options of the trainer that identify a run
LENGTH = ("trainer.max_steps", "trainer.max_epochs")  # the learning rate depends on these
EVALUATION = ("model.lora", "model.train")  # the only options that the evaluation of a checkpoint depends on


def identify(trainer: pl.Trainer, module: Any, data: Any, contents: Mapping[str, str | None] = {}) -> Run:
    """Collects the options that identify a run.

    Args:
        trainer: The trainer.
        module: A `Recovery`; of any other module nothing is collected.
        data: A `RecoveryData`; of any other data module nothing is collected.
        contents: Hashes of the texts and models that are loaded, by option name.
    """
    run: Run = {"processes": trainer.num_nodes * trainer.num_devices}
    run |= _options("model", module if hasattr(module, "check_checkpoint") else None)
    run |= _options("data", data if hasattr(data, "fingerprint") else None)
    run |= {f"trainer.{name}": value for name, value in training_length(trainer).items()}
    run |= {f"trainer.{name}": _plain(getattr(trainer, name)) for name in TRAINER}
    callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
    requests = [each.request for each in callbacks if isinstance(getattr(each, "request", None), Request)]
    run |= _request(requests[0]) if requests else _setting("method", None)
    sources = dict(getattr(data, "sources", {}))
    places = {"model.name_or_path": getattr(module, "name_or_path", None)}
    places |= {f"data.{part}": sources.get(part) for part in ("train", "validation")}
    places |= {"model.distill.teacher": run["model.distill.teacher"]} if run.get("model.distill") else {}
    return run | {name: {"at": place, "content": contents.get(name)} for name, place in places.items()}


def training_length(trainer: pl.Trainer) -> dict[str, int]:
    """The longest training that a trainer allows, with the defaults that Lightning fills in."""
    epochs = 1000 if trainer.max_steps == -1 else -1  # Lightning's max_epochs if none is given
    return {"max_steps": trainer.max_steps, "max_epochs": epochs if trainer.max_epochs is None else trainer.max_epochs}


def check_same_run(saved: Run, current: Run, training: bool = True) -> None:
    """Checks that a run may use a checkpoint; warns if the run has another length than the checkpoint's.

    Args:
        saved: The run that wrote the checkpoint.
        current: The run that reads it.
        training: Whether it trains; an evaluation depends on fewer options.

    Raises:
        ValueError: The runs differ in an option that must not change.
    """
    differing = [name for name in current if name in saved and not _equal(saved[name], current[name])]
    free = {"processes", *LENGTH}
    if saved.get("processes") != current.get("processes") and _windows(saved) == _windows(current) is not None:
        free |= {"data.batch_size", "trainer.accumulate_grad_batches"}  # the steps are the same
    refused = [name for name in differing if name not in free and (training or name.startswith(EVALUATION))]
    refused = [name for name in refused if not isinstance(current[name], dict)] or refused  # settings explain contents
    if refused:
        values = [f"{n} is {_described(current[n])}, the checkpoint's is {_described(saved[n])}" for n in refused]
        raise ValueError(
            f"this run's {'; '.join(values)}: use the settings the checkpoint was trained with, or start without it "
            "(without --resume)"
        )
    for name in differing if training else ():
        if name in LENGTH:
            log.warning(
                "this run's %s is %s, the checkpoint's is %s: training continues at the learning rate that a run of "
                "the new length has at this step, and does not end where a run from the start would",
                *(name, current[name], saved[name]),
            )


def check_written_by_recovery(checkpoint: Any, training: bool, name: str = "the checkpoint") -> dict[str, Any]:
    """Checks that `Recovery` wrote a checkpoint and, for training, that it holds more than weights.

    Args:
        checkpoint: The content of the file.
        training: Whether it is trained further.
        name: The name of the checkpoint in error messages.

    Returns:
        The entry that `Recovery` wrote into it.

    Raises:
        ValueError: It did not, or the checkpoint holds weights only.
    """
    if not isinstance(checkpoint, dict) or checkpoint.get("plprune") is None:
        raise ValueError(f"{name} was not written by plprune.Recovery: give another one with --ckpt_path")
    if training and "lr_schedulers" not in checkpoint:
        raise ValueError(f"{name} holds weights only, which cannot be trained on: give another one with --ckpt_path")
    return checkpoint["plprune"]


def check_parameters(checkpoint: dict[str, Any], base: dict[str, Any], trained: dict[str, list[int]]) -> None:
    """Checks that a checkpoint has the same base model and trains the same parameters as this run.

    Args:
        checkpoint: The checkpoint.
        base: Hashes of the base model's weights and plan.
        trained: The shapes of the trained parameters, by name.

    Raises:
        ValueError: It does not.
    """
    saved = checkpoint["plprune"]
    if saved["base"] != base:
        raise ValueError(
            f"the checkpoint was trained on another base model or plan ({saved['base']}) than this run's "
            f"({base}): use the settings it was trained with, or start without it"
        )
    shapes = saved["trained"]
    state = checkpoint.get("state_dict", checkpoint.get("module", shapes))  # DeepSpeed calls it module
    unlike = [name for name in trained | shapes if trained.get(name) != shapes.get(name) or name not in state]
    if unlike:
        raise ValueError(
            f"the checkpoint and this run do not train the same parameters ({min(unlike)} differs or is missing): "
            "use the settings it was trained with (model.lora, model.train), or another checkpoint"
        )


def _options(kind: str, owner: Any) -> Run:
    """The values of the options of an object's class that identify a run."""
    options: Run = {}
    for name in inspect.signature(type(owner)).parameters if owner is not None else ():
        if name not in FREE[kind]:
            options |= _setting(f"{kind}.{name}", getattr(owner, "trains" if name == "train" else name, None))
    return options


def _setting(name: str, value: Any) -> Run:
    """A setting by its name; a dataclass becomes its class, and a setting for each field."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {name: _plain(value)}
    inner = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return {name: type(value).__name__} | {f"{name}.{key}": _plain(each) for key, each in inner.items()}


def _request(request: Request) -> Run:
    serving = {"serve_on": _plain(list(request.serve_on)), "tensor_parallel": request.tensor_parallel}
    return _setting("method", request.method) | _setting("target", request.target) | serving


def _plain(value: Any) -> Any:
    """A value that can be saved without pickling a class."""
    return value if type(value) in (type(None), bool, int, float, str) else str(value)


def _equal(saved: Any, current: Any) -> bool:
    if not isinstance(current, dict):
        return saved == current
    key = "content" if saved["content"] and current["content"] else "at"
    return saved[key] == current[key]


def _described(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    place = value["at"] or "not given"
    return f"{place} ({value['content']})" if value["content"] else place


def _windows(run: Run) -> int | None:
    """The number of windows in an optimizer step over all processes, if it is known."""
    sizes: list[Any] = [run.get(n) for n in ("processes", "data.batch_size", "trainer.accumulate_grad_batches")]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
