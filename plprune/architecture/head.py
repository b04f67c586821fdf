"""What a model does before and after its head, which programs that run the head themselves must do too."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from plprune.architecture.discovery import alone
from plprune.architecture.modeling_plprune import WHOLE, PrunedConfigMixin
from plprune.architecture.modules import replaced_forwards
from plprune.architecture.probing import Probes, weightless
from plprune.architecture.wrappers import text_config


def logit_scale(kind: type[PreTrainedModel], config: PreTrainedConfig) -> float | None:
    """The number by which models of a class multiply what their head makes of the last hidden states.

    A soft cap, `final_logit_softcapping` in the config, is undone first. Models that compute their logits otherwise
    have no such number. What was found is kept.
    """
    key = kind, config.to_json_string()
    if key not in _SCALES:
        _SCALES[key] = _logit_scale(kind, config)
    return _SCALES[key]


_SCALES: dict[tuple[type, str], float | None] = {}


def _logit_scale(kind: type[PreTrainedModel], config: PreTrainedConfig) -> float | None:
    with alone():
        model, seen = weightless(kind, config), list[tuple[Tensor, Tensor]]()
        head: Any = model.get_output_embeddings()
        asked: Any = {"input_ids": torch.ones(1, 2, dtype=torch.long), "use_cache": False}
        with Probes(model).standing_in():
            run = head.forward

            def note(x: Tensor) -> Tensor:
                seen.append((x, run(x)))
                return seen[-1][1]

            with replaced_forwards([head], [note]):
                last, logits = model.base_model(**asked)[0], model(**asked).logits
        if len(seen) != 1:
            return None
        if cap := getattr(text_config(config), "final_logit_softcapping", None):
            logits = torch.atanh(logits / cap) * cap
        before, after = (_ratio(*pair) for pair in ((seen[0][0], last), (logits, seen[0][1])))
        return before * after if before and after else None


def family_of(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    """The family's class of configs, also of a pruned model."""
    return next(kind for kind in type(config).__mro__ if not issubclass(kind, PrunedConfigMixin))


def like_alone(config: PreTrainedConfig) -> bool:
    """Whether a model with towers makes its logits as its text decoder does where that is a model of its own."""
    own, family = text_config(config), family_of(config)
    whole: Any = next(mapping[family] for _, mapping in WHOLE if family in mapping)  # type: ignore[index]
    decoder: Any = MODEL_FOR_CAUSAL_LM_MAPPING[family_of(own)]
    scale = logit_scale(whole, config)
    return scale is not None and scale == logit_scale(decoder, own)


def _ratio(a: Tensor, b: Tensor) -> float | None:
    """The number that makes one tensor of another."""
    ratio = (a / b).double() if a.shape == b.shape else a.new_tensor([0, 1])
    return float(f"{ratio.median().item():.9g}") if torch.allclose(ratio, ratio.median(), rtol=1e-5) else None
