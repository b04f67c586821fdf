"""What programs must multiply logits by, compared with the families' own logits."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from plprune import CFSP, prune, save_pruned
from plprune.architecture.head import like_alone, logit_scale
from tests.builders import tiny, windows
from tests.wrappers import build as seeing
from tests.zoo import build

SCALES = {"llama": 1.0, "granite": 1 / 3, "cohere2": 0.5, "minicpm3": 4.0, "gemma2": 1.0}


def model_of(family: str) -> PreTrainedModel:
    return build(family) if family == "minicpm3" else tiny(family)


@pytest.mark.parametrize("family", SCALES)
@torch.no_grad()
def test_the_head_times_the_scale_is_the_logits(family: str) -> None:
    model: Any = model_of(family).double()
    scale = logit_scale(type(model), model.config)
    assert scale == pytest.approx(SCALES[family])
    found = scale * model.lm_head(model.base_model(windows())[0])
    if cap := getattr(model.config, "final_logit_softcapping", None):
        found = cap * torch.tanh(found / cap)
    torch.testing.assert_close(found, model(windows()).logits)


class Shifting(LlamaForCausalLM):
    """One whose logits are more than a multiple."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = cast(Tensor, out.logits) + 1
        return out


def test_other_logits_have_no_scale() -> None:
    assert logit_scale(Shifting, tiny().config) is None


@pytest.mark.parametrize(("family", "said"), [("granite", 1 / 3), ("cohere2", 0.5), ("llama", None)])
def test_a_folder_says_the_scale_where_vllm_looks(family: str, said: float | None, tmp_path: Path) -> None:
    model = tiny(family)
    prune(model, CFSP(0.25), [windows()])
    save_pruned(model, tmp_path / "out")
    found = json.loads((tmp_path / "out/config.json").read_text()).get("logit_scale")
    assert found == (None if said is None else pytest.approx(said))


@pytest.mark.parametrize(("kind", "alike"), [("llava", True), ("gemma4", True), ("aya_vision", False)])
def test_a_model_that_sees_may_make_its_logits_as_its_decoder_does_alone(kind: str, alike: bool) -> None:
    assert like_alone(seeing(kind).config) == alike
