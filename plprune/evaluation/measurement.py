"""Measures a model: perplexity on a text, parameters, size and reading speed."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.stock_config import saved_config
from plprune.evaluation.perplexity import Passage, judge, perplexity
from plprune.io import distributed
from plprune.io.tables import text_table
from plprune.io.units import format_value
from plprune.pruning.forward import evaluating
from plprune.recovery.lora import base_parameters
from plprune.recovery.masters import saved_dtype


@torch.no_grad()
def tokens_per_second(model: PreTrainedModel, ids: Tensor, repeats: int = 9) -> float:  # [b, s]
    """The reading speed: the median over `repeats` forward passes after a warm-up pass."""
    ids = ids.to(model.device)
    seconds = []
    with evaluating(model):
        for _ in range(repeats + 1):
            _synchronise(model.device)
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            _synchronise(model.device)
            seconds.append(time.perf_counter() - start)
    return ids.numel() / statistics.median(seconds[1:])


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """The parameters in the decoder blocks, and in all, without adapters; tied parameters count once."""
    return sum(_count(block.module) for block in blocks_of(model)), _count(model)


def saved_bytes(model: PreTrainedModel) -> int:
    """The bytes that :func:`plprune.save_pruned` writes: adapters merged, tied parameters once, buffers included."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    others = [value for name, value in model.state_dict().items() if name not in names]
    size = sum(value.numel() * value.element_size() for value in (*others, *saved_config(model)[1].values()))
    for name, parameter in base_parameters(model):
        path, _, own = name.rpartition(".")
        size += _numel(parameter) * saved_dtype(model.get_submodule(path), own).itemsize
    return size


@dataclass(frozen=True)
class Measurement:
    """A measured model.

    Args:
        perplexity: On held-out text.
        block_parameters: Parameters in the decoder blocks.
        parameters: All parameters.
        bytes: Size of the weights if the model were saved in its present dtype.
        tokens_per_second: Reading speed, batch 1; None if it was not measured.
        bits_per_byte: On the same text; None if it was not measured.
    """

    perplexity: float
    block_parameters: int
    parameters: int
    bytes: int
    tokens_per_second: float | None
    bits_per_byte: float | None = None


def measure(
    model: PreTrainedModel,
    text: Sequence[Tensor] | Passage,  # [b, s] each
    group: distributed.ProcessGroup = None,
    speed: bool = True,
) -> Measurement:
    """Measures a model.

    Args:
        model: The model, LoRA merged unless it is in shards.
        text: Held-out text, cut for the model's tokenizer; or token ids, of which all but the first of a row count.
        group: The processes that share the work; each gets the result.
        speed: Whether the first process measures the speed, for which it must hold the whole model.
    """
    in_blocks, in_all = parameters(model)
    if isinstance(text, Passage):
        quality, first = judge(model, text, group), text.windows[0]
        value, bits = quality.perplexity, quality.bits_per_byte
    else:
        value, bits, first = perplexity(model, text, group), None, text[0][:1]
    alone = speed and distributed.rank(group) == 0
    rate = distributed.broadcast_object(tokens_per_second(model, first) if alone else None, group)
    return Measurement(value, in_blocks, in_all, saved_bytes(model), rate, bits)


def measurement_table(rows: dict[str, Measurement]) -> str:
    """A table of measurements, one row each.

    Example:
        >>> print(measurement_table({"dense": Measurement(20.0, 100, 150, 600_000_000, 10.0)}))
        model       perplexity   in blocks  parameters   on disk   tokens/s
        dense            20.00         100         150    600 MB       10.0
    """
    bits = any(row.bits_per_byte is not None for row in rows.values())
    lines = [["model", "perplexity", *["bits/byte"] * bits, "in blocks", "parameters", "on disk", "tokens/s"]]
    for name, row in rows.items():
        quality = [f"{row.perplexity:.2f}"]
        quality += ["-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"] * bits
        size = [f"{row.block_parameters:,}", f"{row.parameters:,}", format_value(row.bytes, "bytes")]
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
        lines.append([name, *quality, *size, speed])
    return text_table(lines, [11, 11, *[11] * bits, 12, 12, 10, 11])


def as_dict(rows: dict[str, Measurement]) -> dict[str, dict[str, float]]:
    """Measurements in JSON's types, without figures that were not taken."""
    return {name: {k: v for k, v in asdict(row).items() if v is not None} for name, row in rows.items()}


def _count(module: nn.Module) -> int:
    return sum(_numel(parameter) for _, parameter in base_parameters(module))


def _numel(parameter: Tensor) -> int:
    """The size of a parameter, which under ZeRO-3 is empty between uses."""
    return cast(int, getattr(parameter, "ds_numel", parameter.numel()))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
