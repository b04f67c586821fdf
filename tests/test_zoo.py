"""Families that no list names: pruned, saved, loaded and run, by units that probing has found.

The quick suite has one family of each layout that :data:`tests.builders.FAMILIES` lacks. All decoders of transformers
are tried by `PLPRUNE_ZOO=1 pytest tests/test_zoo.py`, which takes an hour.
"""

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import plprune
from plprune import CFSP, FLAP, REAP, PruningMethod, TwoSSP, load_pruned, prune, save_pruned
from plprune.architecture.blocks import blocks_of
from tests.builders import logits, windows
from tests.zoo import build, decoders

LAYOUTS = ("bert", "bloom", "codegen", "minicpm3", "openai-gpt", "persimmon")
SLOW = (
    "apertus",
    "arcee",
    "bamba",
    "biogpt",
    "bitnet",
    "cohere",
    "gemma",
    "glm",
    "glm4",
    "granite_swa",
    "gptj",
    "helium",
    "lfm2",
    "ministral3",
    "mpt",
    "qwen3_5_text",
)
SLOW += ("bart", "git", "nemotron", "olmo3", "seed_oss", "stablelm", "starcoder2", "whisper", "xglm")
NO_DROPPING = ("bert", "bloom", "git", "mpt", "openai-gpt")  # the residual is added within the attention, or by a list


def marked(kind: str) -> Any:
    return kind if kind in LAYOUTS else pytest.param(kind, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", decoders() if os.environ.get("PLPRUNE_ZOO") else [*map(marked, (*LAYOUTS, *SLOW))])
def test_a_family_is_pruned_saved_loaded_and_run(kind: str, tmp_path: Path) -> None:
    methods = [CFSP(sparsity=0.2), FLAP(sparsity=0.2)]
    methods += [] if kind in NO_DROPPING else [TwoSSP(sparsity=0.2, drop_attentions=1)]
    for method in methods:
        check(kind, method, tmp_path / type(method).__name__)


def check(kind: str, method: PruningMethod, folder: Path) -> None:
    """Prunes, saves, loads and runs a tiny model of a type; with a cache as without, if it does so before."""
    model = build(kind)
    before, same = logits(model), torch.equal(*continuations(model))
    plan = prune(model, method, list(windows(4, 12).split(2)))
    assert isinstance(method, REAP) or plan.reached == pytest.approx(0.2, abs=0.03)
    assert not torch.allclose(logits(model), before)
    assert torch.equal(*continuations(model)) or not same
    save_pruned(model, folder)
    assert torch.equal(logits(load_pruned(folder)), logits(model))


def continuations(model: Any) -> list[torch.Tensor]:
    """What a model makes of two texts, with a cache and without."""
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return [model.generate(windows(2, 5), use_cache=cached, **how) for cached in (True, False)]


def test_no_code_that_prunes_or_saves_names_a_family() -> None:
    package = Path(plprune.__file__).parent
    named = {"export", "serving.py"}  # what other programs read and run is listed
    for path in [path for path in package.rglob("*.py") if not named & set(path.relative_to(package).parts)]:
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & set(decoders()), path


MIXTURES = ("qwen2_moe", "deepseek_v3")
SLOW_MIXTURES = (
    "mixtral",
    "gpt_oss",
    "olmoe",
    "glm4_moe",
    "lfm2_moe",
    "granitemoe",
    "granitemoehybrid",
    "hy_v4",
    "jamba",
    "phimoe",
    "ernie4_5_moe",
    "qwen3_5_moe_text",
)


@pytest.mark.parametrize("kind", [*MIXTURES, *[pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_MIXTURES]])
def test_a_mixture_is_pruned_saved_loaded_and_run(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    steps: list[tuple[PruningMethod, int]] = [(REAP(0.25, sparsity_of="experts"), 6), (CFSP(0.1), 6)]
    for step, (method, number) in enumerate([*steps, (REAP(1 / 3, sparsity_of="experts"), 4)]):
        before = logits(model)
        prune(model, method, list(windows(4, 12).split(2)))
        assert {block.expert_count for block in blocks_of(model)} <= {0, number}
        after = logits(model)
        assert not torch.allclose(after, before)
        assert torch.equal(*continuations(model))
        folder = tmp_path / str(step)
        save_pruned(model, folder)
        if not step:
            assert not (folder / "modeling_plprune.py").exists()  # a stock checkpoint
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert torch.equal(logits(loaded), after)
        model = load_pruned(folder)
        assert torch.equal(logits(model), after)
