"""What the programs that serve a model ask of a pruned one, as a constraint on the methods before they prune.

A place loads models in one or more ways: as a stock checkpoint, whose config holds one size for all blocks, or by an
architecture with sizes of its own for each block. Which way is taken depends on the family and on the method; a way
that the method cannot serve says what to change. The facts:

- llama.cpp's architecture `deci` sizes every tensor by block, adds any bias, and refuses a first block without
  attention; `openelm` does so for Qwen3, with attention everywhere, no biases and the embedding as head. Its other
  architectures take their sizes from the first block, and most of them the dimension of a head from the model's width.
  Rows of q8_0 are whole blocks of 32 values.
- DeciLM, which vLLM, SGLang, TensorRT-LLM and mlx-lm load, stores widths as a factor that is rounded up to 256, has the
  same query heads everywhere, and no biases.
- Under tensor parallelism every device takes the same number of channels and of query heads, and as many kv heads or
  a copy of one.

A new place or architecture is a record in :data:`WAYS`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from plprune.anatomy import Block, Group, innermost, matrix

Place = Literal["llama.cpp", "vllm", "transformers"]


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

    def counts(self, block: Block, group: Group) -> Sequence[int]:
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


@dataclasses.dataclass(frozen=True)
class Way:
    """How a place loads pruned models of some families.

    Args:
        name: What it loads them as.
        families: Which.
        asks: What they must be like.
        settings: Keys of the config with the one value that they may have, if they are there.
    """

    name: str
    families: frozenset[str]
    asks: Constraint
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def takes(self, config: PreTrainedConfig) -> bool:
        settings = all(getattr(config, key, value) == value for key, value in self.settings.items())
        return config.model_type in self.families and settings


def _way(name: str, families: str, asks: Constraint, **settings: Any) -> Way:
    return Way(name, frozenset(families.split()), asks, settings)


_HELD = Constraint(whole_heads=True, first_attention=True)
_ALIKE = Constraint(whole_heads=True, uniform=True, every_attention=True)
_PLAIN = dataclasses.replace(_ALIKE, dense_biases=True)
_DENSE = dataclasses.replace(_PLAIN, dense_heads=True)
_DIVIDING = Constraint(heads_divide=True)  # as the family's config demands
_Q8_0 = Constraint(width_multiple=32)  # values that share a scale
_DECILM = Constraint(width_multiple=256, dense_heads=True, dense_biases=True)
_STOCK, _OWN = "a stock checkpoint", "the family's own architecture"

WAYS: dict[Place, tuple[Way, ...]] = {  # of each, the first that a method can serve is taken
    "llama.cpp": (
        _way("deci", "llama mistral qwen2 granite", _Q8_0 & _HELD),
        _way(
            "openelm",
            "qwen3",
            _Q8_0 & Constraint(whole_heads=True, dense_biases=True, every_attention=True),
            tie_word_embeddings=True,
            attention_bias=False,
        ),
        _way(_OWN, "qwen3 gemma2 gemma3_text smollm3", _Q8_0 & _PLAIN),
        _way(_OWN, "phi3 gpt_neox gpt2 phi olmo2 cohere2", _Q8_0 & _DENSE),
    ),
    "vllm": (
        _way(_STOCK, "llama", _ALIKE & _DIVIDING),
        _way(_STOCK, "granite", _ALIKE),
        _way(_STOCK, "gemma2 gemma3_text", _PLAIN & _DIVIDING),
        _way(_STOCK, "mistral qwen3 phi3", _PLAIN),
        _way(_STOCK, "qwen2 opt gpt_neox gpt2 phi olmo2 smollm3 cohere2", _DENSE),
        _way("DeciLM", "llama", _DECILM & _HELD, attention_bias=False, mlp_bias=False),
    ),
    "transformers": (),
}


def constraint(
    places: Sequence[Place],
    tensor_parallel: int,
    conflicts: Callable[[Constraint], list[str]],
    config: PreTrainedConfig | None = None,
) -> Constraint:
    """The strictest of what all places ask.

    Args:
        places: Where the pruned model must load.
        tensor_parallel: Devices that will share it.
        conflicts: Why a method cannot honour a constraint, and what to change; empty if it can.
        config: The model's; if not given, a way counts that is there for any family.

    Raises:
        ValueError: A place cannot load models of the family, or the method cannot honour what it asks.
    """
    if unknown := [place for place in places if place not in get_args(Place)]:
        raise ValueError(f"nothing is known of serving on {unknown[0]!r}; known places: {', '.join(get_args(Place))}")
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, but it is a number of devices: 1 or more")
    asked = Constraint(tensor_parallel=tensor_parallel, whole_heads=tensor_parallel > 1)
    if reasons := conflicts(asked):
        raise ValueError(f"{tensor_parallel} devices could not share the result: {' and '.join(reasons)}")
    for place in places:
        asked &= _asks(place, conflicts, config) if WAYS[place] else FREE
    return asked


def adds_biases(blocks: Sequence[Block] | None) -> bool:
    """Whether biases of all consumers would be new to a model; yes if it is not known."""
    return blocks is None or any(block.absent_bias(group) for block in blocks for group in block.groups())


def _asks(place: Place, conflicts: Callable[[Constraint], list[str]], config: PreTrainedConfig | None) -> Constraint:
    """What the first way asks that a method can serve."""
    ways = [way for way in WAYS[place] if config is None or way.takes(config)]
    if not ways and config is not None:
        raise ValueError(f"{place} has no architecture for {config.model_type!r}: take {place} out of `serve_on`")
    reasons: dict[str, list[str]] = {}
    for way in ways:
        found = conflicts(way.asks)
        if not found:
            return way.asks
        reasons.setdefault(way.name, found)
    fewest = min(map(len, reasons.values()))
    each = (f"as {name}, {' and '.join(found)}" for name, found in reasons.items() if len(found) == fewest)
    raise ValueError(f"{place} would not load the result: {'; '.join(each)}")


def _sizes(block: Block) -> tuple[int, int]:
    attention = block.kv_heads if block.has_attention else 0
    return attention, block.channels


def _lacks_channels(block: Block) -> bool:
    return hasattr(block.part(block.family.output), "index")


def _has_added_bias(block: Block) -> bool:
    """Whether the FFN's output has a bias, and its input none, as in no family."""
    before, after = (innermost(block.part(path)) for path in (block.family.ffn_in[0], block.family.ffn_out))
    return before.bias is None and after.bias is not None
