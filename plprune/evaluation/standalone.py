"""Log-probabilities and greedy generation with transformers alone.

plprune imports these functions. Run as a program, `python -I standalone.py FOLDER REQUEST ANSWER`, this file proves
that a folder loads without plprune. REQUEST is a safetensors file with `windows`, token ids, [n, s]. ANSWER gets
`logprobs`, [n, s - 1], `greedy`, [c], and the version and the speed as metadata.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)


def logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:  # [n, s] -> [n, s - 1]
    """Log-probabilities of all tokens but the first of each window."""
    rows = []
    for window in ids.split(1):
        logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
        rows.append(logits.log_softmax(-1).gather(-1, window[:, 1:, None])[..., 0])
    return torch.cat(rows)


def prompt_of(windows: Tensor) -> Tensor:  # [n, s] -> [s / 4]
    """The prompt that parity checks continue: the first quarter of the first window."""
    return windows[0, : max(1, windows.shape[1] // 4)]


def greedy_tokens(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Iterator[Tensor]:  # [b, s] -> [b, 1] each
    """Generates the most probable tokens one by one with a key-value cache; end-of-text tokens do not stop it."""
    known: dict[str, Any] = {}
    for _ in range(new_tokens):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **known)
        name = "cache" if "cache" in output else "past_key_values"  # transformers 5.24 renamed it
        ids, known = output.logits[:, -1:].argmax(-1), {name: output[name]}
        yield ids


def continuation(model: PreTrainedModel, prompt: Tensor, count: int = 32) -> tuple[Tensor, float]:  # [p] -> [c]
    """The greedy continuation of a prompt, and the tokens generated per second."""
    start = time.perf_counter()
    tokens = torch.cat(list(greedy_tokens(model, prompt[None], count)), 1)[0]
    return tokens, count / (time.perf_counter() - start)


def auto_class(config: Any) -> Any:
    """The class that loads a model whole, as in `plprune.architecture.wrappers`."""
    pairs = (
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
    )
    whole = pairs if "text_config" in config.sub_configs else ()
    return next((auto for auto, mapping in whole if config in mapping), AutoModelForCausalLM)


@torch.no_grad()
def main(folder: str, request: str, answer: str) -> None:
    """Answers a request about the model in a folder."""
    windows = load_file(request)["windows"]
    auto = auto_class(type(AutoConfig.from_pretrained(folder, trust_remote_code=True)))
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    tensors = {"logprobs": logprobs(model, windows)}
    tensors["greedy"], speed = continuation(model, prompt_of(windows))
    metadata = {"program": f"transformers {transformers.__version__}", "speed": str(speed)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, answer, metadata=metadata)


if __name__ == "__main__":
    sys.modules["plprune"] = None  # type: ignore[assignment]  # importing it fails
    main(*sys.argv[1:])
