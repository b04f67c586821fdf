"""Decisions of the authors' own code on a real model; every run in the shared folder `golden` is compared."""

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from plprune import CFSP, FLAP, PruningMethod, PruningPlan, TwoSSP, perplexity, prune
from plprune.checkpoint.load import load_model, load_tokenizer
from tests.shared import SHARED, SMOLLM2, needs_smollm2, wikitext

pytestmark = [pytest.mark.slow, needs_smollm2]

FILES = sorted((SHARED / "golden").glob("*.json"))
KINDS = {"neurons": "ffn", "heads": "attention"}


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return load_model(SMOLLM2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(SMOLLM2)


@pytest.mark.skipif(not FILES, reason=f"no golden decisions in {SHARED / 'golden'}: set PLPRUNE_SHARED")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_decisions_are_those_of_the_authors_code(file: Path, dense, tokenizer, caplog) -> None:
    golden = json.loads(file.read_text())
    model = multi_head(dense) if golden["method"] == "flap" else copy.deepcopy(dense)
    calibration = wikitext("validation", tokenizer, golden["nsamples"], golden["seqlen"])
    caplog.set_level(logging.INFO)
    plan = prune(model, as_published(golden), list(calibration.split(4)))

    assert agreement(plan, golden["removed"]) >= 0.99
    assert dropped(plan) == sorted(golden["removed"].get("attention", []))
    # One unit of parameters a block, which rounding accounts for.
    assert sum(plan.after) == pytest.approx(golden["params"], rel=2e-3)
    test = wikitext("test", tokenizer, 6, 1024)
    within = 0.02 if "AL-AM" in structure(golden) else 0.01
    assert perplexity(model, list(test.split(1))) == pytest.approx(golden["ppl"], rel=within)
    if golden["method"] == "2ssp":
        share = re.search(r"(\d+)% of the plain loop", caplog.text)
        assert share is not None
        assert int(share[1]) <= 60


def test_the_dense_model_reads_as_the_authors_code_reads_it(dense, tokenizer) -> None:
    windows = list(wikitext("test", tokenizer, 6, 1024).split(1))
    assert perplexity(dense, windows) == pytest.approx(26.982, rel=1e-4)


def as_published(golden: dict[str, Any]) -> PruningMethod:
    """The method with the settings of a golden run, each paper counting its own way."""
    if golden["method"] == "flap":
        named = re.findall(r"WIFV|IFV|WIFN", golden["extra"])
        metric: Any = named[0] if named else "WIFV"
        return FLAP(golden["ratio"], metric, structure=structure(golden), sparsity_of="linears")
    if golden["method"] == "cfsp":
        gain = golden["nsamples"] * golden["seqlen"] / (128 * 1024)  # their distances are summed over tokens
        return CFSP(golden["ratio"], a=gain, sparsity_of="ffn")
    return TwoSSP(golden["ratio"])


def structure(golden: dict[str, Any]) -> Any:
    named = re.findall(r"[UA]L-[UA]M", golden["extra"])
    return named[0] if named else "AL-AM"


def agreement(plan: PruningPlan, removed: dict[str, dict[str, list[int]]]) -> float:
    """The fraction of units on which both decide alike, over all groups of the plan that the run speaks of."""
    alike = units = 0
    for kind, theirs in removed.items():
        for block in range(len(plan.before)) if kind in KINDS else ():
            name = f"blocks.{block}.{KINDS[kind]}"
            mine = set(range(plan.sizes[name])) - set(plan.keep[name].tolist())
            alike += plan.sizes[name] - len(mine ^ set(theirs.get(str(block), [])))
            units += plan.sizes[name]
    return alike / units


def dropped(plan: PruningPlan) -> list[int]:
    return sorted(int(name.split(".")[1]) for name, keep in plan.keep.items() if not len(keep))


def multi_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with a kv head for every query head: the authors' code knows no grouped queries."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.k_proj, attention.v_proj):
            heads = linear.weight.data.unflatten(0, (-1, attention.head_dim))
            weight = heads.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)
            linear.weight, linear.out_features = nn.Parameter(weight), len(weight)
        attention.num_key_value_groups = 1
    model.config.num_key_value_heads = model.config.num_attention_heads
    with torch.no_grad():
        ids = torch.arange(8)[None]
        assert torch.isfinite(model(input_ids=ids).logits).all()
    return model
