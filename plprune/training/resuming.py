"""Which run a checkpoint belongs to: nothing of one run goes on in another without a word.

A run is what was asked of its module, its data and its trainer, by the names of the options. All of it counts but what
:data:`FREE` lists. A text counts by the windows that were made of it and a model by its weights, wherever they are.
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
Run = dict[str, Any]  # values of options by their names; of texts and models, where they are and what they hold

FREE = {  # what may be another when a run goes on; a data module's texts and a module's model count by their content
    "model": {"name_or_path", "dtype", "gradient_checkpointing"},
    "data": {"train", "validation", "test", "calibration", "tokenizer", "num_workers"}
    | {"num_samples", "calibration_seq_len", "calibration_batch_size"},  # by which the plan was made, which counts
    "trainer": {
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "plugins",
        "sync_batchnorm",
        "use_distributed_sampler",
    }
    | {"max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run"}
    | {"logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"}
    | {"limit_val_batches", "limit_test_batches", "limit_predict_batches", "num_sanity_val_steps"}
    | {"val_check_interval", "check_val_every_n_epoch", "inference_mode", "reload_dataloaders_every_n_epochs"}
    | {"deterministic", "benchmark", "detect_anomaly", "profiler", "barebones"}
    | {"default_root_dir", "enable_autolog_hparams", "model_registry"}
    | {"callbacks"},  # which only watch: `Recovery` refuses those that train
}

COUNTED = ("precision", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "overfit_batches")
COUNTED += ("accumulate_grad_batches",)
LENGTH = ("trainer.max_steps", "trainer.max_epochs")  # which decides on the learning rate
JUDGED = ("model.lora", "model.train")  # what a model that is only measured depends on


def asked(trainer: pl.Trainer, module: Any, data: Any, contents: Mapping[str, str | None] = {}) -> Run:
    """The run that is asked for.

    Args:
        trainer: Its trainer.
        module: Its module, a `Recovery` or like one.
        data: Its data module, if it has one.
        contents: Hashes of what texts and models hold, by the names of their options, as far as they are known.
    """
    run: Run = {"processes": trainer.num_nodes * trainer.num_devices}
    run |= _options("model", module if hasattr(module, "check_checkpoint") else None)
    run |= _options("data", data if hasattr(data, "fingerprint") else None)
    run |= {f"trainer.{name}": value for name, value in length(trainer).items()}
    run |= {f"trainer.{name}": _plain(getattr(trainer, name)) for name in COUNTED}
    own: list[Any] = list(getattr(trainer, "callbacks", []))
    requests = [each.request for each in own if isinstance(getattr(each, "request", None), Request)]
    run |= _request(requests[0]) if requests else _setting("method", None)
    named = dict(getattr(data, "sources", {}))
    places = {"model.name_or_path": getattr(module, "name_or_path", None)}
    places |= {f"data.{part}": named.get(part) for part in ("train", "validation")}
    places |= {"model.distill.teacher": run["model.distill.teacher"]} if run.get("model.distill") else {}
    return run | {name: {"at": at, "content": contents.get(name)} for name, at in places.items()}


def length(trainer: pl.Trainer) -> dict[str, int]:
    """How long a trainer is to train at most, as Lightning sees it."""
    without = 1000 if trainer.max_steps == -1 else -1  # what Lightning takes for a max_epochs of None
    return {"max_steps": trainer.max_steps, "max_epochs": without if trainer.max_epochs is None else trainer.max_epochs}


def check(there: Run, here: Run, whole: bool = True) -> None:
    """Makes sure that what was written by one run is gone on with by the same.

    Args:
        there: The run that wrote it.
        here: The run that reads it.
        whole: Whether it is to be trained, and not only measured.

    Raises:
        ValueError: It is another.
    """
    names = [name for name in here if name in there and not _alike(there[name], here[name])]
    free = {"processes", *LENGTH}
    if there.get("processes") != here.get("processes") and _windows(there) == _windows(here) is not None:
        free |= {"data.batch_size", "trainer.accumulate_grad_batches"}  # the steps are the same
    other = [name for name in names if name not in free and (whole or name.startswith(JUDGED))]
    other = [name for name in other if not isinstance(here[name], dict)] or other  # settings say why contents differ
    if other:
        each = [
            f"{name} is {_described(here[name])}, that of the checkpoint is {_described(there[name])}" for name in other
        ]
        raise ValueError(
            f"this run's {'; '.join(each)}: give what it was trained with, or start without it (without --resume)"
        )
    for name in names if whole else ():
        if name in LENGTH:
            log.warning(
                "this run's %s is %s, that of the checkpoint is %s: it goes on at the learning rate that a run of this "
                "length has by then, and does not end where one from the start would",
                *(name, here[name], there[name]),
            )


def check_kind(checkpoint: dict[str, Any], training: bool) -> dict[str, Any]:
    """What `Recovery` wrote into a checkpoint.

    Raises:
        ValueError: It wrote nothing there, or the checkpoint holds weights only and is to be trained on.
    """
    own = checkpoint.get("plprune")
    if own is None:
        raise ValueError("the checkpoint was not written by plprune.Recovery: name another with --ckpt_path")
    if training and "lr_schedulers" not in checkpoint:
        raise ValueError("the checkpoint holds weights only, which cannot be trained on: name another --ckpt_path")
    return own


def check_trained(checkpoint: dict[str, Any], base: dict[str, Any], trained: dict[str, list[int]]) -> None:
    """Makes sure that a checkpoint holds the parameters that are trained here, trained on the same base.

    Args:
        checkpoint: The checkpoint.
        base: Hashes of the base model's weights and plan.
        trained: The shapes of the trained parameters, by name.

    Raises:
        ValueError: It does not.
    """
    own = checkpoint["plprune"]
    if own["base"] != base:
        raise ValueError(
            f"the checkpoint was trained on another base model or plan ({own['base']}) than this run's "
            f"({base}): use the settings it was trained with, or start without it"
        )
    there = own["trained"]
    state = checkpoint.get("state_dict", checkpoint.get("module", there))  # DeepSpeed calls it module
    unlike = [name for name in trained | there if trained.get(name) != there.get(name) or name not in state]
    if unlike:
        raise ValueError(
            f"the checkpoint and this run do not train the same parameters ({min(unlike)} differs or is missing): "
            "use the settings it was trained with (model.lora, model.train), or another checkpoint"
        )


def _options(kind: str, owner: Any) -> Run:
    """What was given for the options of an object, which are those of its class."""
    found: Run = {}
    for name in inspect.signature(type(owner)).parameters if owner is not None else ():
        if name not in FREE[kind]:
            found |= _setting(f"{kind}.{name}", getattr(owner, "trains" if name == "train" else name, None))
    return found


def _setting(name: str, value: Any) -> Run:
    """A setting, and those that it consists of."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {name: _plain(value)}
    inner = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return {name: type(value).__name__} | {f"{name}.{key}": _plain(each) for key, each in inner.items()}


def _request(request: Request) -> Run:
    """What was asked of a pruning."""
    place = {"serve_on": _plain(list(request.serve_on)), "tensor_parallel": request.tensor_parallel}
    return _setting("method", request.method) | _setting("target", request.target) | place


def _plain(value: Any) -> Any:
    """A value that a checkpoint can hold without a class."""
    return value if type(value) in (type(None), bool, int, float, str) else str(value)


def _alike(there: Any, here: Any) -> bool:
    if not isinstance(here, dict):
        return there == here
    by = "content" if there["content"] and here["content"] else "at"
    return there[by] == here[by]


def _described(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    place = value["at"] or "not given"
    return f"{place} ({value['content']})" if value["content"] else place


def _windows(run: Run) -> int | None:
    """Windows of a step of the optimizer, of all processes together, if that can be told."""
    sizes: list[Any] = [run.get(n) for n in ("processes", "data.batch_size", "trainer.accumulate_grad_batches")]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
