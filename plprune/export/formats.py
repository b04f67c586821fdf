"""Exports a model to other formats, loads each again in the program that reads it, and compares the outputs."""

import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.architecture.blocks import blocks_of, dense_class
from plprune.architecture.modeling_plprune import is_wrapper
from plprune.checkpoint.model_card import record_of, write_card
from plprune.checkpoint.save import write_model
from plprune.checkpoint.weights import check_saved, without_tied
from plprune.export import decilm, parity, quantiser
from plprune.export.parity import Reading, Row
from plprune.io.atomic import staged
from plprune.planning.serving import LOAD_PATHS
from plprune.pruning import surgery
from plprune.pruning.constraints import device_counts

FORMATS = ("hf", "gguf", "decilm", "vllm")
GgufDtype = Literal["f32", "f16", "bf16", "q8_0"]
HF = FORMATS[0]
TEXT_ALONE = "the text decoder alone: what sees or hears is not written"
SAME_AS: dict[torch.dtype, GgufDtype] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to export.

    Args:
        gguf: Dtype of the matrices in a GGUF file; the model's if not given.
        quantize: Types of further GGUF files, which llama.cpp quantises from the first.
        quantizer: Path of llama.cpp's `llama-quantize`; if not given, it is looked for.
        widen: Whether ragged value channels are widened with zeros, so that more programs can load the model.
        pad_to: FFN widths are padded with zeros to a multiple of this. If not given, those of GGUF files that are
            quantised are padded to the blocks of their types.
        vllm: The Python of an environment with vLLM; this one if not given.
        tensor_parallel: The number of devices that share the model in vLLM.
    """

    gguf: GgufDtype | None = None
    quantize: tuple[quantiser.Kind, ...] = ()
    quantizer: str | None = None
    widen: bool = False
    pad_to: int | None = None
    vllm: str | None = None
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.pad_to is not None and self.pad_to < 1:
            raise ValueError(f"pad_to is {self.pad_to}, but widths are padded to a multiple of at least 1")
        if unknown := [each for each in self.quantize if each not in get_args(quantiser.Kind)]:
            raise ValueError(f"unknown type {unknown[0]!r} to quantise to: give some of {', '.join(quantiser.BLOCKS)}")
        if self.quantize and self.gguf == "q8_0":
            raise ValueError("a file in q8_0 is not quantised again: leave out --gguf q8_0, or --quantize")
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel is {self.tensor_parallel}, but must be a number of devices: 1 or more")

    @property
    def reshape(self) -> bool:
        """Whether zeros are added to the model for all formats."""
        return self.widen or (self.pad_to or 1) > 1


def export(
    name: str,
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    output: str | os.PathLike[str],
    formats: list[str],
    windows: Tensor,  # [n, s]
    options: Options = Options(),
    overwrite: bool = False,
) -> list[Row]:
    """Writes a model in every format, loads each in the program that reads it, and compares the outputs on a text.

    The folder also gets `parity.json` and a model card.

    Args:
        name: Name of the model, from which files are named.
        load: Loads the model; it is freed before other programs load the files.
        tokenizer: The model's tokenizer.
        output: Folder to write, whole or not at all.
        formats: Names from :data:`FORMATS`.
        windows: Token ids of the text to compare on.
        options: How to export.
        overwrite: Whether to replace the content of the folder.

    Raises:
        ValueError: A format is unknown, no format can hold the model (the message gives every reason), the model is
            dense and `options` reshape it, or no quantiser is here.
        FileExistsError: The folder is not empty.
    """
    check_formats(formats, options)
    with staged(output, overwrite) as room:
        room.mkdir()
        model = load()
        plan, record, short = surgery.plan_of(model), record_of(name), Path(name).name.removesuffix(".gguf")
        if options.reshape and plan is None:
            raise ValueError(
                "a model that plprune has not pruned is neither widened nor padded: leave out --widen and --pad_to"
            )
        own = parity.read_model(model, windows)
        if options.widen:
            surgery.widen(model)
        if options.pad_to is not None:
            surgery.pad(model, options.pad_to)
        last = sorted(dict.fromkeys(formats), key="gguf".__eq__)  # the model is padded for it alone
        written = {kind: _write_format(kind, model, tokenizer, room, short, options) for kind in last}
        del model
        rows = [row for kind in formats for row in (written[kind], *_quantised(written[kind], room, short, options))]
        if all(row.refused for row in rows):
            raise ValueError("; ".join(f"{row.format}: {reason}" for row in rows for reason in row.refused))
        rows = [_check_format(row, room, windows, own, options) for row in rows]
        (room / "parity.json").write_text(json.dumps(_parity_record(rows, windows, own), indent=2) + "\n")
        for folder in [room, *{room / row.file for row in rows if row.file == HF}]:
            if plan is not None:
                write_card(folder, plan, record, parity.parity_table(rows))
    return rows


def check_formats(formats: list[str], options: Options = Options()) -> None:
    """Raises ValueError if a format is unknown, none is given, or a quantiser is asked for and is not here."""
    if unknown := [each for each in formats if each not in FORMATS] or not formats:
        raise ValueError(f"unknown format {unknown or formats}: give some of {', '.join(FORMATS)}")
    if options.quantize and "gguf" not in formats:
        raise ValueError("GGUF files are quantised, and gguf is not among the formats: add it to --to")
    if options.quantize:
        quantiser.command(options.quantizer)


def format_refusals(model: PreTrainedModel) -> dict[str, list[str]]:
    """The reasons why each format cannot hold a model; an empty list if it can."""
    return {kind: _refusals(kind, model) for kind in FORMATS}


def unknown_formats() -> list[str]:
    """The formats whose refusals are unknown because a package is not installed."""
    return [] if importlib.util.find_spec("gguf") else ["gguf"]


def _refusals(kind: str, model: PreTrainedModel, devices: int = 1) -> list[str]:
    if kind == HF:
        return []
    if kind == "vllm":
        takes = any(path.takes(dense_class(model)[1]) for path in LOAD_PATHS["vllm"])
        return _shares(model, devices) if takes else ["its backend for transformers does not take this family"]
    if kind in unknown_formats():
        return ["it needs the package gguf: pip install 'plprune[export]'"]
    return decilm.refusals(model) if kind == "decilm" else _gguf().refusals(model)


def _shares(model: PreTrainedModel, devices: int) -> list[str]:
    """The reason why so many devices cannot share a model, if there is one."""
    if devices == 1 or devices in (able := device_counts(blocks_of(model))):
        return []
    others = f", but {', '.join(map(str, able))} can" if able != [1] else ""
    return [
        f"{devices} devices cannot share its widths and heads{others}: prune the dense model with "
        f"`tensor_parallel: {devices}`"
    ]


def _write_format(
    kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, room: Path, name: str, options: Options
) -> Row:
    """Writes one format; the row has the reasons if it is refused."""
    if kind in (HF, "vllm"):  # vLLM reads what transformers does
        if reasons := _refusals(kind, model, options.tensor_parallel):
            return Row(kind, refused=reasons)
        folder = room / HF
        if not folder.exists():
            folder.mkdir()
            state = without_tied(model, model.state_dict())
            write_model(model, state, folder, tokenizer, with_plan=not options.reshape)
            check_saved(folder, model, state.items())
        return Row(kind, HF, bytes=_size(folder))
    dtype = options.gguf or SAME_AS[model.dtype]
    file, format = (kind, kind) if kind == "decilm" else (f"{name}-{dtype}.gguf", f"{kind} {dtype}")
    if reasons := _refusals(kind, model):
        return Row(format, refused=reasons)
    note = ""
    try:
        if kind == "decilm":
            decilm.write(model, tokenizer, room / file)
        else:
            note = _pad_for_blocks(model, options)
            _gguf().write(model, tokenizer, room / file, dtype)
    except ValueError as error:  # llama.cpp lacks the tokenizer
        return Row(format, refused=[str(error)])
    row = Row(format, file, bytes=_size(room / file), note=note)
    return row.noted(TEXT_ALONE) if kind == "gguf" and is_wrapper(type(model.config)) else row


def _pad_for_blocks(model: PreTrainedModel, options: Options) -> str:
    """Pads a pruned model for the types that it is quantised to, unless told not to; returns a remark."""
    if not options.quantize or options.pad_to is not None or surgery.plan_of(model) is None:
        return ""
    multiple, before = max(quantiser.BLOCKS[kind] for kind in options.quantize), model.num_parameters()
    try:
        surgery.pad(model, multiple)
    except ValueError as error:
        raise ValueError(f"{error}: quantise as it is, by --pad_to 1") from error
    added = model.num_parameters() - before
    told = f"FFN widths were padded with zeros to multiples of {multiple}, {added / before:+.1%} of parameters"
    return f"{told}; --pad_to sets another multiple, 1 none" if added else ""


def _quantised(row: Row, room: Path, name: str, options: Options) -> list[Row]:
    """Quantises a GGUF file, if the row is of one."""
    if row.file is None or not row.format.startswith("gguf "):
        return []
    program, rows = quantiser.command(options.quantizer) if options.quantize else [], []
    for kind in options.quantize:
        format, file = f"gguf {kind}", f"{name}-{kind}.gguf"
        try:
            note = quantiser.quantise(program, room / row.file, room / file, kind)
        except ValueError as error:
            rows.append(Row(format, refused=[str(error)]))
        else:
            rows.append(Row(format, file, bytes=_size(room / file), note=note))
    return rows


def _check_format(row: Row, room: Path, windows: Tensor, own: Reading, options: Options) -> Row:
    """Loads a written format in the program that reads it, and compares."""
    if row.file is None:
        return row
    path = room / row.file
    if row.format == "decilm":
        decilm.check(path)
        return row.noted("shapes fit the format's rule; not run, as no program that reads it is installed")
    if row.format == HF:
        return parity.compare(row, functools.partial(parity.by_transformers, path, windows), own)
    if row.format == "vllm":
        if options.vllm is None and importlib.util.find_spec("vllm") is None:
            return row.noted("not run, as vLLM is not here: name the Python of an environment that has it by --vllm")
        python, settings = options.vllm or sys.executable, {"tensor_parallel_size": options.tensor_parallel}
        return parity.compare(row, functools.partial(parity.by_vllm, path, python, windows, settings), own)
    if importlib.util.find_spec("xllamacpp") is None:
        return row.noted("not loaded, as llama.cpp is not on this machine: pip install xllamacpp")
    return parity.compare(row, functools.partial(parity.by_llama_cpp, path, windows), own)


def _gguf() -> Any:
    """The GGUF writer, which needs an optional package."""
    from plprune.export import gguf

    return gguf


def _parity_record(rows: list[Row], windows: Tensor, own: Reading) -> dict[str, Any]:
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "text": {"windows": len(windows), "tokens": windows.numel()},
        "reference": {
            "program": own.program,
            "tokens_per_second": own.tokens_per_second,
            "perplexity": own.logprobs.double().mean().neg().exp().item(),
        },
    }


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
