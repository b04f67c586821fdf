"""What the sizes of a pruned model must be, so that an engine can load it."""

import dataclasses
import math
from collections.abc import Sequence

from transformers import PreTrainedConfig

from plprune.architecture.blocks import Block, UnitGroup
from plprune.architecture.modules import innermost, matrix


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a pruned model must be like; by default anything will do.

    Args:
        width_multiple: What the FFN's width in every block is a multiple of.
        tensor_parallel: Devices that share every block: its FFN's width and its query heads are divisible by their
            number, and its kv heads too, or these are fewer and divide it.
        whole_heads: Whether all value channels of a head stay or leave together.
        uniform: Whether all blocks have the same sizes, their attention included.
        dense_heads: Whether no head leaves, but with a block's whole attention.
        dense_biases: Whether no projection gets a bias that it did not have.
        first_attention: Whether the first block keeps its attention.
        every_attention: Whether all blocks do.
        heads_divide: Whether the number of query heads divides the model's width.
    """

    width_multiple: int = 1
    tensor_parallel: int = 1
    whole_heads: bool = False
    uniform: bool = False
    dense_heads: bool = False
    dense_biases: bool = False
    first_attention: bool = False
    every_attention: bool = False
    heads_divide: bool = False

    def __and__(self, other: "Constraint") -> "Constraint":
        """What both ask.

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

    def counts(self, block: Block, group: UnitGroup) -> Sequence[int]:
        """The numbers of units that a block may keep of a group, ascending.

        Raises:
            ValueError: There is none.
        """
        if group.kind == "ffn":
            return self._widths(len(group))
        return self._kv_heads(block) if group.kind == "attention" else range(1, len(group) + 1)

    def check_model(self, blocks: Sequence[Block], config: PreTrainedConfig) -> None:
        """Makes sure that what a model is already like can be served: it may have been pruned before.

        Raises:
            ValueError: It cannot.
        """
        heads = getattr(config, blocks[0].family.config_keys["heads"])
        attentions = [block for block in blocks if block.has_attention]
        faults = {
            "its first block has no attention": self.first_attention and not blocks[0].has_attention,
            "a block has no attention": self.every_attention and len(attentions) < len(blocks),
            "it lacks single value channels": self.whole_heads and any(map(_lacks_channels, attentions)),
            "its blocks have different sizes": self.uniform and len(set(map(_sizes, blocks))) > 1,
            "it lacks heads": self.dense_heads and any(b.kv_heads * b.queries_per_head != heads for b in attentions),
            "it has biases that the family has not": self.dense_biases and any(map(_has_added_bias, blocks)),
        }
        for fault, found in faults.items():
            if found:
                raise ValueError(
                    f"the model cannot be served where it must be, as {fault}: prune the dense model, or take another "
                    "`serve_on`"
                )

    def check_heads(self, blocks: Sequence[Block]) -> None:
        """Makes sure that blocks whose heads all stay can be served.

        Raises:
            ValueError: They cannot.
        """
        for block in blocks:
            if block.has_attention and block.kv_heads not in (able := self._kv_heads(block)):
                raise ValueError(
                    f"block {block.index} has {block.kv_heads} kv heads, but for {self._sharing} there can be only "
                    f"{', '.join(map(str, able))}: change `tensor_parallel`, or take a method that prunes kv heads"
                )

    def _widths(self, dense: int) -> Sequence[int]:
        multiple = math.lcm(self.width_multiple, self.tensor_parallel)
        if dense < multiple:
            raise ValueError(
                f"an FFN of width {dense} cannot be a multiple of {multiple}, which `serve_on` and `tensor_parallel` "
                "ask for: take another place or fewer devices, or pad the widths when you export"
            )
        return range(multiple, dense + 1, multiple)

    def _kv_heads(self, block: Block) -> Sequence[int]:
        width, each, share = len(matrix(block.part(block.family.output))), block.queries_per_head, self.tensor_parallel
        counts = [
            kv
            for kv in range(1, block.kv_heads + 1)
            if kv * each % share == 0
            and (kv % share == 0 or share % kv == 0)
            and not (self.heads_divide and width % (kv * each))
            and not (self.dense_heads and kv != block.kv_heads)
        ]
        if not counts:
            raise ValueError(
                f"no number of the {block.kv_heads} kv heads of block {block.index}, of {each} query heads each, suits "
                f"{self._sharing}: change `tensor_parallel`"
            )
        return counts

    @property
    def _sharing(self) -> str:
        return f"{self.tensor_parallel} device{'s' * (self.tensor_parallel > 1)}"


FREE = Constraint()


def _sizes(block: Block) -> tuple[int, int]:
    attention = block.kv_heads if block.has_attention else 0
    return attention, block.channels


def _lacks_channels(block: Block) -> bool:
    return hasattr(block.part(block.family.output), "index")


def _has_added_bias(block: Block) -> bool:
    """Whether the FFN's output has a bias, and its input none, as in no family."""
    before, after = (innermost(block.part(path)) for path in (block.family.ffn_in[0], block.family.ffn_out))
    return before.bias is None and after.bias is not None
