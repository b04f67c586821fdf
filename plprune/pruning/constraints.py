"""Constraints on the sizes of a pruned model, so that a runtime can load it."""

import dataclasses
import math
from collections.abc import Sequence

from plprune.architecture.blocks import STEP, Block, UnitGroup
from plprune.architecture.modules import innermost, matrix


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Requirements on a pruned model; the default requires nothing.

    Args:
        width_multiple: Every FFN's width is a multiple of this.
        tensor_parallel: The number of devices that share every block. It divides FFN widths and query heads, and it
            divides the number of kv heads or is a multiple of it.
        whole_heads: Value channels are removed by whole heads only.
        uniform: All blocks have the same sizes, including their attention.
        dense_heads: Heads are removed only together with the whole attention of a block.
        dense_biases: No projection gains a bias.
        first_attention: The first block keeps its attention.
        every_attention: All blocks keep their attention.
        every_ffn: All blocks keep some channels of their FFN.
        heads_divide: The number of query heads divides the model's width.
    """

    width_multiple: int = 1
    tensor_parallel: int = 1
    whole_heads: bool = False
    uniform: bool = False
    dense_heads: bool = False
    dense_biases: bool = False
    first_attention: bool = False
    every_attention: bool = False
    every_ffn: bool = False
    heads_divide: bool = False

    def __and__(self, other: "Constraint") -> "Constraint":
        """Combines the requirements of both.

        Example:
            >>> (Constraint(width_multiple=32) & Constraint(width_multiple=48, uniform=True)).width_multiple
            96
        """
        flags = [f.name for f in dataclasses.fields(self) if f.default is False]
        return Constraint(
            math.lcm(self.width_multiple, other.width_multiple),
            math.lcm(self.tensor_parallel, other.tensor_parallel),
            **{name: getattr(self, name) or getattr(other, name) for name in flags},
        )

    @property
    def given(self) -> "tuple[Constraint, ...]":
        """The additional arguments of a method: none if nothing is required, as it may not support constraints."""
        return () if self == FREE else (self,)

    def counts(self, block: Block, group: UnitGroup) -> Sequence[int]:
        """The numbers of units that a block may keep of a group, ascending.

        Raises:
            ValueError: No number is allowed.
        """
        if group.kind == "ffn":
            return self._widths(len(group))
        if group.kind == "expert_channel":
            return self._widths(len(group), STEP) if len(group) >= STEP else [len(group)]
        return self._kv_heads(block) if group.kind == "attention" else range(1, len(group) + 1)

    def check_model(self, blocks: Sequence[Block]) -> None:
        """Raises ValueError if a model that was pruned before already violates the constraint."""
        attentions = [block for block in blocks if block.has_attention]
        faults = {
            "its first block has no attention": self.first_attention and not blocks[0].has_attention,
            "a block has no attention": self.every_attention and len(attentions) < len(blocks),
            "a block has no FFN": self.every_ffn and not all(block.has_ffn for block in blocks),
            "it lacks single value channels": self.whole_heads and any(map(_lacks_channels, attentions)),
            "its blocks have different sizes": self.uniform
            and len({(block.has_attention and block.kv_heads, block.channels) for block in blocks}) > 1,
            "it lacks heads": self.dense_heads and any(b.kv_heads != len(b.attention) for b in attentions),
            "it has biases that its family does not have": self.dense_biases and any(map(_gains_bias, blocks)),
        }
        for fault, found in faults.items():
            if found:
                raise ValueError(
                    f"`serve_on` cannot be honoured for this model, as {fault}: prune the dense model, or change "
                    "`serve_on`"
                )

    def check_heads(self, blocks: Sequence[Block]) -> None:
        """Raises ValueError if the constraint does not allow blocks to keep all their heads."""
        for block in blocks:
            if block.has_attention and block.kv_heads not in (allowed := self._kv_heads(block)):
                raise ValueError(
                    f"block {block.index} has {block.kv_heads} kv heads, but {self._devices} can share only "
                    f"{', '.join(map(str, allowed))}: change `tensor_parallel`, or use a method that prunes kv heads"
                )

    def _widths(self, dense: int, step: int = 1) -> Sequence[int]:
        multiple = math.lcm(self.width_multiple, self.tensor_parallel, step)
        if dense < multiple:
            raise ValueError(
                f"an FFN of width {dense} cannot be a multiple of {multiple}, as `serve_on` and `tensor_parallel` "
                "require: change them, or pad the widths when you export"
            )
        return range(multiple, dense + 1, multiple)

    def _kv_heads(self, block: Block) -> Sequence[int]:
        width, each = len(matrix(block.part(block.attention.consumer.path))), block.queries_per_head
        counts = [
            kv
            for kv in range(1, block.kv_heads + 1)
            if _heads_divide(kv, each, self.tensor_parallel)
            and not (self.heads_divide and width % (kv * each))
            and not (self.dense_heads and kv != block.kv_heads)
        ]
        if not counts:
            raise ValueError(
                f"no number of kv heads of block {block.index} ({block.kv_heads} of {each} query heads each) suits "
                f"{self._devices}: change `tensor_parallel`"
            )
        return counts

    @property
    def _devices(self) -> str:
        return f"{self.tensor_parallel} device{'s' * (self.tensor_parallel > 1)}"


FREE = Constraint()
MOST = 64  # devices


def device_counts(blocks: Sequence[Block]) -> list[int]:
    """The numbers of devices, up to 64, that can share a model under tensor parallelism, as it is."""
    if any(block.has_attention and _lacks_channels(block) for block in blocks):
        return [1]
    widths = [len(group) for block in blocks for group in block.groups() if group.kind in ("ffn", "expert_channel")]
    heads = [(block.kv_heads, block.queries_per_head) for block in blocks if block.has_attention]
    return [
        n
        for n in range(1, MOST + 1)
        if not any(width % n for width in widths) and all(_heads_divide(*each, n) for each in heads)
    ]


def _heads_divide(kv: int, each: int, devices: int) -> bool:
    """Whether devices can share `kv` heads of `each` query heads: each gets as many, or one kv head is copied."""
    return kv * each % devices == 0 and (kv % devices == 0 or devices % kv == 0)


def _lacks_channels(block: Block) -> bool:
    """Whether the consumer of a block's attention reads only some value channels."""
    return hasattr(block.part(block.attention.consumer.path), "index")


def _gains_bias(block: Block) -> bool:
    """Whether only the FFN's output has a bias, which is so in no family."""
    ffn = block.anatomy.ffn
    if ffn is None or not block.has_ffn:
        return False
    before, after = (innermost(block.part(path)) for path in (ffn.producers[0].path, ffn.consumer.path))
    return before.bias is None and after.bias is not None
