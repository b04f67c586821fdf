"""What the programs that serve a model ask of a pruned one, as a constraint on the methods before they prune.

A runtime loads models by one or more paths: as a stock checkpoint, whose config holds one size for all blocks, or by an
architecture with sizes of its own for each block. Which path is taken depends on the family and on the method; a path
that the method cannot serve says what to change. The facts:

- llama.cpp's architecture `deci` sizes every tensor by block, adds any bias, and refuses a first block without
  attention; `openelm` does so for Qwen3, with attention everywhere, no biases and the embedding as head. Its other
  architectures take their sizes from the first block, and most of them the dimension of a head from the model's width.
  Rows of q8_0 are whole blocks of 32 values.
- DeciLM, which vLLM, SGLang, TensorRT-LLM and mlx-lm load, stores widths as a factor that is rounded up to 256, has the
  same query heads everywhere, and no biases.
- Under tensor parallelism every device takes the same number of channels and of query heads, and as many kv heads or
  a copy of one.

A new runtime or architecture is a record in :data:`LOAD_PATHS`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from plprune.architecture.blocks import Block
from plprune.pruning.constraints import FREE, Constraint

Runtime = Literal["llama.cpp", "vllm", "transformers"]


@dataclasses.dataclass(frozen=True)
class LoadPath:
    """How a runtime loads pruned models of some families.

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


def _path(name: str, families: str, asks: Constraint, **settings: Any) -> LoadPath:
    return LoadPath(name, frozenset(families.split()), asks, settings)


_HELD = Constraint(whole_heads=True, first_attention=True)
_ALIKE = Constraint(whole_heads=True, uniform=True, every_attention=True)
_PLAIN = dataclasses.replace(_ALIKE, dense_biases=True)
_DENSE = dataclasses.replace(_PLAIN, dense_heads=True)
_DIVIDING = Constraint(heads_divide=True)  # as the family's config demands
_Q8_0 = Constraint(width_multiple=32)  # values that share a scale
_DECILM = Constraint(width_multiple=256, dense_heads=True, dense_biases=True)
_STOCK, _OWN = "a stock checkpoint", "the family's own architecture"


LOAD_PATHS: dict[Runtime, tuple[LoadPath, ...]] = {  # of each, the first that a method can serve is taken
    "llama.cpp": (
        _path("deci", "llama mistral qwen2 granite", _Q8_0 & _HELD),
        _path(
            "openelm",
            "qwen3",
            _Q8_0 & Constraint(whole_heads=True, dense_biases=True, every_attention=True),
            tie_word_embeddings=True,
            attention_bias=False,
        ),
        _path(_OWN, "qwen3 gemma2 gemma3_text smollm3", _Q8_0 & _PLAIN),
        _path(_OWN, "phi3 gpt_neox gpt2 phi olmo2 cohere2", _Q8_0 & _DENSE),
    ),
    "vllm": (
        _path(_STOCK, "llama", _ALIKE & _DIVIDING),
        _path(_STOCK, "granite", _ALIKE),
        _path(_STOCK, "gemma2 gemma3_text", _PLAIN & _DIVIDING),
        _path(_STOCK, "mistral qwen3 phi3", _PLAIN),
        _path(_STOCK, "qwen2 opt gpt_neox gpt2 phi olmo2 smollm3 cohere2", _DENSE),
        _path("DeciLM", "llama", _DECILM & _HELD, attention_bias=False, mlp_bias=False),
    ),
    "transformers": (),
}


def constraint(
    runtimes: Sequence[Runtime],
    tensor_parallel: int,
    conflicts: Callable[[Constraint], list[str]],
    config: PreTrainedConfig | None = None,
) -> Constraint:
    """The strictest of what all runtimes ask.

    Args:
        runtimes: Where the pruned model must load.
        tensor_parallel: Devices that will share it.
        conflicts: Why a method cannot honour a constraint, and what to change; empty if it can.
        config: The model's; if not given, a path counts that is there for any family.

    Raises:
        ValueError: A runtime cannot load models of the family, or the method cannot honour what it asks.
    """
    if unknown := [runtime for runtime in runtimes if runtime not in get_args(Runtime)]:
        raise ValueError(f"nothing is known of serving on {unknown[0]!r}; known places: {', '.join(get_args(Runtime))}")
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, but it is a number of devices: 1 or more")
    asked = Constraint(tensor_parallel=tensor_parallel, whole_heads=tensor_parallel > 1)
    if reasons := conflicts(asked):
        raise ValueError(f"{tensor_parallel} devices could not share the result: {' and '.join(reasons)}")
    for runtime in runtimes:
        asked &= _asks(runtime, conflicts, config) if LOAD_PATHS[runtime] else FREE
    return asked


def adds_biases(blocks: Sequence[Block] | None) -> bool:
    """Whether biases of all consumers would be new to a model; yes if it is not known."""
    return blocks is None or any(block.absent_bias(group) for block in blocks for group in block.groups())


def _asks(
    runtime: Runtime, conflicts: Callable[[Constraint], list[str]], config: PreTrainedConfig | None
) -> Constraint:
    """What the first path asks that a method can serve."""
    paths = [path for path in LOAD_PATHS[runtime] if config is None or path.takes(config)]
    if not paths and config is not None:
        raise ValueError(f"{runtime} has no architecture for {config.model_type!r}: take {runtime} out of `serve_on`")
    reasons: dict[str, list[str]] = {}
    for path in paths:
        found = conflicts(path.asks)
        if not found:
            return path.asks
        reasons.setdefault(path.name, found)
    fewest = min(map(len, reasons.values()))
    each = (f"as {name}, {' and '.join(found)}" for name, found in reasons.items() if len(found) == fewest)
    raise ValueError(f"{runtime} would not load the result: {'; '.join(each)}")
