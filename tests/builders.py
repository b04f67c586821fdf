"""Tiny random models of every family, a tiny tokenizer, and text: nothing is downloaded."""

import functools
import itertools
import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from plprune import CFSP, FASP, FLAP, REAP, BestOf, LearnedGates, PruningMethod, TwoSSP
from tests.zoo import config_of

VOCABULARY = 300
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gemma2", "gemma3_text"),
    *("gpt_neox", "gpt2", "phi", "olmo2", "granite", "smollm3", "cohere2"),
)

SETTINGS: dict[str, dict[str, Any]] = {
    family: {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
    for family in FAMILIES
}
SETTINGS["qwen3"] |= {"head_dim": 6, "intermediate_size": 96}  # not hidden_size / num_attention_heads
SETTINGS["mistral"] |= {"sliding_window": 8, "head_dim": 4}
SETTINGS["opt"] = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 96,
    "num_attention_heads": 4,
    "dropout": 0.0,
}
SETTINGS["gemma2"] |= SETTINGS["qwen3"] | {"sliding_window": 8, "query_pre_attn_scalar": 10}  # sliding, full, sliding
SETTINGS["gemma3_text"] |= SETTINGS["gemma2"] | {"sliding_window_pattern": 2}
SETTINGS["gpt_neox"] = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
SETTINGS["gpt2"] = {"n_embd": 32, "n_inner": 96, "n_head": 4, "n_layer": 3, "n_positions": 128}
SETTINGS["gpt2"] |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SETTINGS["phi"] |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96}
SETTINGS["granite"] |= {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5}
SETTINGS["smollm3"] |= {"sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]}
SETTINGS["cohere2"] |= {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
SETTINGS["cohere2"] |= {"logit_scale": 0.5}

MIXTURES = ("qwen2_moe", "gpt_oss")  # with a shared expert; transposed, with biases and sinks

VARIANTS: dict[str, dict[str, Any]] = {
    "llama/multi-head": {"num_key_value_heads": 8, "intermediate_size": 96},
    "llama/head_dim": {"head_dim": 6, "intermediate_size": 96},
    "llama/biases": {"attention_bias": True, "mlp_bias": True},
    "mistral/multi-head": {"num_key_value_heads": 8, "sliding_window": None, "intermediate_size": 96},
    "qwen2/sliding": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3/sliding": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "attention_bias": True},
    "phi3/sliding": {"sliding_window": 8, "num_key_value_heads": 8, "intermediate_size": 96},
    "opt/no biases": {"enable_bias": False},
    "gemma2/multi-head": {"num_key_value_heads": 8, "attention_bias": True},
    "gemma3_text/multi-head": {"num_key_value_heads": 8, "head_dim": 4, "sliding_window_pattern": 3},
    "gpt_neox/sequential": {"use_parallel_residual": False, "rotary_pct": 0.5},
    "gpt_neox/no biases": {"attention_bias": False},
    "gpt2/scaled": {"scale_attn_by_inverse_layer_idx": True, "n_inner": None},
    "phi/grouped": {"num_attention_heads": 8, "qk_layernorm": True},
    "phi/head_dim": {"num_attention_heads": 8, "head_dim": 8, "intermediate_size": 128},
    "olmo2/multi-head": {"num_key_value_heads": 8, "attention_bias": True, "intermediate_size": 96},
    "olmo2/head_dim": {"head_dim": 6, "intermediate_size": 96},
    "granite/multi-head": {"num_key_value_heads": 8, "attention_bias": True, "intermediate_size": 96},
    "granite/head_dim": {"head_dim": 6, "mlp_bias": True, "intermediate_size": 96},
    "smollm3/multi-head": {"num_key_value_heads": 8, "use_sliding_window": False, "intermediate_size": 96},
    "smollm3/head_dim": {"head_dim": 6, "attention_bias": True, "mlp_bias": True, "intermediate_size": 96},
    "cohere2/multi-head": {"num_key_value_heads": 8, "layer_types": None, "intermediate_size": 96},
    "cohere2/biases": {"attention_bias": True, "sliding_window_pattern": 2, "layer_types": None},
}

METHODS: dict[str, Any] = {
    "FLAP AL-AM": FLAP,
    "FLAP UL-UM": functools.partial(FLAP, structure="UL-UM"),
    "FLAP AL-MM": functools.partial(FLAP, structure="AL-MM", remove_heads=3),
    "FLAP UL-MM": functools.partial(FLAP, structure="UL-MM", remove_heads=3),
    "FASP value_channels": FASP,
    "FASP kv_heads": functools.partial(FASP, attention="kv_heads"),
    "FASP none": functools.partial(FASP, attention="none"),
    "CFSP activation": CFSP,
    "CFSP relative": functools.partial(CFSP, score="relative"),
    "LearnedGates": LearnedGates,
    "LearnedGates kv_heads": functools.partial(LearnedGates, attention="kv_heads"),
    "TwoSSP": TwoSSP,
    "TwoSSP without stage 2": functools.partial(TwoSSP, drop_attentions=0),
}
REPAIRED: dict[str, Any] = {  # not as the papers have it: restored in a walk of its own
    "FLAP restore": functools.partial(FLAP, repair="restore", damping="auto"),
    "CFSP restore": functools.partial(CFSP, repair="restore"),
    "TwoSSP restore": functools.partial(TwoSSP, repair="restore", bias=False, repair_share=0.5),
    "CFSP reconstruct": functools.partial(CFSP, repair="reconstruct", repair_passes=2),
    "FASP reconstruct": functools.partial(FASP, repair="reconstruct", repair_passes=1),
}
TRYING: dict[str, Any] = {"BestOf": functools.partial(BestOf, candidates=(CFSP(), TwoSSP()), held_out=2)}
OF_EXPERTS: dict[str, Any] = {
    "REAP": REAP,
    "FLAP experts": functools.partial(FLAP, experts=True),
    "LearnedGates experts": functools.partial(LearnedGates, experts=True),
}
NOT_OF_MIXTURES = ("FLAP AL-MM", "FLAP UL-MM")  # count all channels alike, and are refused
REPAIRED_ON = ("llama", "opt", "phi3")  # plain, with biases, and fused
DEFAULTS = ("FLAP AL-AM", "FASP value_channels", "CFSP activation", "TwoSSP", "LearnedGates")
UNLIKE = ("llama", "opt", "gpt2", "phi3", "gemma2")  # gated; with biases; transposed; fused; windows and norms behind
LIKE_LLAMA = ("mistral", "qwen2", "granite", "smollm3", "cohere2")  # in where the parts of a block are


def _judged(index: int, family: str) -> Iterable[str]:
    if family in UNLIKE:
        return METHODS
    return (DEFAULTS[index % 5], DEFAULTS[(index + 2) % 5]) if family in LIKE_LLAMA else DEFAULTS


# Every method on every layout, its further settings on families that are unlike, and two methods on what is alike.
PAIRS = [(family, name) for i, family in enumerate(FAMILIES) for name in _judged(i, family)]
PAIRS += [(each, DEFAULTS[i % len(DEFAULTS)]) for start in (len(FAMILIES), 1) for i, each in enumerate(VARIANTS, start)]
PAIRS += itertools.product(REPAIRED_ON, REPAIRED)
PAIRS += itertools.product((each for each in FAMILIES if each not in LIKE_LLAMA), TRYING)
PAIRS += [("qwen2_moe", name) for name in (*DEFAULTS, *TRYING, *OF_EXPERTS)]
PAIRS += [("gpt_oss", name) for name in ("REAP", "FLAP experts", "FLAP restore", "FASP kv_heads", "CFSP relative")]
EVERY = {**METHODS, **REPAIRED, **TRYING, **OF_EXPERTS}
REST = [pair for pair in itertools.product(MIXTURES, EVERY) if pair not in PAIRS and pair[1] not in NOT_OF_MIXTURES]
OWN: list[str] = []  # of the option --method: the contract battery then judges these and no others


def tiny(family: str = "llama", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model, float32, in evaluation mode; of three blocks, or of a mixture, four with eight experts.

    Args:
        family: One of the families, variants or mixtures.
        seed: Of the weights.
        settings: Values of the config.
    """
    family, variant = family.partition("/")[0], VARIANTS.get(family, {})
    sizes = {"num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    own = config_of(family) | special if family in MIXTURES else {**sizes, **special, **SETTINGS[family], **variant}
    config = CONFIG_MAPPING[family](**{**own, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1, where faults hide
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= 6
    return model


def windows(count: int = 6, length: int = 16, seed: int = 1) -> Tensor:
    """Random token ids, [count, length]."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """What a model makes of token ids, by default of two windows."""
    return model(input_ids=windows(2, 12, seed=7) if ids is None else ids).logits


def method(name: str, sparsity: float = 0.2) -> PruningMethod:
    return EVERY[name](sparsity=sparsity)


def judge_only(path: str) -> None:
    """Has the contract battery judge one method of the user's, named as the command line names it: MODULE.CLASS.

    Raises:
        ValueError: There is no such class, or it is not a method.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module or name), name, None)
    except ImportError as error:
        raise ValueError(f"cannot import {module or name} ({error}): start pytest where the file is") from error
    if not (isinstance(found, type) and issubclass(found, PruningMethod)):
        raise ValueError(f"{path} is not a subclass of plprune.PruningMethod: name one as MODULE.CLASS")
    EVERY[name] = found
    OWN.append(name)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        [topics["if"]], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_tiny(folder: Path, family: str = "llama", **settings: Any) -> str:
    """A tiny model with its tokenizer in a folder, as a user would have one."""
    tiny(family, **settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def decode(ids: Tensor | list[int]) -> str:
    return str(tokenizer().decode(ids, clean_up_tokenization_spaces=False))


def jsonl(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbers(path: Path, start: int = 0, stop: int = 400) -> str:
    """A text in which every window of a few tokens is unlike all others."""
    path.write_text(" ".join(str(i) for i in range(1000 + start, 1000 + stop)))
    return str(path)
