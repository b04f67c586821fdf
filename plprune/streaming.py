"""Prunes a model that is larger than memory: one block at a time is loaded from disk, pruned and written.

The blocks of a streamed model are on the meta device and know the files of their weights; embeddings, head and final
norm are memory-mapped. Pruned blocks go to a journal (`plprune.pruning.journal`), and from there into the output, so
that a stopped run can continue.
"""

import contextlib
import ctypes
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.architecture.attached import attach, attached
from plprune.architecture.blocks import Block, Decision, Home, anatomy_of, blocks_of
from plprune.architecture.modules import saved_buffers, set_parameter
from plprune.checkpoint.load import load_skeleton, read_generation_config, resolve_dtype, stored_weights
from plprune.checkpoint.save import is_mixture, write_blocks, write_model
from plprune.checkpoint.stored import Dtype, ModelWeights
from plprune.checkpoint.weights import SINGLE, check_saved, check_values, read_tensor, without_tied, write_index
from plprune.io import distributed
from plprune.io.atomic import check_output, resolve_path, write_errors
from plprune.methods.run import Request, origin, source_of
from plprune.pruning.calibration import Calibration
from plprune.pruning.forward import checksums, same_values
from plprune.pruning.journal import ASKED, SHARD, Journal
from plprune.pruning.model_state import model_state
from plprune.pruning.plan import FILE, PruningPlan, fingerprint

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of mallopt, as in malloc.h
INITIAL = 1 << 17  # their value at first


def open_streamed(name_or_path: str, dtype: Dtype | None = None) -> PreTrainedModel:
    """Opens a model, dense or pruned, without loading its blocks.

    Args:
        name_or_path: A folder with safetensors, or a name on the hub.
        dtype: The dtype of the weights in memory; as stored if None.

    Raises:
        ValueError: The model's family is not supported, or its weights are in another format, missing, damaged or of
            other shapes than its configuration says.
    """
    stored = stored_weights(name_or_path)
    if stored.folder is None or not stored.in_safetensors:
        raise ValueError(
            f"{name_or_path} is not in safetensors, which streaming needs: convert it on a machine with memory for the "
            "whole model, by python -c 'from plprune.checkpoint import *; save_pruned(load_model(NAME), FOLDER, "
            f"load_tokenizer(NAME))', with {name_or_path!r} for NAME"
        )
    return_freed_memory()
    dtype = resolve_dtype(stored, dtype)
    model = load_skeleton(name_or_path, dtype)
    source = ModelWeights(stored, model, getattr(torch, dtype))
    weights = fingerprint((name, source.converted(name)) for name, _ in model.named_parameters())
    attach(model, replace(model_state(model), fingerprint=weights))
    for name in [n for n in dict(model.named_parameters()) if not _in_blocks(model, n)] + list(saved_buffers(model)):
        set_parameter(model, name, source.converted(name))
    model.tie_weights()
    for block in blocks_of(model):
        attach(block.module, DiskHome(block, source))
    read_generation_config(model, stored.folder)
    model.config.dtype = model.dtype
    return model.eval()


def prune_streamed(
    model: PreTrainedModel,
    request: Request,
    calibration: Calibration,
    output: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> PruningPlan:
    """Prunes a model of :func:`open_streamed` block by block into a folder that loads again.

    A stopped run can be resumed, wherever it stopped, and ends with the same plan and weights.

    Args:
        model: The model; it cannot be used afterwards.
        request: The method, its target, and the programs that must load the result.
        calibration: Token ids and device.
        output: Folder to write.
        tokenizer: Tokenizer to save with the model.
        seed: Seed that chose the calibration text, for the record.
        resume: Whether to continue an unfinished run, if there is one.
        overwrite: Whether to replace the output folder and, without `resume`, to delete an unfinished run.

    Raises:
        ValueError: There is an unfinished run and neither flag is set, or its request differs, or the method does not
            support streaming.
        OSError: Writing failed; finished work is kept.
    """
    if distributed.launched_count() > 1:
        raise ValueError("streaming from disk supports one process only: start the command without torchrun")
    request.method.check_weights(model)
    check_run_output(output, True, resume, overwrite)
    if not has_unfinished_run(output):
        check_output(output, overwrite)
    with Journal(journal_path(output), run_inputs(model, request, calibration, seed), resume, overwrite) as journal:
        journal.blocks = len(blocks_of(model))
        attach_journal(model, journal)
        plan = request.prune(model, calibration, seed)
        _save(model, journal, resolve_path(output), tokenizer, overwrite)
        journal.remove()
    return plan


def run_inputs(
    model: PreTrainedModel, request: Request, calibration: Calibration, seed: int | None = None
) -> dict[str, Any]:
    """Everything that the result depends on, in JSON's types."""
    return {
        "method": type(request.method).__name__,
        "settings": request.settings,
        "source": source_of(request.method),
        **origin(model, calibration, seed),
        "dtype": str(model.dtype),
        "batches": [len(ids) for ids in calibration],
        "device": (calibration.device or model.device).type,
    }


def finished_plan(
    model: PreTrainedModel,
    request: Request,
    calibration: Calibration,
    output: str | os.PathLike[str],
    seed: int | None = None,
) -> PruningPlan | None:
    """The plan in the output folder, if a run with the same inputs wrote it; the rest of its journal is removed."""
    if not (resolve_path(output) / FILE).exists():
        return None
    plan, inputs = PruningPlan.load(resolve_path(output)), run_inputs(model, request, calibration, seed)
    written = {"method": plan.method, "settings": plan.settings, **plan.origin}
    keys = ("method", "settings", "weights", "calibration", "seed")
    if any(json.dumps(written.get(key), sort_keys=True) != json.dumps(inputs[key], sort_keys=True) for key in keys):
        return None
    if journal_path(output).exists():  # the run was killed before it removed the journal, or another run has one
        with contextlib.suppress(ValueError), Journal(journal_path(output), inputs, resume=True) as journal:
            journal.remove()
    return plan


def check_run_output(output: str | os.PathLike[str], stream: bool, resume: bool, overwrite: bool) -> None:
    """Checks, before anything is loaded, that a run may write to `output`.

    Raises:
        ValueError: There is an unfinished run with the same output.
        FileExistsError: The output exists.
    """
    journal = journal_path(output)
    if has_unfinished_run(output) and not stream:
        raise ValueError(f"an unfinished run is in {journal}: continue it by --stream --resume, or remove that folder")
    if has_unfinished_run(output) and not resume and not overwrite:
        raise ValueError(f"an unfinished run is in {journal}: continue it by --resume, or start again by --overwrite")
    if not resume:
        check_output(output, overwrite)


def has_unfinished_run(output: str | os.PathLike[str]) -> bool:
    """Whether there is an unfinished run with this output."""
    return (journal_path(output) / ASKED).exists()


def journal_path(output: str | os.PathLike[str]) -> Path:
    """The folder of a run's journal, beside the output, so that files move by a rename."""
    path = resolve_path(output)
    return path.with_name(f".{path.name}.progress")


def attach_journal(model: PreTrainedModel, journal: Journal) -> None:
    """Makes a streamed model write its changes to a journal."""
    attach(model, replace(model_state(model), journal=journal))
    for block in blocks_of(model):
        _home(block).journal = journal


class DiskHome(Home):
    """Loads a block from the model's files or, once it has changed, from the journal, and writes changes there."""

    def __init__(self, block: Block, source: ModelWeights) -> None:
        self.block, self.source, self.version = block, source, 0
        self.prefix = f"{block.path}."
        self.journal: Journal | None = None
        self._decisions: list[Decision] = []  # since the block was loaded
        self._loaded = False

    def note(self, decision: Decision) -> None:
        self._decisions.append(decision)

    @contextlib.contextmanager
    def present(self, device: torch.device | None) -> Iterator[None]:
        if self._loaded:
            yield
            return
        self._load(device or torch.device("cpu"))
        self._loaded, before = True, checksums(self.block.module)
        try:
            yield
        except GeneratorExit:  # the caller left its loop over the blocks, perhaps after changing this one
            self._write(before)
            raise
        else:
            self._write(before)
        finally:
            self._loaded = False
            self._unload()

    def tensors(self) -> dict[str, Tensor]:
        """The weights of the loaded block, by their names in the model, on the CPU."""
        return {self.prefix + k: p.detach().cpu().contiguous() for k, p in self.block.module.state_dict().items()}

    def _load(self, device: torch.device) -> None:
        _move_buffers(self.block.module, device)
        for name, _ in list(self.block.module.named_parameters()):
            stored = self._stored(self.prefix + name)
            dtype = stored.dtype if self.version else self.source.dtype(self.prefix + name)  # biases may be added
            value = torch.empty(stored.shape, dtype=dtype, device=device)
            value.copy_(stored)  # a copy is aligned as other tensors are, a map may not be
            set_parameter(self.block.module, name, value)

    def _stored(self, name: str) -> Tensor:
        if self.version == 0:
            return self.source.stored(name)
        assert self.journal is not None
        return read_tensor(self.journal.version(self.block.index, self.version) / SHARD, name)

    def _write(self, before: dict[str, Tensor]) -> None:
        """Writes the block to the journal if it was changed, unless an earlier run has made the same change."""
        if not self._decisions and same_values(before, checksums(self.block.module)):
            return
        if self.journal is None:
            raise ValueError("only prune_streamed, or --stream, prunes a model that streams from disk")
        index, number = self.block.index, self.version + 1
        done = self.journal.version(index, number).exists()
        if not done or self.journal.decisions_of(index, number) != self._decisions:
            self.journal.write_block(index, number, self.tensors(), self._decisions, check_values)
        self.version, self._decisions = number, []
        self.journal.advance()

    def _unload(self) -> None:
        for name, parameter in list(self.block.module.named_parameters()):
            set_parameter(self.block.module, name, torch.empty_like(parameter, device="meta"))
        _move_buffers(self.block.module, torch.device("cpu"))


def return_freed_memory(size: int = INITIAL, reserve: int = INITIAL) -> None:
    """Makes the C library return freed tensors to the system; by default it keeps several blocks' worth for reuse.

    Args:
        size: Bytes from which a tensor is returned at once.
        reserve: Bytes that are kept for smaller ones; many small ones are made faster from a reserve.
    """
    with contextlib.suppress(OSError, AttributeError):  # not every C library has mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, size)
        libc.mallopt(TRIM_THRESHOLD, reserve)


def _save(
    model: PreTrainedModel, journal: Journal, output: Path, tokenizer: PreTrainedTokenizerBase | None, overwrite: bool
) -> None:
    """Assembles the output, one shard per block and one for the rest, and renames it into place."""
    room, blocks = journal.scratch("output"), blocks_of(model)
    shards = [f"model-{i + 1:05}-of-{len(blocks) + 1:05}.safetensors" for i in range(len(blocks) + 1)]
    with write_errors(output):
        state = without_tied(model, model.state_dict())
        rest = {name: value for name, value in state.items() if not _in_blocks(model, name)}
        write_model(model, rest, room, tokenizer, max_shard_size="1000TB")
        os.replace(room / SINGLE, room / shards[0])
        files = [room / shard for shard in shards[1:]]
        if is_mixture(model):
            write_blocks(model, zip(files, map(_tensors, blocks), strict=True))
        else:
            for block, file in zip(blocks, files, strict=True):
                _save_block(block, journal, file)
        write_index(room, shards)
        check_saved(room, model, itertools.chain(rest.items(), _of_blocks(blocks)))
        check_output(output, overwrite)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            os.replace(output, journal.scratch("replaced"))
        os.replace(room, output)


def _in_blocks(model: PreTrainedModel, name: str) -> bool:
    return name.startswith(f"{anatomy_of(model).blocks}.")


def _of_blocks(blocks: list[Block]) -> Iterator[tuple[str, Tensor]]:
    """The weights of all blocks; one block is in memory at a time."""
    for block in blocks:
        yield from _tensors(block).items()


def _tensors(block: Block) -> dict[str, Tensor]:
    with block.present():
        return _home(block).tensors()


def _home(block: Block) -> DiskHome:
    home = attached(block.module, DiskHome)
    assert home is not None
    return home


def _save_block(block: Block, journal: Journal, file: Path) -> None:
    home = _home(block)
    if home.version == 0:
        with block.present():
            return save_file(home.tensors(), file, metadata={"format": "pt"})
    written = journal.version(block.index, home.version) / SHARD
    try:
        os.link(written, file)
    except OSError:  # not every file system has hard links
        shutil.copyfile(written, file)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
