"""Reads the weights of a model's files, in safetensors or pickled as plain tensors, and dequantises FP8 and MXFP4.

Other quantised formats are refused: their stored numbers are not the weights, so pruning cannot judge them.
"""

import itertools
import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from plprune.architecture.modules import saved_buffers
from plprune.checkpoint.published import Source, sources
from plprune.checkpoint.weights import FLOATS, FP8, TensorEntry, listed_files, read_tensor, tensor_entries

Dtype = Literal["float32", "bfloat16", "float16"]
PICKLES = "pytorch_model.bin"
SCALES = "_scale_inv", "_scale"  # weights are multiplied by both
PACKED = "_blocks", "_scales"  # of MXFP4: [experts, rows, groups, 16] bytes of two numbers each, and a scale per group
GROUP = 32  # numbers


class StoredWeights:
    """The tensors in a model's files, by the names that they have in the files.

    Args:
        name: Name of the model, for errors.
        folder: Folder of the files; if it holds no weights, or is None, only the configuration is checked.
        config: Content of `config.json`.

    Raises:
        ValueError: The files are damaged, or of a quantised format other than FP8 and MXFP4.
    """

    def __init__(self, name: str, folder: Path | None, config: Mapping[str, Any]) -> None:
        self.name, self.folder, quantization = name, folder, config.get("quantization_config")
        packed = isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"
        if quantization and not packed and not _is_fp8(quantization):
            raise self._refusal(_format_name(quantization))
        self._block, self._config = _block_shape(quantization or {}), config
        self.entries = _entries(weight_files(folder)) if folder else {}
        self._packed = self._unpack() if packed else {}
        self._scales: dict[str, str] = {}
        for name, entry in self.entries.items():
            if entry.dtype in FP8.values():
                self._scales[name] = self._scale_of(name)
            elif entry.dtype is None and name.endswith("weight"):
                raise self._refusal(f"integers, {name} for one,")
        quantised = bool(self._scales or self._packed if self.entries else quantization)
        self.format = ("MXFP4" if packed else "FP8") if quantised else None  # that is dequantised

    @property
    def in_safetensors(self) -> bool:
        """Whether there are weights, all in safetensors."""
        return bool(self.entries) and all(entry.file.suffix == ".safetensors" for entry in self.entries.values())

    @property
    def dtype(self) -> Dtype:
        """The dtype of most numbers, not counting FP8; that of `config.json` if there are none."""
        counts: Counter[torch.dtype | None] = Counter()
        for entry in self.entries.values():
            if entry.dtype in FLOATS.values():
                counts[entry.dtype] += math.prod(entry.shape)
        configured = self._config.get("dtype") or self._config.get("torch_dtype")
        name = str(counts.most_common(1)[0][0] if counts else configured).removeprefix("torch.")
        return cast(Dtype, name) if name in get_args(Dtype) else "float32"

    def tensor(self, name: str) -> Tensor:
        """A tensor: memory-mapped, or dequantised to float32 if it is stored in FP8 or MXFP4."""
        if name in self._packed:
            both = (_read(entry.file, name + end) for entry, end in zip(self._packed[name], PACKED, strict=True))
            return convert_moe_packed_tensors(*both, dtype=torch.float32)
        value = _read(self.entries[name].file, name)
        if name not in self._scales:
            return value
        scale = _read(self.entries[self._scales[name]].file, self._scales[name]).float()
        return value.float() * _expand_scale(scale, self.entries[name].shape, self._block)

    def sources(self, model: PreTrainedModel) -> dict[str, Source]:
        """What the tensors of a model are made from, by their names in the model."""
        return sources(model, {name: entry.shape for name, entry in self.entries.items()})

    def _unpack(self) -> dict[str, tuple[TensorEntry, TensorEntry]]:
        """Puts weights in the place of their packed numbers and scales; returns these, by the name of the weight."""
        found = {}
        for name in [name.removesuffix(PACKED[0]) for name in self.entries if name.endswith(PACKED[0])]:
            blocks, scales = (self.entries.pop(name + end, None) for end in PACKED)
            if (
                blocks is None
                or scales is None
                or blocks.shape != (*scales.shape, GROUP // 2)
                or len(scales.shape) != 3
            ):
                raise self._refusal(f"MXFP4 with scales that do not fit {name}")
            experts, rows, groups = scales.shape
            found[name] = blocks, scales
            self.entries[name] = TensorEntry(blocks.file, torch.uint8, (experts, GROUP * groups, rows))
        return found

    def _scale_of(self, name: str) -> str:
        """The name of the scale of an FP8 tensor, which must be the only tensor that belongs to it."""
        beside = [other for other in self.entries if other.startswith(f"{name}_")]
        if len(beside) != 1 or beside[0].removeprefix(name) not in SCALES:
            raise self._refusal(f"FP8 without one scale for {name} (there is {', '.join(beside) or 'none'})")
        if not _scale_fits(self.entries[beside[0]].shape, self.entries[name].shape, self._block):
            raise self._refusal(f"FP8 with scales {beside[0]} that fit neither its rows nor its blocks")
        return beside[0]

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"the weights of {self.name} are stored as {what}, which cannot be pruned: take the repository "
            "that they were quantised from, in bfloat16, float16 or float32, or dequantise them by transformers' "
            "model.dequantize().save_pretrained(FOLDER)"
        )


def own_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes of a model's parameters and saved buffers where transformers loads it in some dtype.

    Some stay in float32, by lists of the model's class, or as the class makes them so.

    Args:
        model: Built in that dtype; its weights are not read.
        dtype: The dtype.
    """
    plan = model._get_dtype_plan(dtype)
    own = {}
    for name, tensor in itertools.chain(model.named_parameters(), saved_buffers(model).items()):
        kept = [kind for part, kind in plan.items() if re.search(part.replace("*", ".*"), name)]
        own[name] = kept[0] if kept else tensor.dtype
    return own


class ModelWeights:
    """The weights of a model in its files, by the names of its parameters.

    Args:
        stored: The tensors in the files.
        model: The model, whose parameters and saved buffers must all be in the files, with their shapes.
        dtype: The dtype that :meth:`converted` returns, unless a tensor has one of its own.

    Raises:
        ValueError: The files do not hold the model.
    """

    def __init__(self, stored: StoredWeights, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._dtype, self._own = dtype, own_dtypes(model, dtype)
        self._stored, self._sources = stored, dict[str, Source]()
        found = stored.sources(model)
        for name, parameter in itertools.chain(model.named_parameters(), saved_buffers(model).items()):
            shape = found[name].shape if name in found else None
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"{stored.name} does not hold the model of its config.json: {name} is {shape or 'absent'} "
                    f"in the files and {tuple(parameter.shape)} in the model; get it again, a pruned "
                    "one together with its plan"
                )
            self._sources[name] = found[name]

    def stored(self, name: str) -> Tensor:
        """A weight as stored, memory-mapped if it is one tensor there; in float32 if it was dequantised."""
        return self._sources[name].make(self._stored.tensor)

    def converted(self, name: str) -> Tensor:
        """A weight in its dtype, but integers as they are; memory-mapped if it is stored so."""
        value = self.stored(name)
        return value.to(self.dtype(name)) if value.is_floating_point() else value

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a weight has in memory, such as a bias that pruning has added."""
        return self._own.get(name, self._dtype)


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights, in safetensors or else pickled.

    Raises:
        ValueError: The index of the files is damaged.
    """
    return listed_files(folder) or listed_files(folder, PICKLES)


def _entries(files: list[Path]) -> dict[str, TensorEntry]:
    if not any(file.suffix == ".bin" for file in files):
        return tensor_entries(files)
    return {
        name: TensorEntry(file, value.dtype if value.is_floating_point() else None, tuple(value.shape))
        for file in files
        for name, value in _unpickled(file).items()
    }


def _read(file: Path, name: str) -> Tensor:
    return _unpickled(file)[name] if file.suffix == ".bin" else read_tensor(file, name)


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by torch.save, which may hold nothing else: other objects could run code."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()):
            return found
    except pickle.UnpicklingError:
        pass
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is missing, truncated or corrupted ({error}): get the model again") from error
    raise ValueError(
        f"{file} is not weights by name but pickled objects, which plprune never unpickles: if you trust them, save "
        "the model as safetensors, by model.save_pretrained(FOLDER) where you have it, as with "
        "torch.load(FILE, weights_only=False)['model'] for one of LLM-Pruner's"
    )


def _is_fp8(quantization: Any) -> bool:
    if not isinstance(quantization, Mapping) or quantization.get("transform_config"):  # rotations, which run with it
        return False
    method = quantization.get("quant_method")
    return method in ("fp8", "fbgemm_fp8") or (
        method == "compressed-tensors" and quantization.get("format") == "float-quantized"
    )


def _format_name(quantization: Any) -> str:
    if not isinstance(quantization, Mapping):
        return "an unknown format"
    names = [quantization.get("quant_method"), quantization.get("format"), quantization.get("quant_algo")]
    return " ".join(str(name) for name in names if name) or "an unknown format"


def _block_shape(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, if the configuration names them."""
    groups = quantization.get("config_groups") or {}
    found = quantization.get("weight_block_size") or next(
        (group["weights"]["block_structure"] for group in groups.values() if group["weights"].get("block_structure")),
        None,
    )
    return (int(found[0]), int(found[1])) if found else None


def _scale_fits(scale: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    """Whether there is one scale for the weight, for each row, or for each block; the last blocks may be smaller."""
    if math.prod(scale) == 1:
        return True
    if len(weight) != 2:
        return False
    grid = block and tuple(-(-size // each) for size, each in zip(weight, block, strict=True))
    return scale in ((weight[0],), (weight[0], 1), grid)


def _expand_scale(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    """Scales in a shape that broadcasts over the weight."""
    if scale.numel() == 1:
        return scale.view(())
    if tuple(scale.shape) in ((shape[0],), (shape[0], 1)):
        return scale.view(-1, 1)
    assert block is not None
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
