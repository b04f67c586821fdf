"""How llama.cpp has linear attention by the gated delta rule, of Qwen 3.5, among blocks with full attention.

In transformers, value heads that share a key head are neighbours; llama.cpp takes the key heads in turns.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from gguf import Keys
from torch import Tensor

from plprune.architecture.blocks import Block
from plprune.architecture.modules import detached, matrix


def is_delta(block: Block) -> bool:
    """Whether a block has linear attention by the gated delta rule."""
    return bool(block.anatomy.mixer) and all(hasattr(_mixer(block), name) for name in ("in_proj_qkv", "A_log"))


def refusals(blocks: Sequence[Block], name: str) -> Iterator[str]:
    """Reasons why an architecture does not compute the linear attention of a model."""
    mixers = [_mixer(block) for block in blocks if is_delta(block)]
    heads = sorted({len(mixer.A_log) for mixer in mixers})
    if len(heads) > 1:
        yield (
            f"numbers of heads of linear attention differ between blocks ({heads[0]} to {heads[-1]}), and llama.cpp's "
            f"{name} has one: prune as many in every block, or none"
        )
    if any(mixer.head_k_dim != mixer.head_v_dim for mixer in mixers):
        yield f"keys and values of linear attention differ in size, and llama.cpp's {name} has one"


def fields(blocks: Sequence[Block], rotated: int) -> dict[str, Any]:
    """The sizes of linear attention and the blocks that have it, by the keys of a file.

    Args:
        blocks: Of the model.
        rotated: Rotated dimensions of a head of full attention. Time, height and width, which are the same in a text,
            take turns in rotating pairs of them.
    """
    mixer = next(_mixer(block) for block in blocks if is_delta(block))
    return {
        Keys.SSM.CONV_KERNEL: mixer.conv_kernel_size,
        Keys.SSM.INNER_SIZE: len(mixer.A_log) * mixer.head_v_dim,
        Keys.SSM.STATE_SIZE: mixer.head_k_dim,
        Keys.SSM.TIME_STEP_RANK: len(mixer.A_log),
        Keys.SSM.GROUP_COUNT: _key_heads(mixer),
        Keys.Rope.DIMENSION_SECTIONS: [(rotated // 2 + rest) // 3 for rest in (2, 1, 0)] + [0],
        "{arch}.attention.recurrent_layers": [is_delta(block) for block in blocks],
    }


def path(block: Block) -> str:
    """Path of the linear attention."""
    return block.anatomy.mixer


def tensors(block: Block, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a block's linear attention, by llama.cpp's names; none if it has none."""
    if not is_delta(block):
        return
    mixer = _mixer(block)
    keys, size = _key_heads(mixer), mixer.head_v_dim
    order = torch.arange(len(mixer.A_log)).view(keys, -1).T.flatten()
    values = (order[:, None] * size + torch.arange(size)).flatten()
    offset = 2 * keys * mixer.head_k_dim
    mixed = torch.cat((torch.arange(offset), offset + values))
    rows = {
        "attn_qkv.weight": (matrix(mixer.in_proj_qkv), mixed),
        "ssm_conv1d.weight": (mixer.conv1d.weight.squeeze(1), mixed),
        "attn_gate.weight": (matrix(mixer.in_proj_z), values),
        "ssm_beta.weight": (matrix(mixer.in_proj_b), order),
        "ssm_alpha.weight": (matrix(mixer.in_proj_a), order),
        "ssm_dt.bias": (mixer.dt_bias, order),
        "ssm_a": (mixer.A_log, order),
        "ssm_norm.weight": (mixer.norm.weight, torch.arange(size)),
    }
    for name, (value, index) in rows.items():
        value = detached(value, meta)
        taken = value[index.to(value.device)]
        yield name, -taken.float().exp() if name == "ssm_a" else taken
    out = detached(matrix(mixer.out_proj), meta)
    yield "ssm_out.weight", out[:, values.to(out.device)].contiguous()


def _key_heads(mixer: Any) -> int:
    values = len(mixer.A_log) * mixer.head_v_dim
    return (len(matrix(mixer.in_proj_qkv)) - values) // (2 * mixer.head_k_dim)


def _mixer(block: Block) -> Any:
    return cast(Any, block.part(block.anatomy.mixer))
