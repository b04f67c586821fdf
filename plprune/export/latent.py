"""How llama.cpp has latent attention: a latent per token for keys and values, and one kv head for all queries.

What unfolds the latent is two tensors in a file, one for keys and one for values; transformers has one projection.
The cache holds the latent and the rotated part of a key.
"""

from collections.abc import Iterator
from typing import Any

from gguf import Keys
from torch import Tensor, nn

from plprune.architecture.blocks import Block
from plprune.architecture.modules import detached, matrix

LITE = (26, 27)  # numbers of blocks at which llama.cpp expects queries without a latent of their own
SHORT = (48, 128256)  # so are this number of blocks with this vocabulary


def is_latent(block: Block) -> bool:
    """Whether a block has latent attention."""
    return block.has_attention and hasattr(_mixer(block), "kv_lora_rank")


def refusals(block: Block, depth: int, vocabulary: int) -> Iterator[str]:
    """Reasons why llama.cpp does not compute the latent attention of a model of some blocks and words."""
    lite = depth in LITE or (depth, vocabulary) == SHORT
    if lite != (_mixer(block).q_lora_rank is None):
        yield (
            f"queries have {'a' if lite else 'no'} latent, and llama.cpp's deepseek2 expects otherwise of {depth} "
            "blocks: take out other numbers of blocks"
        )


def fields(block: Block) -> dict[str, Any]:
    """The sizes of a block's attention, by the keys of a file."""
    mixer = _mixer(block)
    rank, rotated = mixer.kv_lora_rank, mixer.qk_rope_head_dim
    found = {
        Keys.Attention.HEAD_COUNT_KV: 1,
        Keys.Attention.KEY_LENGTH: rank + rotated,
        Keys.Attention.VALUE_LENGTH: rank,
        Keys.Attention.KEY_LENGTH_MLA: head_dim(block),
        Keys.Attention.VALUE_LENGTH_MLA: mixer.v_head_dim,
        Keys.Attention.KV_LORA_RANK: rank,
    }
    return found if mixer.q_lora_rank is None else found | {Keys.Attention.Q_LORA_RANK: mixer.q_lora_rank}


def head_dim(block: Block) -> int:
    """Channels of a query head."""
    return _mixer(block).qk_nope_head_dim + _mixer(block).qk_rope_head_dim


def query(block: Block) -> str:
    """llama.cpp's name of the projection of queries."""
    return "attn_q" if _mixer(block).q_lora_rank is None else "attn_q_b"


def path(block: Block) -> str:
    """Path of the projection that unfolds the latent."""
    return block.attention.producers[-1].path


def tensors(block: Block, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors that unfold the latent, by llama.cpp's names; none if the block has no latent attention."""
    if not is_latent(block):
        return
    value, mixer = detached(matrix(block.part(path(block))), meta), _mixer(block)
    keys, values = value.unflatten(0, (block.kv_heads, -1)).split([mixer.qk_nope_head_dim, mixer.v_head_dim], dim=1)
    yield "attn_k_b.weight", keys.mT.contiguous()
    yield "attn_v_b.weight", values.contiguous()


def _mixer(block: Block) -> Any:
    found: nn.Module = block.part(block.anatomy.mixer)
    return found
