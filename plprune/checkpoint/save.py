"""Saves pruned models, whole or not at all, and checks that they load as saved."""

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from plprune.architecture.blocks import blocks_of, dense_class
from plprune.architecture.config_keys import size_keys
from plprune.architecture.head import logit_scale
from plprune.architecture.modeling_plprune import (
    PrunedConfigMixin,
    PrunedForMultimodalLM,
    is_wrapper,
    write_code,
)
from plprune.architecture.modules import tied
from plprune.architecture.wrappers import text_config, with_sizes
from plprune.checkpoint.load import REPAIRED
from plprune.checkpoint.locate import cached_folder, locate, resolve_path
from plprune.checkpoint.model_card import CARD, write_card
from plprune.checkpoint.published import published
from plprune.checkpoint.stock_config import saved_config, skeleton
from plprune.checkpoint.weights import INDEX, SINGLE, align, check_saved, without_tied, write_index
from plprune.io.atomic import staged
from plprune.pruning.plan import FILE, PruningPlan
from plprune.pruning.surgery import plan_of

SERVED = "TransformersForCausalLM"  # the name under which vLLM runs the models of a folder's own code
PROCESSORS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@functools.cache
def licence_of(name_or_path: str) -> str | None:
    """The licence that a model's local GGUF file or model card names; None if there is none."""
    with contextlib.suppress(ValueError, OSError, IndexError):
        path = Path(locate(name_or_path))
        if path.suffix == ".gguf":
            return _gguf_licence(path)
        found = re.search(r"^license: *(\S+)", (path / CARD).read_text().split("---")[1], re.MULTILINE)
        return found.group(1) if found else None
    return None


def _gguf_licence(path: Path) -> str | None:
    """The string `general.license` in the head of a file; a GGUF reader would take seconds to read the rest."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    found = re.search(rb"general\.license\x08\0\0\0(.{8})", head, re.DOTALL)  # type and length of a string
    return head[found.end() :][: int.from_bytes(found[1], "little")].decode() if found else None


def save_pruned(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    record: dict[str, Any] | None = None,
) -> None:
    """Writes a model, its plan and its tokenizer to a folder, whole or not at all.

    Configurations of processors, of images and the like, are copied from the folder that the model was loaded from.

    If the family's class can hold the sizes, the folder is a stock checkpoint. Otherwise a small modelling file lies
    beside the weights, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it without
    plprune.

    Args:
        model: A pruned model with merged LoRA, or a dense one.
        folder: The folder to write.
        tokenizer: Saved beside the model.
        overwrite: Whether to replace the content of the folder.
        max_shard_size: Size above which the weights are split into several files.
        record: Record of the run for the model card, see :mod:`plprune.checkpoint.model_card`.

    Raises:
        FileExistsError: The folder is not empty.
        ValueError: A weight is not finite, or the folder would not load as this model; nothing is left behind.
        OSError: The folder could not be written; nothing is left behind.
    """
    with staged(folder, overwrite) as temporary:
        state = without_tied(model, model.state_dict())
        write_model(model, state, temporary, tokenizer, max_shard_size, record)
        check_saved(temporary, model, state.items())


def write_model(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
    record: dict[str, Any] | None = None,
    with_plan: bool = True,
) -> None:
    """Writes the files from which a model loads, unchecked; arguments not listed are those of :func:`save_pruned`.

    Args:
        state: The weights to write, with one name for each parameter.
        with_plan: Whether the plan is written; it must still describe the structure.
    """
    plan, (config, biases) = plan_of(model), saved_config(model)
    dense, own = dense_class(model)
    names: dict[str, Any] = {"save_original_format": False}  # not the names of older transformers
    custom, mixture = isinstance(config, PrunedConfigMixin), is_mixture(model)
    state = published(skeleton(config), state | biases) if mixture and not custom else state | biases
    dense.save_pretrained(model, folder, state_dict=state, max_shard_size=max_shard_size, **names)
    if mixture:
        for file in Path(folder).glob("*.safetensors"):
            align(file)
    name = dense.__name__
    if custom:
        name = PrunedForMultimodalLM.__name__ if is_wrapper(type(own)) else SERVED
    config.architectures = [name]
    if name == SERVED and (scale := logit_scale(dense, own)) not in (None, getattr(config, "logit_scale", 1.0)):
        config.logit_scale = scale  # where vLLM looks, in all families
    config.dtype = model.dtype
    config.tie_word_embeddings = tied(model)
    if theta := (getattr(config, "rope_parameters", None) or {}).get("rope_theta"):
        config.rope_theta = theta  # where mlx-lm and programs of transformers' older releases look
    if own_code := write_code(dense, folder, custom):
        config.auto_map = own_code
    config.save_pretrained(folder)
    if mixture and not custom:
        _add_old_keys(folder / CONFIG_NAME, config, size_keys(model)["experts"])
    if plan is not None and with_plan:
        plan.save(folder / FILE)
        if not (folder / INDEX).exists():
            write_index(folder, [SINGLE])
        write_card(folder, plan, {"licence": licence_of(plan.chain()[0].origin.get("model") or "")} | (record or {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _copy_processors(model.config.name_or_path or "", folder)


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether some blocks have experts, whose weights are published one by one."""
    return any(block.expert_count for block in blocks_of(model))


def write_blocks(model: PreTrainedModel, blocks: Iterable[tuple[Path, dict[str, torch.Tensor]]]) -> None:
    """Writes the weights of a mixture's blocks, each to a file, by the names that :func:`write_model` gives them."""
    config, _ = saved_config(model)
    structure = None if isinstance(config, PrunedConfigMixin) else skeleton(config)
    for file, state in blocks:
        state = published(structure, state) if structure is not None else state
        save_file({name: value.contiguous() for name, value in state.items()}, file, metadata={"format": "pt"})
        align(file)


def _add_old_keys(file: Path, config: PreTrainedConfig, key: str) -> None:
    """Adds the value of a config's key to its file under the other names that mlx-lm and older transformers read."""
    own = text_config(config)
    others = {name: getattr(own, key) for name, real in type(own).attribute_map.items() if real == key}
    values = with_sizes(json.loads(file.read_text()), others, type(config))
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _copy_processors(name_or_path: str, folder: Path) -> None:
    """Copies what a model's folder has for processors of images and the like, except what is written already."""
    with contextlib.suppress(ValueError):  # the model was built in memory, or its folder is gone
        if source := cached_folder(resolve_path(name_or_path)):
            for name in PROCESSORS:
                if (source / name).exists() and not (folder / name).exists():
                    shutil.copyfile(source / name, folder / name)


def save_stage(model: PreTrainedModel, plan: PruningPlan, folder: str | os.PathLike[str]) -> None:
    """Writes a plan and its repaired values, which :func:`plprune.checkpoint.load.load_stage` applies."""
    state = model.state_dict()
    with staged(folder) as temporary:
        temporary.mkdir()
        plan.save(temporary / FILE)
        save_file({name: state[name].contiguous() for name in plan.repaired}, temporary / REPAIRED)
