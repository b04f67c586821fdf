"""How the weights of a folder are stored: in which files, as which numbers. What reads weights asks here.

FP8 with its scales is multiplied out, wherever the model is to be. Every other format in which the numbers of a file
are not the weights is refused: what would be pruned is unknown, or as good as.
"""

import math
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.checkpoint.weights import files, key_of, mapped, opened, renamings

Dtype = Literal["float32", "bfloat16", "float16"]
PICKLES = "pytorch_model.bin"
NUMBERS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SCALES = "_scale_inv", "_scale"  # both are multiplied by


class Entry(NamedTuple):
    """Where a tensor is, of which numbers (None if they are no floats) and of which shape."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]


class Stored:
    """The tensors of a model's files, by the names that they have there.

    Args:
        name: What the model is called, for errors.
        folder: The folder; if it holds no weights, or is None, only the configuration is judged.
        config: What `config.json` says.

    Raises:
        ValueError: The files are damaged, or of a format that is not multiplied out.
    """

    def __init__(self, name: str, folder: Path | None, config: Mapping[str, Any]) -> None:
        self.name, self.folder, quantization = name, folder, config.get("quantization_config")
        if quantization and not _is_fp8(quantization):
            raise self._refusal(_called(quantization))
        self._block, self._config = _block(quantization or {}), config
        self.entries = {n: entry for file in (weight_files(folder) if folder else []) for n, entry in _listed(file)}
        self._scales: dict[str, str] = {}
        for name, entry in self.entries.items():
            if entry.dtype in FP8.values():
                self._scales[name] = self._scale_of(name)
            elif entry.dtype is None and name.endswith("weight"):
                raise self._refusal(f"whole numbers, {name} for one,")
        self.fp8 = bool(self._scales if self.entries else quantization)

    @property
    def in_safetensors(self) -> bool:
        """Whether there are weights, and they are in that format."""
        return bool(self.entries) and all(entry.file.suffix == ".safetensors" for entry in self.entries.values())

    @property
    def dtype(self) -> Dtype:
        """The dtype of most numbers, those of FP8 aside; what `config.json` says where there are none."""
        found: Counter[torch.dtype | None] = Counter()
        for entry in self.entries.values():
            if entry.dtype in NUMBERS.values():
                found[entry.dtype] += math.prod(entry.shape)
        said = self._config.get("dtype") or self._config.get("torch_dtype")
        name = str(found.most_common(1)[0][0] if found else said).removeprefix("torch.")
        return cast(Dtype, name) if name in get_args(Dtype) else "float32"

    def tensor(self, name: str) -> Tensor:
        """A tensor; memory-mapped, or multiplied out in float32 if it is in FP8."""
        value = read(self.entries[name].file, name)
        if name not in self._scales:
            return value
        scale = read(self.entries[self._scales[name]].file, self._scales[name]).float()
        return value.float() * _spread(scale, self.entries[name].shape, self._block)

    def _scale_of(self, name: str) -> str:
        """The scale of a tensor in FP8, which must be all that belongs to it."""
        beside = [other for other in self.entries if other.startswith(f"{name}_")]
        if len(beside) != 1 or beside[0].removeprefix(name) not in SCALES:
            raise self._refusal(f"FP8 without one scale for {name} (there is {', '.join(beside) or 'none'})")
        if not _fits(self.entries[beside[0]].shape, self.entries[name].shape, self._block):
            raise self._refusal(f"FP8 whose scales {beside[0]} are for no rows or blocks that are known")
        return beside[0]

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"the weights of {self.name} are stored as {what}, which cannot be pruned: take the repository that they "
            "were made from, in bfloat16, float16 or float32, or save plain ones by transformers' "
            "model.dequantize().save_pretrained(FOLDER)"
        )


class Source:
    """The weights of a model in the files of a folder, by the names that the model gives them.

    Args:
        stored: What is in the files.
        model: Its parameters say which weights there must be, and of what shape.
        dtype: As which they are read.

    Raises:
        ValueError: The files do not hold the model.
    """

    def __init__(self, stored: Stored, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.dtype, self._stored, self._keys = dtype, stored, dict[str, str]()
        others = renamings(model)
        for name, parameter in model.named_parameters():
            key = key_of(name, stored.entries, model, others)
            shape = stored.entries[key].shape if key in stored.entries else None
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"{stored.name} does not hold the model of its config.json: {name} is {shape or 'absent'} there "
                    f"and {tuple(parameter.shape)} in the model; get it again, a pruned one together with its plan"
                )
            self._keys[name] = key

    def stored(self, name: str) -> Tensor:
        """A weight as it is on disk, memory-mapped; in float32 if it is in FP8 there."""
        return self._stored.tensor(self._keys[name])

    def mapped(self, name: str) -> Tensor:
        """A weight of the dtype that is asked for; memory-mapped if it is so on disk."""
        return self.stored(name).to(self.dtype)


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights, in safetensors or else pickled; none if there are none.

    Raises:
        ValueError: What lists them is damaged.
    """
    return files(folder) or files(folder, PICKLES)


def _listed(file: Path) -> Iterator[tuple[str, Entry]]:
    if file.suffix == ".bin":
        for name, value in _unpickled(file).items():
            yield name, Entry(file, value.dtype if value.is_floating_point() else None, tuple(value.shape))
        return
    with opened(file) as found:
        for name in found.keys():  # noqa: SIM118
            part = found.get_slice(name)
            yield name, Entry(file, (NUMBERS | FP8).get(part.get_dtype()), tuple(part.get_shape()))


def read(file: Path, name: str) -> Tensor:
    """One tensor of a file, memory-mapped: the map goes with the tensor."""
    if file.suffix == ".bin":
        return _unpickled(file)[name]
    return mapped(file, name)


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by torch.save, which may hold nothing else: anything else could be code."""
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


def _called(quantization: Any) -> str:
    if not isinstance(quantization, Mapping):
        return "an unknown format"
    names = [quantization.get("quant_method"), quantization.get("format"), quantization.get("quant_algo")]
    return " ".join(str(name) for name in names if name) or "an unknown format"


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, if the configuration says it."""
    groups = quantization.get("config_groups") or {}
    found = quantization.get("weight_block_size") or next(
        (group["weights"]["block_structure"] for group in groups.values() if group["weights"].get("block_structure")),
        None,
    )
    return (int(found[0]), int(found[1])) if found else None


def _fits(scale: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    """Whether there is a scale for all, for each row, or for each block, of which the last may be smaller."""
    if math.prod(scale) == 1:
        return True
    if len(weight) != 2:
        return False
    grid = block and tuple(-(-size // each) for size, each in zip(weight, block, strict=True))
    return scale in ((weight[0],), (weight[0], 1), grid)


def _spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    """Scales, repeated to be multiplied with a weight of that shape."""
    if scale.numel() == 1:
        return scale.view(())
    if tuple(scale.shape) in ((shape[0],), (shape[0], 1)):
        return scale.view(-1, 1)
    assert block is not None
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
