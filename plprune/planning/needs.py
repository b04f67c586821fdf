r"""Estimates the time and memory that calibration and recovery need on a machine.

The estimate assumes that training keeps, per token and block, the inputs of the adapters in float32 (PEFT casts them)
and the inputs of activation functions, norms and attention. With gradient checkpointing, it keeps these for one block
at a time, and of the other blocks only their input.

Symbols: B blocks, d model width, n FFN width, H query heads, hd head dimension, V vocabulary.
"""

import dataclasses

from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import innermost, matrix
from plprune.architecture.wrappers import text_config
from plprune.planning.hardware import COPY_RATE, Machine
from plprune.planning.sizes import attention_spans, block_flops, linear_layers, structure
from plprune.pruning.losses import rows_per_chunk


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that calibration needs in addition to one pass over the blocks."""

    flops: float = 0.0  # in the model's dtype
    single: float = 0.0  # operations in float32 or float64
    bytes: float = 0.0  # peak memory in addition to the block


@dataclasses.dataclass(frozen=True)
class Need:
    """Time in seconds, and memory in bytes on the device and on the host; both are the same memory for a CPU."""

    seconds: float
    device_bytes: float
    host_bytes: float


def calibration_need(
    model: PreTrainedModel, work: Work, machine: Machine, windows: tuple[int, int, int], stream: bool = False
) -> Need:
    """Estimates what pruning needs.

    Args:
        model: The dense model; its parameters may be on the meta device.
        work: The work that the method adds.
        machine: The machine that computes.
        windows: The number of windows, the tokens per window, and the windows per batch.
        stream: Whether the model stays on disk.
    """
    count, length, batch = windows
    blocks, dtype = blocks_of(model), model.dtype
    tokens, size = count * length, dtype.itemsize
    block = max(block.parameters() for block in blocks) * size
    states = 2 * tokens * text_config(model.config).hidden_size * size  # inputs and outputs of a block
    d = text_config(model.config).hidden_size
    running = block + states + batch * length * size * max(_live(each, d) for each in blocks) + work.bytes
    every = sum(p.numel() for p in model.parameters()) * size
    inside = sum(block.parameters() for block in blocks) * size
    waiting = every - inside + block if stream else every
    flops = tokens * _flops_of_blocks(model, length) + work.flops
    seconds = flops / machine.rate(dtype) + work.single / machine.single
    if machine.separate:
        return Need(seconds + 2 * inside / COPY_RATE, running, waiting + block)
    return Need(seconds, waiting + running, waiting + running)


def recovery_need(
    model: PreTrainedModel,
    machine: Machine,
    batches: tuple[int, int, int],
    rank: int | None,
    checkpointing: bool = False,
) -> Need:
    """Estimates what training by LoRA, or of all weights, needs on one device.

    Args:
        model: The pruned model; its parameters may be on the meta device.
        machine: The machine that trains.
        batches: The number of steps, the windows per step, and the tokens per window.
        rank: The mean rank of the adapters; None if all weights are trained instead, in float32.
        checkpointing: Whether activations are recomputed in the backward pass.
    """
    steps, batch, length = batches
    blocks, size, tokens, text = blocks_of(model), model.dtype.itemsize, batch * length, text_config(model.config)
    every, reading = sum(p.numel() for p in model.parameters()), structure(model, length).reading_flops
    if rank is None:
        weights, states, learning = 4 * every, 12 * every, reading  # learning: the backward pass for weights
    else:
        layers = [m for block in blocks for m in linear_layers(block.module)]
        trained = sum(rank * (m.weight.numel() // len(m.weight) + len(m.weight)) for m in layers)
        weights, states, learning = size * every, 16 * trained, 3 * 2 * trained
    activations = [_kept_for_backward(block, size, text.hidden_size) for block in blocks]
    kept = len(blocks) * text.hidden_size * size + max(activations) if checkpointing else sum(activations)
    vocabulary = text.vocab_size
    rows = min(tokens, rows_per_chunk(vocabulary, on_cpu=not machine.separate))
    logits = rows * vocabulary * (2 * size + 12)  # logits and gradients; in float32 also log-probabilities
    memory = weights + states + tokens * kept + logits
    flops = 2 * reading + learning  # forward, and backward for inputs
    flops += _flops_of_blocks(model, length) if checkpointing else 0
    seconds = steps * tokens * flops / machine.rate(model.dtype)
    return Need(seconds, memory, weights if machine.separate else memory)


def _flops_of_blocks(model: PreTrainedModel, length: int) -> float:
    """Operations of all blocks per token."""
    spans = attention_spans(model)
    return sum(block_flops(block, length, span) for block, span in zip(blocks_of(model), spans, strict=True))


def _live(block: Block, d: int) -> int:
    """Values per token in memory while a block runs, estimated by its widest part."""
    return 3 * d + max(3 * block.channels, 4 * d)


def _kept_for_backward(block: Block, size: int, d: int) -> int:
    """Bytes per token that a block with adapters keeps for its backward pass."""
    n = block.channels
    attention = block.kv_heads * block.queries_per_head * block.head_dim if block.has_kv_cache else 0
    keys = 2 * block.kv_heads * block.head_dim if block.has_kv_cache else 0
    inputs = sum(innermost(m).weight.numel() // len(matrix(m)) for m in linear_layers(block.module))
    return 4 * inputs + size * (2 * d + 2 * attention + keys + 3 * n)
