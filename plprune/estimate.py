r"""What pruning will come to, before any weight is there: sizes, work, memory, time.

A method says how many units each group would keep (`PruningMethod.foresee`); what that leaves is counted here, on the
skeleton of a model on the meta device. Where data decide, there is one count for each of the extreme cases.

Two counts of the same: :class:`Ledger` adds up what units cost, in no time, and is what targets are solved by;
:func:`rehearse` carries a case out on a copy of the skeleton, by the code that prunes. The tests hold them together.

What is assumed of machines and of training, as no file says it:

- A machine reaches :data:`UTILISATION` of its peak; Llama 3 was trained at 0.38 to 0.43 of it
  (https://arxiv.org/abs/2407.21783, table 4).
- Of a GPU's memory :data:`USABLE` can be had; the rest is the driver's and what is lost between allocations.
- A block crosses from main memory to a GPU at :data:`CROSSING` bytes a second, as pageable memory does.
- A token of a step leaves in each block what the backward pass reads: the inputs of the adapters, in float32, as PEFT
  casts them, and what activation functions, norms and attention read; with gradient checkpointing only the block's
  input, and one block in full.

Symbols: B blocks, d model width, n FFN width, H query heads, hd head dimension, V vocabulary.
"""

import copy
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plprune import hf
from plprune.anatomy import Block, blocks_of, innermost, matrix
from plprune.export import decilm
from plprune.export.formats import FORMATS
from plprune.losses import rows_at_a_time
from plprune.surgery import Surgery

Counts = Mapping[str, int]
UTILISATION, USABLE, CROSSING = 0.4, 0.92, 8e9
PREFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "B": 3, "T": 4}


@dataclasses.dataclass(frozen=True)
class GPU:
    """What a data sheet says of an accelerator.

    Args:
        memory: In bytes.
        half: Operations a second in bfloat16 (float16 where there is none), of dense matrices, summed in float32.
        single: Operations a second in float32, without TF32, which torch leaves off.
    """

    memory: float
    half: float
    single: float


GPUS: dict[str, GPU] = {
    name: GPU(memory * 1e9, half * 1e12, single * 1e12)
    for name, (memory, half, single) in {
        "T4": (16, 65, 8.1),
        "L4": (24, 121, 30.3),
        "A10": (24, 125, 31.2),
        "RTX-3090": (24, 71, 35.6),
        "RTX-4090": (24, 165.2, 82.6),
        "L40S": (48, 362, 91.6),
        "A100-40GB": (40, 312, 19.5),
        "A100-80GB": (80, 312, 19.5),
        "H100": (80, 989, 67),
        "H200": (141, 989, 67),
        "B200": (180, 2250, 75),
        "MI300X": (192, 1307, 163.4),
    }.items()
}
"""From the makers' data sheets, dense rates (half of what is given with sparsity), SXM where there is a choice:
nvidia.com: T4, L4, A10, L40S, A100, H100, H200 and HGX B200 data sheets; the Ampere GA102 and Ada architecture
whitepapers for the two GeForce; amd.com: Instinct MI300X data sheet."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a model is like, by its shapes alone.

    Args:
        parameters: All, tied ones once.
        block_parameters: Those in the decoder blocks.
        weight_bytes: What they take.
        cache_bytes: What keys and values of one sequence of the context's length take.
        reading_flops: Operations for a token of a prompt of that length, on average, the output head included.
        generating_flops: Operations for a token that is generated after it.
    """

    parameters: int
    block_parameters: int
    weight_bytes: int
    cache_bytes: int
    reading_flops: int
    generating_flops: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What calibration takes beyond one pass through the blocks.

    Args:
        flops: Operations in the model's dtype.
        single: Operations in float32 or float64.
        bytes: Memory beside the block, at its peak.
    """

    flops: float = 0.0
    single: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where something is to run.

    Args:
        name: What it is called.
        memory: Bytes that can be had where a block is computed.
        half: Operations a second that can be had in bfloat16 or float16.
        single: Those in float32.
        separate: Whether that memory is an accelerator's own, and the model waits in another.
    """

    name: str
    memory: float
    half: float
    single: float
    separate: bool

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second in a dtype."""
        return self.single if dtype == torch.float32 else self.half


@dataclasses.dataclass(frozen=True)
class Need:
    """What a stage of the work needs.

    Args:
        seconds: Time.
        device_bytes: Memory where it computes.
        host_bytes: Main memory; the same if it computes there.
    """

    seconds: float
    device_bytes: float
    host_bytes: float


# ---- amounts


def amount(given: int | float | str, name: str, unit: str = "") -> int:
    """A number that may be given with a prefix: K, M, B or G, T for powers of 1000, and Ki, Mi, Gi, Ti of 1024.

    Args:
        given: What was given.
        name: Of the setting, for the error.
        unit: What may follow the prefix.

    Raises:
        ValueError: It is no positive number.

    Example:
        >>> amount("5.0B", "target_parameters"), amount("8GiB", "target_memory", "B")
        (5000000000, 8589934592)
    """
    found = re.fullmatch(rf"([\d.]+(?:e\d+)?) *([KMGBT]?)(i?){unit and '(?:B)?'}", str(given).strip(), re.IGNORECASE)
    with_binary = bool(found and found[3])
    try:
        base = float(found[1]) if found else 0.0
    except ValueError:
        base = 0.0
    prefix = found[2].upper() if found else ""
    if prefix == "B" and unit:  # bytes
        prefix = ""
    if base <= 0 or (with_binary and (not unit or not prefix)) or not math.isfinite(base):
        like = "8GiB or 500MB" if unit else "5.0B, 100M or 100000000"
        raise ValueError(f"{name} is {given!r}, but it is an amount like {like}")
    return round(base * (1024 if with_binary else 1000) ** PREFIXES[prefix])


def shown(number: float, unit: str = "") -> str:
    """A number as people say it: in thousands, millions, billions; of bytes in powers of 1024.

    Example:
        >>> shown(4.98e9), shown(123), shown(8 * 1024**3, "B")
        ('4.98B', '123', '8.00 GiB')
    """
    base, prefixes = (1024, ["", "Ki", "Mi", "Gi", "Ti"]) if unit else (1000, ["", "K", "M", "B", "T"])
    power = 0
    while abs(number) >= 0.9995 * base and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    digits = f"{number:.0f}" if power == 0 else f"{number:.2f}" if abs(number) < 99.5 else f"{number:.0f}"
    return f"{digits} {prefixes[power]}{unit}" if unit else f"{digits}{prefixes[power]}"


# ---- what a case leaves


def windows(model: PreTrainedModel) -> list[float]:
    """How many tokens back each block attends to at most; infinite where there is no sliding window."""
    layers, blocks = DynamicCache(config=model.config).layers, blocks_of(model)
    found = [getattr(layer, "sliding_window", None) for layer in layers]
    return [float(size) if size else math.inf for size in (found or [None] * len(blocks))]


class Ledger:
    """Adds up what a model would be if its groups kept some of their units only.

    Args:
        model: Its weights may be on meta.
        biased: Whether consumers that lose units are given a bias.
    """

    def __init__(self, model: PreTrainedModel, biased: bool = False) -> None:
        blocks = blocks_of(model)
        rows = [(b, g) for b in blocks for g in (*b.groups("kv_heads"), *b.groups("value_channels")[:-1])]
        self.costs = {g.name: b.cost(g) for b, g in rows}
        self.sizes = {g.name: len(g) for _, g in rows}
        self.biases = {g.name: b.absent_bias(g) if biased else 0 for b, g in rows}
        self.attention = {f"blocks.{b.index}.attention": b.parameters(b.family.attention) for b in blocks}
        self.dense = sum(p.numel() for p in model.parameters())
        self.width = model.dtype.itemsize
        self._heads = {
            f"blocks.{b.index}.attention": (b.kv_heads, 2 * b.head_dim, window)
            for b, window in zip(blocks, windows(model), strict=True)
            if b.has_attention
        }

    def parameters(self, counts: Counts) -> int:
        """All parameters that would be left."""
        return self.dense - sum(self._gone(name, count) for name, count in counts.items())

    def memory(self, counts: Counts, batch: int, context: int) -> int:
        """Bytes of the weights that would be left, and of the cache of `batch` sequences of `context` tokens."""
        cached = sum(
            counts.get(name, kv_heads) * each * min(context, window)
            for name, (kv_heads, each, window) in self._heads.items()
        )
        return self.width * (self.parameters(counts) + round(batch * cached))

    def _gone(self, name: str, count: int) -> int:
        if count == self.sizes[name]:
            return 0
        if not count and name in self.attention:
            return self.attention[name]
        return (self.sizes[name] - count) * self.costs[name] - self.biases[name]


def rehearse(
    model: PreTrainedModel, counts: Counts, biased: bool = False, method: str = "", sparsity: float = 0.0
) -> PreTrainedModel:
    """A copy of a skeleton that has been pruned, by the code that prunes, to so many units in each group.

    Args:
        model: Its weights are on meta.
        counts: Units that each group keeps; all of those that are not named.
        biased: Whether consumers that lose units are given a bias.
        method: For the plan that the copy carries.
        sparsity: Likewise.
    """
    pruned = copy.deepcopy(model)
    surgery = Surgery(pruned)
    for block in surgery.blocks:
        for group in (*block.groups("value_channels")[:-1], *block.groups("kv_heads")):
            count = counts.get(group.name, len(group))
            gain = torch.zeros(len(matrix(block.part(group.consumer.path)))) if biased and count else None
            if count < len(group):
                surgery.keep(block, group, torch.arange(count), bias_gain=gain)
    surgery.plan(method, {"sparsity": sparsity}, torch.ones(len(surgery.blocks)))
    return pruned


def structure(model: PreTrainedModel, context: int) -> Structure:
    r"""Measures a model by its shapes.

    A token takes two operations for each weight of a linear layer, and :math:`4 H \, hd` in each block for each token
    that it attends to; norms, activation functions and rotary embeddings are not counted.

    Args:
        model: Its weights may be on meta.
        context: Tokens of a sequence.
    """
    blocks, parameters = blocks_of(model), list(model.parameters())
    linear = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    cache, reading, generating = 0, 0.0, 0.0
    for block, window in zip(blocks, windows(model), strict=True):
        if block.has_attention:
            width = block.kv_heads * block.head_dim
            cache += round(2 * width * model.dtype.itemsize * min(context, window))
            reading += 4 * width * block.queries_per_head * mean_span(context, window)
            generating += 4 * width * block.queries_per_head * min(context, window)
    return Structure(
        parameters=sum(p.numel() for p in parameters),
        block_parameters=sum(block.parameters() for block in blocks),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        cache_bytes=cache,
        reading_flops=round(linear + reading),
        generating_flops=round(linear + generating),
    )


def mean_span(context: int, window: float = math.inf) -> float:
    """How many tokens those of a sequence attend to, on average, themselves included.

    Example:
        >>> mean_span(4), mean_span(4, 2)
        (2.5, 1.75)
    """
    full = int(min(context, window))
    return (full * (full + 1) / 2 + (context - full) * full) / context


def exports(model: PreTrainedModel) -> dict[str, list[str]]:
    """Why each format of `plprune export` could not hold a model; nothing if it could."""
    found: dict[str, list[str]] = {"hf": [], "decilm": decilm.refusals(model)}
    if unknown_formats():
        found["gguf"] = ["whether it would is not known without the package gguf: pip install 'plprune[export]'"]
    else:
        from plprune.export import gguf

        found["gguf"] = gguf.refusals(model)
    return {format: found[format] for format in FORMATS}


def unknown_formats() -> list[str]:
    """The formats of which nothing can be said on this machine."""
    return [] if find_spec("gguf") else ["gguf"]


def is_stock(model: PreTrainedModel) -> bool:
    """Whether a pruned model's folder would be a stock checkpoint of its family."""
    return hf.stock_config(model) is not None


# ---- the sparsity for a target


def solve(excess: Callable[[float], float | None], steps: int = 16) -> tuple[float, float]:
    """The least sparsity at which a model is small enough, nearly, and by how much it misses.

    Where sizes come in steps, a smaller sparsity may rarely do too.

    Args:
        excess: What a sparsity leaves, as a share of what may be: at most 1 is enough. None if the method refuses it.
        steps: Parts of the range that are looked at one after another.

    Returns:
        The sparsity, and its excess: above 1 if none is enough, for the one that leaves least.

    Raises:
        ValueError: The method refuses every sparsity.

    Example:
        >>> sparsity, share = solve(lambda s: (1 - s) / 0.7 if s < 0.9 else None)
        >>> round(sparsity, 3), round(share, 3)
        (0.3, 1.0)
    """
    below, best = 0.0, (0.0, math.inf)
    for i in range(steps + 1):
        at = min(i / steps, 1 - 1e-6)
        share = excess(at)
        if share is not None and share <= 1:
            return _refined(excess, below, (at, share)) if at else (at, share)
        if share is None and best[1] < math.inf:  # beyond what the method can do; how far does that go?
            found = _farthest(excess, best[0], at)
            best = min(best, found, key=lambda one: one[1])
            if best[1] <= 1:
                return _refined(excess, below, best)
        if share is not None:
            below, best = at, min(best, (at, share), key=lambda one: one[1])
    if math.isinf(best[1]):
        raise ValueError("no sparsity is possible")
    return best


def _refined(
    excess: Callable[[float], float | None], low: float, found: tuple[float, float], steps: int = 18
) -> tuple[float, float]:
    """Between a sparsity that is too low and one that is enough, the least that is."""
    for _ in range(steps):
        if found[1] > 1 - 1e-4 or found[0] - low < 1e-6:
            break
        middle = (low + found[0]) / 2
        share = excess(middle)
        if share is not None and share <= 1:
            found = middle, share
        else:
            low = middle
    return found


def _farthest(excess: Callable[[float], float | None], low: float, high: float, steps: int = 12) -> tuple[float, float]:
    """Between a sparsity that the method can do and one that it cannot, the one that leaves least."""
    best = low, cast(float, excess(low))
    for _ in range(steps):
        middle = (low + high) / 2
        share = excess(middle)
        if share is None:
            high = middle
        else:
            low, best = middle, min(best, (middle, share), key=lambda one: one[1])
    return best


# ---- machines, memory and time


def machine(device: str, seconds: float = 2.0) -> Machine:
    """A GPU by its name, or a device of this machine, whose speed is measured.

    Args:
        device: One of :data:`GPUS`, in any case; or cpu, cuda, cuda:1.
        seconds: How long to measure.

    Raises:
        ValueError: There is no such GPU.
    """
    named = {name.lower(): name for name in GPUS}
    key = device.lower().replace(" ", "-")
    if key in named:
        gpu = GPUS[named[key]]
        return Machine(named[key], USABLE * gpu.memory, UTILISATION * gpu.half, UTILISATION * gpu.single, True)
    if key.partition(":")[0] not in ("cpu", "cuda") or (key != "cpu" and not torch.cuda.is_available()):
        here = "cpu, or cuda where there is one"
        raise ValueError(f"nothing is known of the device {device!r}: give {here}, or one of {', '.join(GPUS)}")
    place = torch.device(key)
    half, single = (_measured(place, dtype, seconds / 2) for dtype in (torch.bfloat16, torch.float32))
    own = key != "cpu"
    memory = torch.cuda.get_device_properties(place).total_memory if own else _main_memory()
    return Machine(f"this machine ({key})", USABLE * memory, half, single, own)


def calibration_need(
    model: PreTrainedModel,
    work: Work,
    where: Machine,
    windows_: tuple[int, int, int],
    stream: bool = False,
) -> Need:
    """What `plprune prune` needs for a model, or the pruning of a fit.

    Args:
        model: Dense.
        work: What the method adds.
        where: Where blocks are computed.
        windows_: How many windows, the tokens of each, and how many are run at once.
        stream: Whether the model stays on disk.
    """
    count, length, batch = windows_
    blocks, dtype = blocks_of(model), model.dtype
    tokens, size = count * length, dtype.itemsize
    once = sum(block_flops(block, length, window) for block, window in zip(blocks, windows(model), strict=True))
    block = max(block.parameters() for block in blocks) * size
    states = 2 * tokens * model.config.hidden_size * size  # what enters a block and what leaves it
    running = block + states + batch * length * size * max(map(_live, blocks)) + work.bytes
    every = sum(p.numel() for p in model.parameters()) * size
    inside = sum(block.parameters() for block in blocks) * size
    waiting = every - inside + block if stream else every
    seconds = (tokens * once + work.flops) / where.rate(dtype) + work.single / where.single
    if where.separate:
        return Need(seconds + 2 * inside / CROSSING, running, waiting + block)
    return Need(seconds, waiting + running, waiting + running)


def recovery_need(
    model: PreTrainedModel,
    where: Machine,
    batches: tuple[int, int, int],
    rank: int,
    checkpointing: bool = False,
) -> Need:
    """What training by LoRA needs for a pruned model, all on one device.

    Args:
        model: Pruned.
        where: Where it trains.
        batches: Steps, windows of each, and the tokens of a window.
        rank: Mean rank of the adapters.
        checkpointing: Whether activations are computed again in the backward pass.
    """
    steps, batch, length = batches
    blocks, size, tokens = blocks_of(model), model.dtype.itemsize, batch * length
    weights = sum(p.numel() for p in model.parameters()) * size
    trained = sum(rank * (m.weight.numel() // len(m.weight) + len(m.weight)) for b in blocks for m in _linear(b.module))
    each = [_kept_for_backward(block, size) for block in blocks]
    kept = len(blocks) * model.config.hidden_size * size + max(each) if checkpointing else sum(each)
    vocabulary = model.config.vocab_size
    rows = min(tokens, rows_at_a_time(vocabulary, on_cpu=not where.separate))
    logits = rows * vocabulary * (2 * size + 12)  # float32: logits, their logarithms, gradients
    memory = weights + 16 * trained + tokens * kept + logits
    flops = structure(model, length).reading_flops
    inside = sum(block_flops(block, length, window) for block, window in zip(blocks, windows(model), strict=True))
    once = 2 * flops + (inside if checkpointing else 0)  # backward: only what leads to inputs
    once += 3 * 2 * trained
    return Need(steps * tokens * once / where.rate(model.dtype), memory, memory if not where.separate else weights)


def block_flops(block: Block, length: int, window: float = math.inf) -> float:
    """Operations of a block for a token of a sequence, on average."""
    linear = 2 * sum(m.weight.numel() for m in _linear(block.module))
    if not block.has_attention:
        return linear
    return linear + 4 * block.kv_heads * block.queries_per_head * block.head_dim * mean_span(length, window)


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [cast(nn.Linear, m) for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]


def _live(block: Block) -> int:
    """Values for a token that are in memory at once while a block runs: about those of its widest part."""
    d = len(matrix(block.part(block.family.ffn_out)))
    return 3 * d + max(3 * block.channels, 4 * d)


def _kept_for_backward(block: Block, size: int) -> int:
    """Bytes for a token that the backward pass of a block with adapters reads."""
    d, n = len(matrix(block.part(block.family.ffn_out))), block.channels
    attention = block.kv_heads * block.queries_per_head * block.head_dim if block.has_attention else 0
    keys = 2 * block.kv_heads * block.head_dim if block.has_attention else 0
    inputs = sum(innermost(m).weight.numel() // len(matrix(m)) for m in _linear(block.module))
    return 4 * inputs + size * (2 * d + 2 * attention + keys + 3 * n)


def _measured(place: torch.device, dtype: torch.dtype, seconds: float, size: int = 1024) -> float:
    """Operations a second of matrix products."""
    size = size if place.type == "cpu" else 8 * size
    a, b = (torch.randn(size, size, dtype=torch.float32, device=place).to(dtype) for _ in range(2))
    finished = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    torch.mm(a, b)
    finished()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(a, b)
        finished()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def _main_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
