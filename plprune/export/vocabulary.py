"""Converts a Hugging Face tokenizer to the fields of a GGUF file.

llama.cpp implements a fixed set of named pre-tokenizers for byte-level BPE. :data:`PRE_TOKENIZERS` finds the name by
the exact regular expressions in `tokenizer.json`; tokenizers with other expressions are refused, because similar ones
would split some texts differently.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any

from gguf import Keys, TokenType
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
GPT2 = "gpt-2"  # the expression that a ByteLevel pre-tokenizer has by default
DIGIT = r"\p{N}"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}|"
)
CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# llama.cpp's names, by the expressions that split a text in turn, and by whether whole words skip the merges.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((WORDS + r"\p{N}{1,3}" + REST,), False): "dbrx",
    ((WORDS + r"\p{N}{1,3}" + REST,), True): "llama-bpe",
    ((WORDS + DIGIT + REST,), False): "qwen2",
    ((CASED.replace("{end}", "") + DIGIT + CASED_REST,), True): "tekken",
    ((CASED.replace("{end}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}" + CASED_REST,), False): "gpt-4o",
}
SPACE = "▁"
PREFIXED = ("first", "always")


def fields(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """The fields of a GGUF file that describe a tokenizer.

    Args:
        tokenizer: A byte-level BPE tokenizer, or SentencePiece's BPE with byte fallback.
        rows: Rows of the embedding; those without a token are named `[PAD...]`.

    Raises:
        ValueError: The tokenizer is of another kind, splits text in a way that llama.cpp lacks, or is another model's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("llama.cpp needs a tokenizer with a tokenizer.json: load it as a fast one")
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE":
        raise ValueError(
            f"tokenizers of type {state['model']['type']} are not written to GGUF: byte-level BPE and "
            "SentencePiece's BPE are"
        )
    if odd := _differently_matched(state):
        log.warning(
            "llama.cpp may split text differently around the tokens %s: this tokenizer strips spaces beside them, or "
            "looks for them in normalised text",
            ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else ""),
        )
    kind = _sentence_piece(state) if state["model"].get("byte_fallback") else _byte_level(state)
    return kind | _tokens(tokenizer, state, rows) | _special(tokenizer)


def _differently_matched(state: dict[str, Any]) -> list[str]:
    """The added tokens that llama.cpp may find at other places of a text than the tokenizer."""
    return [
        token["content"]
        for token in state["added_tokens"]
        if any(token[flag] for flag in ("lstrip", "rstrip", "single_word"))
        or (token["normalized"] and state["normalizer"])
    ]


def _byte_level(state: dict[str, Any]) -> dict[str, Any]:
    steps = list(_steps(state["pre_tokenizer"]))
    key = tuple(step for step in steps if step), bool(state["model"].get("ignore_merges"))
    if key not in PRE_TOKENIZERS:
        raise ValueError(
            f"llama.cpp has no name for how this tokenizer divides text ({' then '.join(steps) or 'not at all'}): "
            "use the model with another program"
        )
    if state["normalizer"] is not None:
        log.warning("llama.cpp does not normalise text as this tokenizer does (%s)", state["normalizer"]["type"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    return {
        Keys.Tokenizer.MODEL: "gpt2",
        Keys.Tokenizer.PRE: PRE_TOKENIZERS[key],
        **({Keys.Tokenizer.MERGES: merges} if merges else {}),
    }


def _steps(node: dict[str, Any] | None) -> Iterator[str]:
    """The expressions by which a pre-tokenizer splits text; an empty one if it only maps bytes to letters."""
    node = node or {"type": "none"}
    if node["type"] == "Sequence":
        for each in node["pretokenizers"]:
            yield from _steps(each)
    elif node["type"] == "Split" and node["behavior"] in ("Isolated", "Removed"):
        yield node["pattern"].get("Regex", str(node["pattern"]))
    elif node["type"] == "Digits":
        yield DIGIT if node["individual_digits"] else DIGIT + "+"
    elif node["type"] == "ByteLevel" and not node["add_prefix_space"]:
        yield GPT2 if node["use_regex"] else ""
    else:
        yield json.dumps(node)


def _sentence_piece(state: dict[str, Any]) -> dict[str, Any]:
    prefixed = any(
        node.get("prepend") == SPACE or node.get("prepend_scheme") in PREFIXED
        for part in ("normalizer", "pre_tokenizer")
        for node in _nodes(state[part])
    )
    return {Keys.Tokenizer.MODEL: "llama", Keys.Tokenizer.PRE: "default", Keys.Tokenizer.ADD_PREFIX: prefixed}


def _nodes(node: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if node:
        yield node
        for each in node.get("normalizers", node.get("pretokenizers", [])):
            yield from _nodes(each)


def _tokens(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], rows: int) -> dict[str, Any]:
    """The token and type of every row; for SentencePiece also its score, the higher the earlier its merge."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    if names and max(names) >= rows:
        raise ValueError(
            f"the tokenizer has {max(names) + 1} tokens and the model {rows}: use the model's own tokenizer"
        )
    added = {token["id"]: token for token in state["added_tokens"]}
    bytewise = bool(state["model"].get("byte_fallback"))
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [int(_kind(i, names, added, tokenizer.unk_token_id if bytewise else None, bytewise)) for i in range(rows)]
    found = {Keys.Tokenizer.LIST: tokens, Keys.Tokenizer.TOKEN_TYPE: kinds}
    if bytewise:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(state["model"]["merges"]):
            ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
        found[Keys.Tokenizer.SCORES] = [-float(ranks.get(token, 0)) for token in tokens]
        # llama.cpp prints added tokens as they are: write them with spaces.
        spaced = [token.replace(SPACE, " ") for token in tokens]
        taken = set(tokens)
        found[Keys.Tokenizer.LIST] = [
            plain if kind == TokenType.USER_DEFINED and plain not in taken else token
            for token, plain, kind in zip(tokens, spaced, kinds, strict=True)
        ]
    return found


def _kind(index: int, names: dict[int, str], added: dict[int, Any], unknown: Any, bytewise: bool) -> TokenType:
    if index not in names:
        return TokenType.UNUSED
    if index == unknown:
        return TokenType.UNKNOWN
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    is_byte = bytewise and len(names[index]) == len("<0x00>") and names[index].startswith("<0x")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids, template = tokenizer("a").input_ids, tokenizer.chat_template
    values = {
        Keys.Tokenizer.BOS_ID: tokenizer.bos_token_id,
        Keys.Tokenizer.EOS_ID: tokenizer.eos_token_id,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
        Keys.Tokenizer.ADD_BOS: bool(ids and ids[0] == tokenizer.bos_token_id),
        Keys.Tokenizer.ADD_EOS: bool(ids and ids[-1] == tokenizer.eos_token_id),
        Keys.Tokenizer.CHAT_TEMPLATE: template.get("default") if isinstance(template, dict) else template,
    }
    return {key: value for key, value in values.items() if value is not None}
