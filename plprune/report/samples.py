"""Text that a model continues, to look at: figures do not show that a model repeats itself."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.pruning.forward import checking_ids, evaluating

PROMPTS = ("The capital of France is", "To make bread, you need", "Once upon a time, there was")


@torch.no_grad()
def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int = 40
) -> list[str]:
    """The likeliest continuation of each prompt, token by token.

    Args:
        model: A causal language model.
        tokenizer: Its own.
        prompts: Beginnings of texts; chat templates are not applied.
        new_tokens: At most so many are added.
    """
    texts = []
    with evaluating(model), checking_ids(model, tokenizer):
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
            own: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
            own |= {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": tokenizer.pad_token_id or 0}
            made = cast(Any, model).generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, max_length=None, **own
            )
            texts.append(str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts
