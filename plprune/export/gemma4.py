"""How llama.cpp has Gemma 4: heads of a size for each kind of attention, and blocks that take others' keys and values.

The last blocks have no keys and values of their own: they take those of the last block before them that has their kind
of attention. Attention without a window rotates a part of each head's pairs, but counts frequencies as if it were all.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from gguf import Keys
from torch import Tensor, nn
from transformers import PreTrainedConfig

from plprune.architecture.blocks import Block
from plprune.architecture.modules import detached, innermost, matrix

ATTENTION = "self_attn"
PROJECTIONS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
UNROTATED = 1e30  # divides a frequency until nothing is left of it


def is_own(block: Block) -> bool:
    """Whether a block has the attention of Gemma 4."""
    return all(hasattr(_mixer(block), name) for name in ("is_kv_shared_layer", "is_sliding", "q_norm"))


def refusals(blocks: Sequence[Block], config: PreTrainedConfig) -> Iterator[str]:
    """Reasons why llama.cpp does not compute a model of Gemma 4."""
    mixers = [_mixer(block) for block in blocks if is_own(block)]
    for sliding in (True, False):
        if len({mixer.head_dim for mixer in mixers if mixer.is_sliding == sliding}) != 1:
            yield (
                f"blocks {'with' if sliding else 'without'} a sliding window have heads of other than one size, which "
                "llama.cpp's gemma4 takes for granted: take a model that has blocks of both kinds"
            )
    if any(innermost(part).bias is not None for mixer in mixers for part in _projections(mixer).values()):
        yield ("llama.cpp's gemma4 has no bias in attention: prune with `repair` none, or restore with `bias` false")
    first = len(blocks) - _sharing(blocks)
    sources = [getattr(_mixer(block), "is_sliding", None) for block in blocks[max(first - 2, 0) : first]]
    if first < len(blocks) and sources != [True, False]:
        yield (
            f"blocks from {first} on share keys and values, for which llama.cpp's gemma4 takes block {first - 2} to "
            f"have a sliding window and block {first - 1} to have none: keep those blocks"
        )
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size:
        yield (
            f"there are {config.vocab_size_per_layer_input} words of per-layer inputs and {config.vocab_size} of the "
            "embedding, and llama.cpp's gemma4 has as many of both"
        )
    full, sliding = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    if (full["rope_type"], sliding["rope_type"]) != ("proportional", "default") or full.get("factor", 1.0) != 1:
        yield (
            f"rotary embeddings are {full['rope_type']!r}, and {sliding['rope_type']!r} where there is a window: "
            "llama.cpp's gemma4 has 'proportional' ones without a factor, and 'default' ones"
        )


def fields(blocks: Sequence[Block], config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes of a model's attention and of its per-layer inputs, by the keys of a file."""
    mixers = [_mixer(block) for block in blocks]
    full, sliding = (next(m.head_dim for m in mixers if m.is_sliding == kind) for kind in (False, True))
    own = {mixer.is_sliding: _heads(mixer, "k_proj") for mixer in mixers if not mixer.is_kv_shared_layer}  # the last
    found = {
        Keys.Attention.HEAD_COUNT: [_heads(mixer, "q_proj") for mixer in mixers],
        Keys.Attention.HEAD_COUNT_KV: [
            own[mixer.is_sliding] if mixer.is_kv_shared_layer else _heads(mixer, "k_proj") for mixer in mixers
        ],
        Keys.Attention.SHARED_KV_LAYERS: _sharing(blocks),
        Keys.Attention.SLIDING_WINDOW_PATTERN: [bool(mixer.is_sliding) for mixer in mixers],
        Keys.LLM.EMBD_LENGTH_PER_LAYER_INP: config.hidden_size_per_layer_input or 0,
    }
    sizes = (Keys.Attention.KEY_LENGTH, Keys.Attention.VALUE_LENGTH, Keys.Rope.DIMENSION_COUNT)
    windowed = (Keys.Attention.KEY_LENGTH_SWA, Keys.Attention.VALUE_LENGTH_SWA, Keys.Rope.DIMENSION_COUNT_SWA)
    found |= dict.fromkeys(sizes, full) | dict.fromkeys(windowed, sliding)
    cap = {Keys.LLM.FINAL_LOGIT_SOFTCAPPING: float(config.final_logit_softcapping or 0)}  # it is 30 if not said
    return found | cap


def rope_factors(rotary: nn.Module | None, base: float) -> Tensor:
    """What divides the frequencies of attention without a window, [head_dim / 2]."""
    actual = cast(Tensor, cast(Any, rotary).full_attention_inv_freq).float().cpu()
    plain = base ** -(torch.arange(len(actual)).float() / len(actual))
    return torch.where(actual == 0, UNROTATED, plain / actual)


def paths(block: Block) -> tuple[str, ...]:
    """Paths of the projections of a block's attention; none if it is not Gemma 4's."""
    return tuple(f"{ATTENTION}.{name}." for name in PROJECTIONS) if is_own(block) else ()


def tensors(block: Block, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The projections of a block's attention and its scalar, by llama.cpp's names; none if it is not Gemma 4's."""
    if not is_own(block):
        return
    for name, module in _projections(_mixer(block)).items():
        yield f"{name}.weight", detached(matrix(module), meta)
    yield "layer_output_scale.weight", detached(cast(Any, block.module).layer_scalar, meta)


def _projections(mixer: Any) -> dict[str, nn.Module]:
    """The projections that an attention has, by llama.cpp's names."""
    found = {name: getattr(mixer, own, None) for own, name in PROJECTIONS.items()}
    return {name: module for name, module in found.items() if module is not None}


def _heads(mixer: Any, name: str) -> int:
    return len(matrix(getattr(mixer, name))) // mixer.head_dim


def _sharing(blocks: Sequence[Block]) -> int:
    """Number of blocks that take others' keys and values."""
    return sum(bool(_mixer(block).is_kv_shared_layer) for block in blocks if is_own(block))


def _mixer(block: Block) -> Any:
    return getattr(block.module, ATTENTION, None)
