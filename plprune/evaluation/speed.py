"""Measures how fast a model generates text and how much memory it uses, and compares two models.

A model reads a prompt and generates greedily with a key-value cache, always the same number of tokens, so that runs are
comparable. After a warm-up run, each figure is measured several times and given as the median with quartiles; two
figures whose quartiles overlap count as equal.

The batch size is doubled until throughput hardly grows: the machine is then saturated. At batch 1 each token reads all
weights, so memory bandwidth limits the speed; at saturation, arithmetic does.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.architecture.modeling_plprune import Gather, Scatter
from plprune.architecture.modules import matrix
from plprune.architecture.wrappers import text_config
from plprune.evaluation.standalone import greedy_tokens
from plprune.io.checks import check_sizes
from plprune.io.tables import text_table
from plprune.io.units import format_value
from plprune.pruning.forward import evaluating

GAIN = 1.1  # doubling stops at a batch that gains less
ENDS = {"gain": "more gains less than 10%", "cap": "none larger was tried", "memory": "more does not fit"}
MULTIPLES = (8, 32, 64)  # vector units and matrix kernels are made for such widths


@dataclass(frozen=True)
class Spread:
    """The median of a figure that was measured several times, with its lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of several values.

        Example:
            >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
            Spread(median=3.0, low=2.0, high=4.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Speed:
    """Speed and memory of a model that generates.

    Args:
        device: Name of the device.
        dtype: Of the weights.
        threads: Of the CPU.
        prompt: Tokens of the prompt.
        new_tokens: Tokens generated.
        repeats: How often each figure was measured.
        first_token: Seconds until the first token, at batch 1.
        reading: Tokens of the prompt read per second, at batch 1.
        writing: Tokens generated per second after the first, at batch 1.
        saturated: The same over all sequences of the batch that generates most.
        batch: The size of that batch.
        ended_by: Why no larger batch was tried or taken: gain, cap or memory.
        peak: Peak of memory in bytes, at batch 1; None if it is unknown.
        saturated_peak: The same over all batches.
        peak_of: The kind of memory.
        weights: Bytes of the weights.
        widths: The width of the FFN in each block.
        attention_widths: Columns of the attention's output projection in each block; 0 without attention.
        gathers: Number of projections that also gather or scatter single channels, as for FASP's value channels.
    """

    device: str
    dtype: str
    threads: int
    prompt: int
    new_tokens: int
    repeats: int
    first_token: Spread
    reading: Spread
    writing: Spread
    saturated: Spread
    batch: int
    ended_by: str
    peak: int | None
    saturated_peak: int | None
    peak_of: str
    weights: int
    widths: list[int]
    attention_widths: list[int]
    gathers: int


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel, prompt: int = 128, new_tokens: int = 32, repeats: int = 5, max_batch: int | None = None
) -> Speed:
    """Measures the speed of a model on its device.

    Args:
        model: A causal language model.
        prompt: Tokens of the prompt.
        new_tokens: Tokens to generate.
        repeats: How often each figure is taken.
        max_batch: The largest batch to try; 16 on a CPU and 256 elsewhere if not given.

    Raises:
        ValueError: A size is out of range, or too long for the model.
    """
    check_sizes(prompt=prompt, repeats=repeats, max_batch=max_batch)
    _check_length(model, prompt, new_tokens)
    cap = max_batch or (16 if model.device.type == "cpu" else 256)
    ids = torch.arange(prompt, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr,operator]
    with evaluating(model), _memory_peak(model.device) as peak:
        runs = _runs(model, ids, new_tokens, repeats)
        alone = peak()
        writing = Spread.of([(new_tokens - 1) / rest for _, rest in runs])
        batch, saturated, ended_by = _saturate(model, ids, new_tokens, repeats, cap, writing)
        largest = peak()
    return Speed(
        device=_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        prompt=prompt,
        new_tokens=new_tokens,
        repeats=repeats,
        first_token=Spread.of([first for first, _ in runs]),
        reading=Spread.of([prompt / first for first, _ in runs]),
        writing=writing,
        saturated=saturated,
        batch=batch,
        ended_by=ended_by,
        peak=alone,
        saturated_peak=largest,
        peak_of="memory allocated on the device" if model.device.type == "cuda" else "resident set of the process",
        **_shape(model),
    )


def why_not_faster(dense: Speed, pruned: Speed) -> list[str]:
    """Lines that say where a pruned model is not faster than the dense one, and why; empty if it is faster everywhere.

    Raises:
        ValueError: They were measured under different conditions.
    """
    alike = [(s.device, s.dtype, s.threads, s.prompt, s.new_tokens) for s in (dense, pruned)]
    if alike[0] != alike[1]:
        raise ValueError(
            "two speeds cannot be compared: measure both on one machine, in one dtype, with equal numbers of tokens"
        )
    figures = {
        "reading the prompt is": (dense.reading, pruned.reading),
        "writing at batch 1 is": (dense.writing, pruned.writing),
        "writing at saturation is": (dense.saturated, pruned.saturated),
    }
    slow = {what: pair for what, pair in figures.items() if pair[1].low <= pair[0].high}
    lines = [_not_faster(what, *pair) for what, pair in slow.items()]
    return lines + _reasons(dense, pruned, "writing at batch 1 is" in slow) if lines else []


def speed_table(stages: dict[str, Speed]) -> str:
    """Speeds side by side, a column for each model: medians, and quartiles in brackets."""
    speeds = list(stages.values())
    rows = [
        ["", *stages],
        ["first token, ms", *(_cell(s.first_token, 1000) for s in speeds)],
        ["reading, tokens/s", *(_cell(s.reading) for s in speeds)],
        ["writing, batch 1, tokens/s", *(_cell(s.writing) for s in speeds)],
        ["writing, saturated, tokens/s", *(_cell(s.saturated) for s in speeds)],
        ["batch, saturated", *(f"{s.batch} ({ENDS[s.ended_by]})" for s in speeds)],
        ["peak, batch 1", *(format_value(s.peak, "bytes") for s in speeds)],
        ["peak, all batches", *(format_value(s.saturated_peak, "bytes") for s in speeds)],
    ]
    one = speeds[0]
    foot = (
        f"{one.prompt} tokens read, {one.new_tokens} written; {one.dtype}, {one.device}, {one.threads} CPU threads; "
        f"medians and quartiles of {one.repeats} runs after one to warm up; the peak is of the {one.peak_of}"
    )
    return text_table(rows, [30, *[34] * len(speeds)], "<" * len(rows[0])) + f"\n{foot}"


def _cell(spread: Spread, scale: float = 1) -> str:
    return f"{spread.median * scale:.1f} [{spread.low * scale:.1f}, {spread.high * scale:.1f}]"


def _not_faster(what: str, dense: Spread, pruned: Spread) -> str:
    how = "slower" if pruned.high < dense.low else "not faster beyond the spread"
    return f"{what} {how}: {pruned.median:.1f} tokens/s, dense {dense.median:.1f}"


def _reasons(dense: Speed, pruned: Speed, at_batch_1: bool) -> list[str]:
    reasons, left = [], pruned.weights / dense.weights
    if at_batch_1 and left < 1:
        reasons.append(
            f"at batch 1 reading the weights dominates: {1 - left:.0%} fewer bytes can give {1 / left:.2f} times the "
            "speed at most"
        )
        if left < 0.95:
            rates = [speed.weights * speed.writing.median / 1e9 for speed in (dense, pruned)]
            reasons.append(
                f"weights are read at {rates[1]:.1f} GB/s, dense {rates[0]:.1f}: where this falls, the fixed costs of "
                "operations, of which there are as many as before, or their widths count for more than bytes"
            )
    if left >= 1:
        reasons.append("its weights take as many bytes as the dense model's")
    widths = {"FFN": (dense.widths, pruned.widths), "attention": (dense.attention_widths, pruned.attention_widths)}
    reasons += [line for part, pair in widths.items() if (line := _odd(part, *pair))]
    if pruned.gathers:
        reasons.append(
            f"{pruned.gathers} projections pick or place single value channels, which costs a copy each time: prune "
            "whole heads, as FASP does with `attention: kv_heads`"
        )
    return reasons


def _odd(part: str, before: Sequence[int], after: Sequence[int]) -> str | None:
    """A line on widths that suit kernels badly; None if there are no more of them than before."""
    for multiple in MULTIPLES:
        odd, dense = (sum(width % multiple > 0 for width in widths) for widths in (after, before))
        if odd > dense:
            return (
                f"{odd} of {len(after)} {part} widths are no multiples of {multiple}, which kernels are made for: "
                "prune to multiples, or pad when you export"
            )
    return None


def _saturate(
    model: PreTrainedModel, ids: Tensor, new_tokens: int, repeats: int, max_batch: int, alone: Spread
) -> tuple[int, Spread, str]:
    """The batch that generates most, its tokens per second, and why no larger batch was taken."""
    sizes, best = [1], alone
    while (batch := sizes[-1] * 2) <= max_batch:
        try:
            runs = _runs(model, ids.expand(batch, -1), new_tokens, repeats)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            return sizes[-1], best, "memory"
        speed = Spread.of([batch * (new_tokens - 1) / rest for _, rest in runs])
        gain = speed.median / best.median
        if gain > 1:
            best = speed
            sizes.append(batch)
        if gain < GAIN:
            return sizes[-1], best, "gain"
    return sizes[-1], best, "cap"


def _runs(model: PreTrainedModel, ids: Tensor, new_tokens: int, repeats: int) -> list[tuple[float, float]]:
    """Seconds to the first token, and from there to the last, of each run after the warm-up."""
    runs = []
    for _ in range(repeats + 1):
        tokens = greedy_tokens(model, ids, new_tokens)
        start = _now(model.device)
        next(tokens)
        first = _now(model.device)
        for _ in tokens:
            pass
        runs.append((first - start, _now(model.device) - first))
    return runs[1:]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _memory_peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Gives a function that returns the peak of memory since the context began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
    else:
        with contextlib.suppress(OSError):  # if forbidden, the peak is that since the process started
            Path("/proc/self/clear_refs").write_text("5")
        yield _resident_peak


def _resident_peak() -> int | None:
    with contextlib.suppress(OSError, StopIteration):  # not Linux
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _check_length(model: PreTrainedModel, prompt: int, new_tokens: int) -> None:
    if new_tokens < 2:
        raise ValueError(f"new_tokens is {new_tokens}, but must be at least 2, as the first is timed with the prompt")
    most = getattr(text_config(model.config), "max_position_embeddings", None)
    if most is not None and prompt + new_tokens > most:
        raise ValueError(
            f"the model takes {most} tokens, fewer than {prompt} + {new_tokens}: lower prompt or new_tokens"
        )


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """The parts of a model's structure that affect its speed."""
    blocks = blocks_of(model)
    attentions = [matrix(b.part(b.attention.consumer.path)).shape[1] if b.has_attention else 0 for b in blocks]
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "widths": [block.channels for block in blocks],
        "attention_widths": attentions,
        "gathers": sum(isinstance(module, Gather | Scatter) for module in model.modules()),
    }
