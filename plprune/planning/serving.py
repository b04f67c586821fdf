"""Requirements of serving runtimes, as a constraint for the pruning methods.

A runtime loads a pruned model either as a stock checkpoint, whose config has one size for all blocks, or by an
architecture with sizes per block. Which of these load paths applies depends on the family and on the method:

- llama.cpp's `deci` architecture allows any sizes and biases per block, but the first block needs attention, and all
  need an FFN. Its `openelm` does the same for Qwen3, with attention in every block, no biases and a tied head. Others
  read sizes from the first block, and most compute the head dimension from the model's width. q8_0 needs rows of whole
  blocks of 32 values.
- vLLM 0.32 loads any folder of a family whose attention transformers can replace, by its backend for transformers.
- DeciLM (SGLang, TensorRT-LLM, mlx-lm, older vLLM) stores widths as a factor, rounded up to a multiple of 256. All
  blocks have the same query heads and no biases. These programs load stock checkpoints too.
- Under tensor parallelism, all devices get the same number of channels and query heads, and the same number of kv heads
  or a copy of one.

A new runtime or architecture is a new record in :data:`LOAD_PATHS`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from plprune.architecture.blocks import Block
from plprune.architecture.head import family_of, logit_scale
from plprune.architecture.modeling_plprune import WHOLE
from plprune.architecture.wrappers import text_config
from plprune.pruning.constraints import FREE, Constraint

Runtime = Literal["llama.cpp", "vllm", "decilm", "transformers"]


@dataclasses.dataclass(frozen=True)
class LoadPath:
    """One way in which a runtime loads pruned models."""

    name: str  # of the architecture or the kind of checkpoint
    families: frozenset[str]
    asks: Constraint
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # required values of config keys, if present

    def takes(self, config: PreTrainedConfig) -> bool:
        """Whether the family and the settings of a model match."""
        settings = all(getattr(config, key, value) == value for key, value in self.settings.items())
        return config.model_type in self.families and settings


class _Backend(LoadPath):
    """vLLM's own attention and head in the place of those of transformers."""

    def takes(self, config: PreTrainedConfig) -> bool:
        family = family_of(config)
        mappings: Any = (MODEL_FOR_CAUSAL_LM_MAPPING, *(mapping for _, mapping in WHOLE))
        kinds = [mapping[family] for mapping in mappings if family in mapping]
        return any(kind.is_backend_compatible() and logit_scale(kind, config) is not None for kind in kinds)


def _path(name: str, families: str, asks: Constraint, **settings: Any) -> LoadPath:
    return LoadPath(name, frozenset(families.split()), asks, settings)


_HELD = Constraint(whole_heads=True, first_attention=True)
_OWN_SIZES = Constraint(whole_heads=True, dense_biases=True, every_attention=True, every_ffn=True)
_ALIKE = Constraint(whole_heads=True, uniform=True, every_attention=True, every_ffn=True)
_PLAIN = dataclasses.replace(_ALIKE, dense_biases=True)
_DENSE = dataclasses.replace(_PLAIN, dense_heads=True)
_DIVIDING = Constraint(heads_divide=True)  # required by the config class of the family
_Q8_0 = Constraint(width_multiple=32)  # the values that share a scale
_DECILM = Constraint(width_multiple=256, dense_heads=True, dense_biases=True)
_STOCK, _OWN = "a stock checkpoint", "the family's own architecture"


LOAD_PATHS: dict[Runtime, tuple[LoadPath, ...]] = {  # per runtime, the first path that the method can honour is used
    "llama.cpp": (
        _path("deci", "llama mistral qwen2 granite", _Q8_0 & _HELD & Constraint(every_ffn=True)),
        _path(
            "openelm",
            "qwen3",
            _Q8_0 & _OWN_SIZES,
            tie_word_embeddings=True,
            attention_bias=False,
        ),
        _path(_OWN, "gemma4_text", _Q8_0 & _OWN_SIZES),
        _path(
            _OWN,
            "qwen3 gemma gemma2 gemma3_text smollm3 ministral3 glm4 ernie4_5 seed_oss hunyuan_v1_dense arcee nemotron",
            _Q8_0 & _PLAIN,
        ),
        _path(
            _OWN,
            "phi3 gpt_neox gpt2 phi olmo olmo2 olmo3 exaone4 lfm2 cohere2 starcoder2 stablelm",
            _Q8_0 & _DENSE,
        ),
    ),
    "decilm": (
        _path(_STOCK, "llama", _ALIKE & _DIVIDING),
        _path(_STOCK, "granite", _ALIKE),
        _path(_STOCK, "gemma2 gemma3_text", _PLAIN & _DIVIDING),
        _path(_STOCK, "mistral qwen3 phi3", _PLAIN),
        _path(_STOCK, "qwen2 opt gpt_neox gpt2 phi olmo2 smollm3 cohere2", _DENSE),
        _path("DeciLM", "llama", _DECILM & _HELD, attention_bias=False, mlp_bias=False),
    ),
    "vllm": (_Backend("its backend for transformers", frozenset(), FREE),),
    "transformers": (),
}


def constraint(
    runtimes: Sequence[Runtime],
    tensor_parallel: int,
    conflicts: Callable[[Constraint], list[str]],
    config: PreTrainedConfig | None = None,
) -> Constraint:
    """Combines the constraints of all runtimes.

    Args:
        runtimes: The runtimes that must load the pruned model.
        tensor_parallel: The number of devices that will share it.
        conflicts: Returns the reasons why the method cannot honour a constraint, each with what to change.
        config: The model's config; without one, the load paths of all families count.

    Raises:
        ValueError: A runtime cannot load models of the family, or the method cannot honour a constraint.
    """
    if unknown := [runtime for runtime in runtimes if runtime not in get_args(Runtime)]:
        raise ValueError(f"unknown runtime {unknown[0]!r} in `serve_on`: use {', '.join(get_args(Runtime))}")
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, but must be a number of devices: 1 or more")
    combined = Constraint(tensor_parallel=tensor_parallel, whole_heads=tensor_parallel > 1)
    if reasons := conflicts(combined):
        raise ValueError(f"{tensor_parallel} devices could not share the result: {' and '.join(reasons)}")
    for runtime in runtimes:
        combined &= _constraint_of(runtime, conflicts, config) if LOAD_PATHS[runtime] else FREE
    return combined


def adds_biases(blocks: Sequence[Block] | None) -> bool:
    """Whether giving every consumer a bias would add parameters to a model; assumed if the model is not known."""
    return blocks is None or any(block.absent_bias(group) for block in blocks for group in block.groups())


def _constraint_of(
    runtime: Runtime, conflicts: Callable[[Constraint], list[str]], config: PreTrainedConfig | None
) -> Constraint:
    """The constraint of the first load path that the method can honour."""
    read = config if config is None or runtime != "llama.cpp" else text_config(config)  # all that a GGUF file holds
    paths = [path for path in LOAD_PATHS[runtime] if read is None or path.takes(read)]
    if not paths and config is not None:
        raise ValueError(f"{runtime} has no architecture for {config.model_type!r}: remove {runtime} from `serve_on`")
    reasons: dict[str, list[str]] = {}
    for path in paths:
        found = conflicts(path.asks)
        if not found:
            return path.asks
        reasons.setdefault(path.name, found)
    fewest = min(map(len, reasons.values()))
    each = (f"as {name}, {' and '.join(found)}" for name, found in reasons.items() if len(found) == fewest)
    raise ValueError(f"{runtime} would not load the result: {'; '.join(each)}")
