r"""Time and memory that calibration and recovery need on a machine.

Training is assumed to keep, for each token of a step and in each block, what the backward pass reads: the inputs of the
adapters in float32, as PEFT casts them, and the inputs of activation functions, norms and attention. With gradient
checkpointing it keeps the input of each block, and one block in full.

Symbols: B blocks, d model width, n FFN width, H query heads, hd head dimension, V vocabulary.
"""

import dataclasses

from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import innermost, matrix
from plprune.planning.hardware import CROSSING, Machine
from plprune.planning.sizes import attention_spans, block_flops, linear_layers, structure
from plprune.pruning.losses import rows_per_chunk


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
    once = sum(block_flops(block, length, window) for block, window in zip(blocks, attention_spans(model), strict=True))
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
    trained = sum(
        rank * (m.weight.numel() // len(m.weight) + len(m.weight)) for b in blocks for m in linear_layers(b.module)
    )
    each = [_kept_for_backward(block, size) for block in blocks]
    kept = len(blocks) * model.config.hidden_size * size + max(each) if checkpointing else sum(each)
    vocabulary = model.config.vocab_size
    rows = min(tokens, rows_per_chunk(vocabulary, on_cpu=not where.separate))
    logits = rows * vocabulary * (2 * size + 12)  # float32: logits, their logarithms, gradients
    memory = weights + 16 * trained + tokens * kept + logits
    flops = structure(model, length).reading_flops
    inside = sum(
        block_flops(block, length, window) for block, window in zip(blocks, attention_spans(model), strict=True)
    )
    once = 2 * flops + (inside if checkpointing else 0)  # backward: only what leads to inputs
    once += 3 * 2 * trained
    return Need(steps * tokens * once / where.rate(model.dtype), memory, memory if not where.separate else weights)


def _live(block: Block) -> int:
    """Values for a token that are in memory at once while a block runs: about those of its widest part."""
    d = len(matrix(block.part(block.family.ffn_out)))
    return 3 * d + max(3 * block.channels, 4 * d)


def _kept_for_backward(block: Block, size: int) -> int:
    """Bytes for a token that the backward pass of a block with adapters reads."""
    d, n = len(matrix(block.part(block.family.ffn_out))), block.channels
    attention = block.kv_heads * block.queries_per_head * block.head_dim if block.has_attention else 0
    keys = 2 * block.kv_heads * block.head_dim if block.has_attention else 0
    inputs = sum(innermost(m).weight.numel() // len(matrix(m)) for m in linear_layers(block.module))
    return 4 * inputs + size * (2 * d + 2 * attention + keys + 3 * n)
