"""Which candidate wins, and that the result is what it would have made alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from plprune import CFSP, FASP, FLAP, BestOf, Calibration, PruningMethod, TwoSSP, load_pruned, prune
from plprune.cli import main
from plprune.methods import Request
from plprune.methods.run import source_of
from plprune.pruning.constraints import Constraint
from plprune.pruning.plan import PruningPlan
from plprune.pruning.surgery import plan_of
from tests.builders import logits, numbers, save_tiny, tiny, windows
from tests.ranks import in_ranks

CANDIDATES: tuple[PruningMethod, ...] = (CFSP(), FLAP(bias=False, repair="none"), FASP(repair="none"), TwoSSP())
IDS = windows(12) % 60  # the last four judge


def model() -> PreTrainedModel:
    return tiny(vocab_size=60)  # fewer tokens than the teacher's likeliest ones: none are pooled


def pruned(method: PruningMethod, count: int) -> PreTrainedModel:
    """A model pruned by one candidate, calibrated on the first windows."""
    prune(one := model(), dataclasses.replace(method, sparsity=0.4), [IDS[:count]])
    return one.eval()


@torch.no_grad()
def divergence(other: PreTrainedModel) -> float:
    """From the dense model, of the windows that judge, by all logits in float64."""
    p, q = (each(IDS[-4:]).logits[:, :-1].double().log_softmax(-1) for each in (model().eval(), other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_nearest_candidate_wins_round_by_round_and_prunes_as_it_would_alone() -> None:
    best = model()
    plan = prune(best, BestOf(0.4, CANDIDATES, held_out=4), [IDS[:7], IDS[7:]])
    first = [divergence(pruned(method, 2)) for method in CANDIDATES]
    better = sorted(range(4), key=first.__getitem__)[:2]
    second = [divergence(pruned(CANDIDATES[i], 4)) for i in better]
    winner = CANDIDATES[better[second.index(min(second))]]
    alone = pruned(winner, 8)

    names = [type(each).__name__ for each in (*CANDIDATES, *(CANDIDATES[i] for i in better))]
    found = plan.origin["trials"]
    assert [(each["method"], each["windows"]) for each in found] == list(zip(names, [2] * 4 + [4] * 2, strict=True))
    assert [each["divergence"] for each in found] == pytest.approx([*first, *second], abs=1e-3)
    assert len(set(first)) == 4
    assert (plan.method, plan.origin["best"]["method"]) == ("BestOf", type(winner).__name__)
    assert plan.origin["best"]["divergence"] == pytest.approx(divergence(alone), abs=1e-3)
    assert torch.equal(logits(best, IDS), logits(alone, IDS))
    assert plan.sparsity == 0.4


def test_the_plan_names_all_candidates_with_their_settings(tmp_path: Path) -> None:
    method = BestOf(0.3, [CFSP(a=3.0), CFSP()], held_out=2)
    plan = prune(model(), method, [IDS])
    plan.save(tmp_path / "plan.safetensors")
    read = PruningPlan.load(tmp_path / "plan.safetensors")
    assert read.settings == plan.settings == Request(method).settings
    assert [(each["method"], each["a"], each["sparsity"]) for each in read.settings["candidates"]] == [
        ("CFSP", 3.0, 0.3),
        ("CFSP", 1.0, 0.3),
    ]
    assert read.origin["trials"] == plan.origin["trials"]


def test_its_source_is_that_of_its_candidates_too() -> None:
    sources = {source_of(BestOf(0.3, own)) for own in ([CFSP()], [FLAP()], [CFSP(), FLAP()])}
    assert len(sources) == 3


def test_sizes_conflicts_and_work_are_those_of_all_candidates() -> None:
    one, uniform = model(), FASP(0.3, attention="none", bias=False)
    assert BestOf(0.3, [uniform]).predict_sizes(one) == uniform.predict_sizes(one)
    both = BestOf(0.3, [uniform, TwoSSP(0.3)])
    assert both.predict_sizes(one) == [*uniform.predict_sizes(one), *TwoSSP(0.3).predict_sizes(one)]
    reason = "all blocks must have one width: set `distance` to uniform"
    assert BestOf(0.3, [uniform, CFSP(0.3)]).conflicts(Constraint(uniform=True)) == [f"CFSP: {reason}"]
    restored = CFSP(0.3, repair="restore")
    alone, tried = restored.work(one, 16, 16), BestOf(0.3, [restored] * 2, held_out=8).work(one, 24, 16)
    # two trials on a quarter of the windows, with a pass over the blocks each, then one on all of them
    assert 1.5 * alone.flops < tried.flops < 4 * alone.flops
    assert tried.bytes == alone.bytes + sum(p.numel() * p.element_size() for p in one.parameters())
    assert both.biased == TwoSSP(0.3).biased
    assert BestOf(0.3, [FLAP()]).biased


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": []}, "`candidates` is empty: give the methods to try"),
        ({"first_share": 0.0}, "`first_share` is 0.0, but must be above 0 and at most 1"),
        ({"held_out": 0}, "held_out"),
        ({"held_out": 12}, "`held_out` takes 12 windows, but there are 12: raise num_samples"),
    ],
)
def test_what_cannot_be_tried_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(model(), BestOf(**{"sparsity": 0.3, "candidates": [CFSP()]} | settings), [IDS])


def test_a_model_without_weights_is_refused_before_anything_is_tried() -> None:
    with torch.device("meta"):
        bare = model()
    with pytest.raises(ValueError, match="copies of the whole model: leave out --stream"):
        BestOf(0.3, CANDIDATES).prune(bare, [IDS])


def _rank(ids: Tensor) -> tuple[dict[str, Tensor], list[Any]]:
    one = model()
    method = BestOf(0.4, CANDIDATES[:3], held_out=3)
    plan = prune(one, method, Calibration([ids], group=dist.group.WORLD if dist.is_initialized() else None))
    return {name: p.detach().clone() for name, p in one.named_parameters()}, plan.origin["trials"]


def test_two_processes_try_as_one() -> None:
    (one, trials), (other, same) = in_ranks(_rank, IDS)
    alone, expected = _rank(IDS)
    assert trials == same
    assert [each["method"] for each in trials] == [each["method"] for each in expected]
    assert [each["divergence"] for each in trials] == pytest.approx([each["divergence"] for each in expected], abs=2e-4)
    for name, value in alone.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-4)


def test_it_is_a_command(tmp_path: Path) -> None:
    text = numbers(tmp_path / "text.txt")
    gates = "{class_path: LearnedGates, init_args: {gain_rate: 0.0}}"
    options = ["--method=BestOf", "--method.sparsity=0.3", f"--method.candidates=[CFSP, {gates}]"]
    options += ["--method.held_out=2", f"--text={text}", "--num_samples=6", "--seq_len=16"]
    main(["prune", save_tiny(tmp_path / "model"), *options, f"--output={tmp_path / 'out'}"])
    plan = plan_of(load_pruned(tmp_path / "out"))
    assert plan is not None
    assert {each["method"] for each in plan.origin["trials"]} == {"CFSP", "LearnedGates"}
    assert plan.sparsity == 0.3
    assert "the best of 2 candidates" in (tmp_path / "out" / "README.md").read_text()
