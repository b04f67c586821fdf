"""Tiny random models of every family, a tiny tokenizer, and text: nothing is downloaded."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from plprune import CFSP, FASP, FLAP, PruningMethod, TwoSSP
from plprune.anatomy import FAMILIES

VOCABULARY = 300

SETTINGS: dict[str, dict[str, Any]] = {
    family: {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
    for family in FAMILIES
}
SETTINGS["qwen3"] |= {"head_dim": 6, "intermediate_size": 96}  # not hidden_size / num_attention_heads
SETTINGS["mistral"] |= {"sliding_window": 8, "head_dim": 4}
SETTINGS["phi3"] |= {"pad_token_id": 0}
SETTINGS["opt"] = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 96,
    "num_attention_heads": 4,
    "dropout": 0.0,
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
    "TwoSSP": TwoSSP,
    "TwoSSP without stage 2": functools.partial(TwoSSP, drop_attentions=0),
}


def tiny(family: str = "llama", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of three blocks, float32, in evaluation mode."""
    sizes = {"num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    everything: dict[str, Any] = {**sizes, **special, **SETTINGS[family], **settings}
    config = CONFIG_MAPPING[family](**everything)
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
    return METHODS[name](sparsity=sparsity)


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
