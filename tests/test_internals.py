"""Private parts of other libraries: each library's are used in one module, and one that is gone is named."""

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.precision import amp
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer import call
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import moe

import plprune
from plprune.training import compilation, deepspeed_internals

ROOT = Path(plprune.__file__).parent
INSIDE = {  # where private parts may be used, and of which library
    "lightning_internals": "lightning",
    "deepspeed_internals": "deepspeed",
    "compilation": "torch",
    "probing": "transformers",
    "stored": "transformers",
    "expert_inputs": "transformers",
    "modeling_plprune": "transformers",  # which stands beside models, and imports nothing of plprune
}
USED = [
    "trainer._signal_connector._has_already_handler",
    "trainer._signal_connector._sigterm_notifier_fn",
    "trainer._accelerator_connector.cluster_environment",
    "trainer._logger_connector.should_update_logs",
    "trainer._logger_connector._callback_metrics",
    "trainer.fit_loop._data_fetcher",
    "trainer.fit_loop._data_source.instance",
    "trainer.fit_loop.epoch_loop._should_check_val_fx",
    "trainer.fit_loop.epoch_loop._num_ready_batches_reached",
    "call._call_callback_hooks",
    "ModelCheckpoint._find_last_checkpoints",
    "Timer._duration",
    "BatchSizeFinder._early_exit",
    "LearningRateFinder._early_exit",
    "ModelParallelStrategy._data_parallel_size",
    "LightningCLI._prepare_subcommand_parser",
    "LightningCLI._prepare_subcommand_kwargs",
    "LightningCLI._run_subcommand",
    "LightningCLI._parse_ckpt_path",
    "LightningCLI._parser",
    "RichProgressBar._get_train_description",
    "ExperimentWriter._check_log_dir_exists",
    "CSVLogger._experiment",
]
LIBRARIES = ("lightning", "transformers", "deepspeed", "peft", "torch")
OTHERS = {"_exit", "_live_stack"}  # of Python, and of Rich
READ = "_step_supports_amp_scaling"  # which Lightning looks for on an optimizer


@functools.cache
def owners() -> dict[str, Any]:
    """What has the private parts of Lightning."""
    return {
        "trainer": pl.Trainer(accelerator="cpu", barebones=True),
        "call": call,
        "LightningCLI": LightningCLI,
        "ModelCheckpoint": ModelCheckpoint,
        "RichProgressBar": RichProgressBar,
        "ExperimentWriter": ExperimentWriter,
        "BatchSizeFinder": BatchSizeFinder(),
        "LearningRateFinder": LearningRateFinder(),
        "Timer": Timer(),
        "CSVLogger": CSVLogger("."),
        "ModelParallelStrategy": ModelParallelStrategy(),
    }


@pytest.mark.parametrize("path", USED)
def test_lightning_still_has(path: str) -> None:
    first, *names = path.split(".")
    owner = owners()[first]
    for name in names:
        assert hasattr(owner, name), f"Lightning {version('lightning')} has no {path}: mend lightning_internals.py"
        owner = getattr(owner, name)


def test_all_that_is_used_of_lightning_is_looked_for() -> None:
    looked_for = {name for path in USED for name in path.split(".") if private(name)}
    assert set(touched(ROOT / "training/lightning_internals.py", own=False)) == looked_for | {READ}
    assert READ in inspect.getsource(amp), f"Lightning {version('lightning')} clips without {READ}"


def test_other_libraries_still_have() -> None:
    assert hasattr(PreTrainedModel, "_from_config"), f"transformers {version('transformers')} has no _from_config"
    assert hasattr(PreTrainedConfig(), "_experts_implementation"), f"transformers {version('transformers')}"
    assert "_apply_gate" in inspect.getsource(moe), f"transformers {version('transformers')} has no _apply_gate"
    folder = Path((importlib.util.find_spec("deepspeed").submodule_search_locations or [""])[0])  # type: ignore[union-attr]
    engine, operations = (folder / file for file in ("runtime/engine.py", "ops/__init__.py"))
    assert f"def {deepspeed_internals.COPY_SCRIPT}(" in engine.read_text(), f"DeepSpeed {version('deepspeed')}"
    assert "__compatible_ops__" in operations.read_text(), f"DeepSpeed {version('deepspeed')}"
    for name in compilation.SETTINGS:
        assert hasattr(compilation.dynamo.config, name), f"torch {version('torch')} has no dynamo.config.{name}"
    assert hasattr(compilation.dynamo, "maybe_mark_dynamic"), f"torch {version('torch')} has no maybe_mark_dynamic"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_touches_a_private_part(path: Path) -> None:
    if path.stem not in INSIDE:
        assert set(touched(path)) == set()


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def touched(path: Path, own: bool = True) -> Iterator[str]:
    """Private names that a module uses of others: by import, of an object, or in a subclass of theirs.

    Args:
        path: The module.
        own: Whether names that the module itself has are its own.
    """
    tree = ast.parse(path.read_text())
    there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef) and own}
    there |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and of_self(node) and own}
    there |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("plprune"):
            names = [*(node.module or "").split("."), *(each.name for each in node.names)]
        elif isinstance(node, ast.Import):
            names = [name for each in node.names for name in each.name.split(".")]
        elif isinstance(node, ast.Attribute) and not of_self(node):
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        else:
            continue
        yield from (name for name in names if private(name) and name not in there | OTHERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from inherited(getattr(import_module(module_of(path)), node.name, object), node)


def inherited(kind: type, tree: ast.ClassDef) -> set[str]:
    """Private names of a class of ours that a class of the libraries has as well."""
    used = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
    used |= {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
    theirs = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
    return {name for name in used if private(name) and any(name in names_of(base) for base in theirs)}


@functools.cache
def names_of(kind: type) -> set[str]:
    """The attributes of a class, and those that it gives its objects."""
    return {*vars(kind), *re.findall(r"self\.(_\w+)", inspect.getsource(kind))}


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def module_of(path: Path) -> str:
    return ".".join(["plprune", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
