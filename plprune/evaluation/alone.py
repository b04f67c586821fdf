"""Reads and writes with transformers alone: a module, and a program that proves that a folder loads without plprune.

Run as `python -I alone.py FOLDER REQUEST ANSWER`. REQUEST is a safetensors file with `windows`, token ids, [n, s];
ANSWER gets `logprobs`, [n, s - 1], `greedy`, [c], and, as metadata, versions and speed.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:  # [n, s] -> [n, s - 1]
    """Log-probabilities of each token of each window but the first."""
    rows = []
    for window in ids.split(1):
        logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
        rows.append(logits.log_softmax(-1).gather(-1, window[:, 1:, None])[..., 0])
    return torch.cat(rows)


def prompt_of(windows: Tensor) -> Tensor:  # [n, s] -> [s / 4]
    """What is to be continued: the beginning of the text."""
    return windows[0, : max(1, windows.shape[1] // 4)]


def write_greedily(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Iterator[Tensor]:  # [b, s] -> [b, 1] each
    """The most probable next tokens, one after the other, with a key-value cache; an end-of-text token ends nothing."""
    known: dict[str, Any] = {}
    for _ in range(new_tokens):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **known)
        name = "cache" if "cache" in output else "past_key_values"  # transformers 5.24 renamed it
        ids, known = output.logits[:, -1:].argmax(-1), {name: output[name]}
        yield ids


def continuation(model: PreTrainedModel, prompt: Tensor, count: int = 32) -> tuple[Tensor, float]:  # [p] -> [c]
    """The tokens that follow a prompt, each the likeliest, and how many of them are written per second."""
    start = time.perf_counter()
    tokens = torch.cat(list(write_greedily(model, prompt[None], count)), 1)[0]
    return tokens, count / (time.perf_counter() - start)


@torch.no_grad()
def main(folder: str, request: str, answer: str) -> None:
    """Answers a request."""
    windows = load_file(request)["windows"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    found = {"logprobs": logprobs(model, windows)}
    found["greedy"], speed = continuation(model, prompt_of(windows))
    told = {"program": f"transformers {transformers.__version__}", "speed": str(speed)}
    save_file({name: value.contiguous() for name, value in found.items()}, answer, metadata=told)


if __name__ == "__main__":
    sys.modules["plprune"] = None  # type: ignore[assignment]  # an import of it fails
    main(*sys.argv[1:])
