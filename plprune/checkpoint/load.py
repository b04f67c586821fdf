"""Loads dense and pruned models, their structure alone, and their tokenizers.

No file is unpickled into objects, and no code of a checkpoint is executed.
"""

import contextlib
import copy
import functools
import importlib
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
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

from plprune.architecture.discovery import check_supported
from plprune.architecture.modeling_plprune import Gather, PrunedForCausalLM, Scatter
from plprune.architecture.modules import saved_buffers, says_tied, set_parameter, tie, tied
from plprune.architecture.wrappers import auto_class
from plprune.checkpoint.locate import cached_folder, check_no_adapter, download, resolve_path
from plprune.checkpoint.remote_code import check_allowed, is_allowed
from plprune.checkpoint.stock_config import config_from, make_savable, pruned_skeleton, skeleton
from plprune.checkpoint.stored import Dtype, ModelWeights, StoredWeights, own_dtypes
from plprune.checkpoint.weights import INDEX, SINGLE, are_untied, has_untied_head, open_safetensors
from plprune.pruning import surgery
from plprune.pruning.plan import FILE, PruningPlan
from plprune.pruning.surgery import plan_of

log = logging.getLogger(__name__)
REPAIRED = "repaired.safetensors"


def load_model(name_or_path: str, dtype: Dtype | None = None) -> PreTrainedModel:
    """Loads a causal language model, dense or pruned, onto the CPU.

    Args:
        name_or_path: A name on the hub, a folder (a pruned one too), a `.gguf` file, which is dequantised, or
            `package://PACKAGE/FILE.gguf` for a file inside an installed Python package.
        dtype: Of the weights in memory; as stored if not given, and float32 for a `.gguf` file.

    Raises:
        ValueError: The model does not exist, its family is not supported, its files are damaged, or its weights are
            stored in a format other than one of these dtypes, FP8 or MXFP4.
    """
    path = resolve_path(name_or_path)
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", FILE)):
        raise ValueError(f"{path} is not a model: it has no config.json")
    with _one_line_errors(f"a model from {name_or_path}", f", a pruned one only together with its {FILE}"):
        stored = stored_weights(name_or_path)
        dtype = resolve_dtype(stored, dtype)
        if path.suffix == ".gguf":
            return _load_gguf(name_or_path, path, getattr(torch, dtype))
        if (path / FILE).exists():
            return load_pruned(path, dtype)
        return _load_dense(stored, dtype)


def stored_weights(name_or_path: str, fetch: bool = True) -> StoredWeights:
    """Lists how the weights of a model are stored.

    Args:
        name_or_path: As for :func:`load_model`.
        fetch: Whether to download weights from the hub; else only `config.json` is read.

    Raises:
        ValueError: The model does not exist, is damaged, or is stored in a format that cannot be pruned.
    """
    path = resolve_path(name_or_path)
    if path.suffix == ".gguf":
        return StoredWeights(name_or_path, None, {"dtype": "float32"})
    if not (path / FILE).exists():
        _read_config(name_or_path)  # report an unsupported family before anything else
    with _one_line_errors(f"a model from {name_or_path}"):
        folder = path if path.is_dir() else download(name_or_path) if fetch else None
        has_config = folder is None or (folder / "config.json").exists()  # a stage has a plan only
        config = PreTrainedConfig.get_config_dict(str(folder or name_or_path))[0] if has_config else {}
        return StoredWeights(name_or_path, folder, config)


def resolve_dtype(stored: StoredWeights, dtype: Dtype | None) -> Dtype:
    """The dtype to load weights in; it is logged if the caller gave none, or the weights are dequantised."""
    resolved = dtype or stored.dtype
    if dtype is None or stored.format:
        origin = f"dequantised from {stored.format}" if stored.format else "as stored"
        log.info("%s: weights in %s, %s", stored.name, resolved, origin)
    return resolved


def load_skeleton(name_or_path: str, dtype: Dtype | None = None) -> PreTrainedModel:
    """Builds the model that :func:`load_model` loads, without its weights: parameters are on the meta device.

    Raises:
        ValueError: The model does not exist, or its family is not supported.
    """
    path = resolve_path(name_or_path)
    torch_dtype = getattr(torch, dtype or stored_weights(name_or_path).dtype)
    with _one_line_errors(f"a model from {name_or_path}"):
        if path.is_dir() and (path / FILE).exists():
            model = pruned_skeleton(_load_plan(path), torch_dtype)
        else:
            model = skeleton(_read_config(name_or_path), torch_dtype)
        folder = cached_folder(path)
        tie(model, says_tied(model.config) and not (folder and has_untied_head(folder, model)))
        if plan_of(model):
            make_savable(model)
    model.config.name_or_path = name_or_path  # as load_model does
    return model.eval()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model, named as for :func:`load_model`."""
    path = resolve_path(name_or_path)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        # transformers reads the family from config.json, and refuses the config.json of many pruned models.
        config = config_from(_load_plan(path).config) if (path / FILE).exists() else None
        name = str(path) if path.is_dir() else name_or_path
        return AutoTokenizer.from_pretrained(name, config=config, trust_remote_code=is_allowed(name_or_path))
    except Exception as error:  # damaged files raise errors of any type
        remedy = (
            "save the base model's there, by AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)"
            if path.exists()
            else "give a folder, a .gguf file, or ORG/NAME of a hub that can be reached"
        )
        raise ValueError(f"cannot load a tokenizer from {name_or_path}: {_first_line(error)}; {remedy}") from error


def load_pruned(folder: str | os.PathLike[str], dtype: Dtype | None = None) -> PreTrainedModel:
    """Loads a model that :func:`save_pruned` has written: the same logits, bit for bit.

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
    plan = _load_plan(folder)
    model = pruned_skeleton(plan, getattr(torch, dtype) if dtype else None)
    with _one_line_errors(f"a model from {folder}"):
        stored = stored_weights(str(folder))
    if not stored.entries:
        raise ValueError(f"{folder / SINGLE} is missing: save the model again")
    _tell_age(folder)
    found = stored.sources(model)
    state = {name: source.make(stored.tensor) for name, source in found.items()}
    used = {key for source in found.values() for key in source.keys}
    state |= {key: stored.tensor(key) for key in stored.entries if key not in used}
    if dtype:  # only of stored tensors: buffers such as the rotary frequencies stay in float32
        own = own_dtypes(model, getattr(torch, dtype))
        state = {name: t.to(own.get(name, t.dtype)) if t.is_floating_point() else t for name, t in state.items()}
    _load_state(model, state, folder)
    read_generation_config(model, folder)
    model.config.name_or_path = str(folder)
    model.config.dtype = model.dtype
    make_savable(model)
    return model.eval()


@functools.cache  # once for a folder
def _tell_age(folder: Path) -> None:
    """Logs that vLLM does not load a folder of an earlier plprune: its config or index lacks what vLLM looks for."""
    names = PreTrainedConfig.get_config_dict(str(folder))[0].get("architectures") or ()
    if PrunedForCausalLM.__name__ in names or not (folder / INDEX).exists():
        log.warning(
            "%s is of an earlier plprune, and vLLM does not load it: `plprune export %s --to hf --output OUT` writes "
            "one that it loads",
            folder,
            folder,
        )


def read_generation_config(model: PreTrainedModel, folder: Path | None) -> None:
    """Gives a model the generation config of a folder that has one."""
    if folder and (folder / "generation_config.json").exists():
        with _one_line_errors(f"a model from {folder}"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def rebuild(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Builds a model of the same structure from a state dict, without reading the weights of `model`.

    Args:
        model: May be sharded, and have adapters.
        state: All parameters, and the saved buffers that do not follow from the plan, on the CPU.

    Raises:
        ValueError: A parameter is missing, or has another shape.
    """
    plan = plan_of(model)
    fresh = pruned_skeleton(plan) if plan else skeleton(copy.deepcopy(model.config))
    fresh.config.tie_word_embeddings = tied(model)
    _load_state(fresh, state, "the model")
    fresh.generation_config, fresh.config.dtype = model.generation_config, fresh.dtype
    fresh.config.name_or_path = model.config.name_or_path
    return fresh.eval()


def load_stage(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PruningPlan:
    """Applies a plan and its repaired values, as :func:`save_stage` has written them, to the model that was pruned.

    Raises:
        ValueError: The files are damaged, or the model is another, or was pruned differently before.
    """
    plan, done = PruningPlan.load(folder), plan_of(model)
    if (done.digest if done else None) != (plan.previous.digest if plan.previous else None):
        raise ValueError(f"{folder} does not continue from this model: load the one that was pruned there")
    with open_safetensors(Path(folder) / REPAIRED) as file:
        surgery.apply(model, plan)
        state = model.state_dict()
        for name in file.keys():  # noqa: SIM118
            state[name].copy_(file.get_tensor(name))
    return plan


def _load_dense(stored: StoredWeights, dtype: Dtype) -> PreTrainedModel:
    if stored.format:  # transformers dequantises on some machines only, and FP8 wrongly where blocks do not fit
        return _load_dequantised(stored, dtype)
    config = _read_config(stored.name)
    loading: Any = auto_class(type(config)).from_pretrained(
        str(stored.folder),
        config=config,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,  # classes are registered
    )
    model, info = loading
    # transformers would leave these weights random.
    wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{stored.name} does not hold the model of its config.json: {min(wrong)} is absent or of another shape; "
            f"get it again, a pruned one together with its {FILE}"
        )
    for parameter in model.parameters():  # transformers may have turned it around without moving its values
        parameter.data = parameter.data.contiguous()
    tie(model, tied(model))  # transformers keeps an untied head, and a config that says it is tied
    model.config.name_or_path = stored.name
    return model


def _load_dequantised(stored: StoredWeights, dtype: Dtype) -> PreTrainedModel:
    model = load_skeleton(stored.name, dtype)
    weights = ModelWeights(stored, model, getattr(torch, dtype))
    for name in [*dict(model.named_parameters()), *saved_buffers(model)]:
        set_parameter(model, name, weights.converted(name))
    model.tie_weights()
    read_generation_config(model, stored.folder)
    return model


def _load_gguf(name: str, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    # Without dequantisation, weights may stay packed, and cannot be sliced.
    quantization = GgufConfig(dequantize=True)
    try:
        with _parsed_once():
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
    check_supported(model.config)
    tie(model, tied(model))
    return model


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Keeps what the package `gguf` parses.

    transformers parses a file twice, and makes the map of all names again for every module: two thirds of the time.
    """
    gguf: Any = importlib.import_module("gguf")
    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in own.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)


def _read_config(name_or_path: str) -> PreTrainedConfig:
    path = resolve_path(name_or_path)
    with _one_line_errors(f"a model from {name_or_path}"):
        if path.suffix == ".gguf":
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        else:
            check_allowed(name_or_path, PreTrainedConfig.get_config_dict(name_or_path)[0])
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    config.__dict__.pop("quantization_config", None)  # weights are dequantised when they are loaded
    check_supported(config)
    return config


def _load_plan(folder: Path) -> PruningPlan:
    plan = PruningPlan.load(folder)
    check_allowed(str(folder), plan.config)
    return plan


def _load_state(model: PreTrainedModel, state: dict[str, torch.Tensor], where: object) -> None:
    """Loads all parameters and saved buffers into a skeleton; `where` they come from is for error messages."""
    expected, state = model.state_dict(), dict(state)
    for name, tensor in list(state.items()):
        shape = tuple(expected[name].shape) if name in expected else "absent"
        if shape == "absent" and name.endswith(".bias") and not tensor.any():
            del state[name]  # a stock class may have more biases than the plan lists
        elif shape != tuple(tensor.shape):
            raise ValueError(
                f"plan and weights of {where} disagree: {name} is {tuple(tensor.shape)} on disk and {shape} by the "
                "plan; save the model again"
            )
    indices = {f"{path}.index": m.index for path, m in model.named_modules() if isinstance(m, Gather | Scatter)}
    for name, index in indices.items():
        if name in state and not torch.equal(index, state[name]):
            raise ValueError(f"plan and weights of {where} disagree: {name} are other channels; save the model again")
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = any(are_untied(state.get(head), state.get(embedding)) for head, embedding in pairs.items())
    model.load_state_dict({name: _aligned(t) for name, t in state.items()}, strict=False, assign=True)
    tie(model, says_tied(model.config) and not untied)
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    absent += [name for name in saved_buffers(model) if name not in {**state, **indices}]
    if absent:
        raise ValueError(f"{where} has no weights for {absent[0]}: save the model again")


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if kernels of experts would compute with it by another way than with one in fresh memory."""
    return tensor.clone() if tensor.ndim > 2 and tensor.data_ptr() % 64 else tensor


@contextlib.contextmanager
def _one_line_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turns any error over damaged files into a ValueError of one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"cannot load {what}{remedy}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
