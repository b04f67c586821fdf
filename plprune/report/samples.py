"""Generates continuations of prompts for people to read, because metrics do not show that a model repeats itself."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.evaluation.standalone import greedy_tokens
from plprune.pruning.forward import checking_ids, evaluating

PROMPTS = ("The capital of France is", "To make bread, you need", "Once upon a time, there was")


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int = 40
) -> list[str]:
    """The greedy continuation of each prompt, up to the end-of-text token or `new_tokens`.

    Prompts are given to the model as they are, without a chat template.
    """
    end: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends, texts = end if isinstance(end, list) else [end], []
    with evaluating(model), checking_ids(model, tokenizer):
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
            tokens = (int(token) for token in greedy_tokens(model, ids, new_tokens))
            written = list(takewhile(lambda token: token not in ends, tokens))
            texts.append(str(tokenizer.decode(written, skip_special_tokens=True)))
    return texts
