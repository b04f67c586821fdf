"""How any method is run, one of a user's own included."""

import dataclasses
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import (
    CFSP,
    FASP,
    FLAP,
    REAP,
    Calibration,
    LearnedGates,
    PruningMethod,
    PruningPlan,
    TwoSSP,
    load_pruned,
    prune,
    save_pruned,
)
from plprune.architecture.blocks import blocks_of
from plprune.methods import Request
from plprune.pruning.allocation import top_k
from plprune.pruning.surgery import Surgery, plan_of
from tests.builders import tiny, windows

EVERY = [CFSP, FASP, FLAP, LearnedGates, TwoSSP]
every_method = pytest.mark.parametrize("method", EVERY)
and_of_experts = pytest.mark.parametrize("method", [*EVERY, REAP])


@dataclasses.dataclass(frozen=True)
class Magnitude(PruningMethod):
    """A fifth method, in one file: FFN channels by the norm of their down column."""

    sparsity: float = 0.2

    def prune(self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor]) -> PruningPlan:
        surgery = Surgery(model)
        for block in blocks_of(model):
            (group,) = block.groups("none")
            score = block.weight(group).norm(dim=(0, 2))
            surgery.keep(block, group, top_k(score, round(len(group) * (1 - self.sparsity))))
        return surgery.plan("Magnitude", dataclasses.asdict(self), torch.ones(len(surgery.blocks)))


def test_a_method_of_ones_own_is_one_class(tmp_path: Any) -> None:
    model = tiny()
    plan = prune(model, Magnitude(0.25), [windows()])
    assert [len(keep) for keep in plan.keep.values()] == [36] * 3
    save_pruned(model, tmp_path)
    assert plan_of(load_pruned(tmp_path)).method == "Magnitude"  # type: ignore[union-attr]


def test_a_plan_says_where_it_came_from() -> None:
    model = tiny()
    model.config.name_or_path = "some/model"
    plan = prune(model, FLAP(0.2), list(windows().split(2)), seed=7)
    assert plan_of(model) is plan
    assert plan.origin["model"] == "some/model"
    assert (plan.origin["tokens"], plan.origin["seed"]) == (6 * 16, 7)
    assert plan.origin["versions"]["torch"] == version("torch")
    assert set(plan.origin["versions"]) == {"python", "plprune", "torch", "transformers"}
    assert plan.method == "FLAP"
    assert plan.settings == Request(FLAP(0.2)).settings
    assert plan.config["model_type"] == "llama"


def test_the_origin_is_of_the_model_before_it_was_pruned() -> None:
    runs = [(0, FLAP(0.2)), (0, CFSP(0.3)), (1, FLAP(0.2))]
    weights = [prune(tiny(seed=seed), method, [windows()]).origin["weights"] for seed, method in runs]
    assert weights[0] == weights[1] != weights[2]


def test_the_fingerprint_of_a_text_is_of_its_windows_and_not_of_the_batches() -> None:
    ids = windows(6, 16)
    prints = {Calibration(list(ids.split(size))).fingerprint for size in (1, 4, 6)}
    assert len(prints) == 1
    assert Calibration([ids.view(12, 8)]).fingerprint not in prints
    assert Calibration([ids.flip(0)]).fingerprint not in prints


@and_of_experts
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2])
def test_every_method_refuses_a_sparsity_outside_of_0_to_1(method: Any, sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\)"):
        method(sparsity=sparsity)


@every_method
def test_every_method_refuses_what_is_out_of_reach_and_leaves_the_model_alone(method: Any) -> None:
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="sparsity"):
        prune(model, method(sparsity=0.995), [windows()])
    assert plan_of(model) is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@and_of_experts
def test_settings_are_frozen(method: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method().sparsity = 0.5


def test_a_method_must_say_how_it_prunes() -> None:
    with pytest.raises(TypeError, match="abstract"):
        PruningMethod()  # type: ignore[abstract]


@pytest.mark.parametrize("method", [CFSP(0.3), FASP(0.3), FLAP(0.3), LearnedGates(0.3), TwoSSP(0.4, drop_attentions=3)])
def test_a_model_in_training_mode_gives_the_same_plan(method: PruningMethod) -> None:
    trained, evaluated = (tiny("opt", dropout=0.5, num_hidden_layers=6) for _ in range(2))
    plan = prune(trained.train(), method, [windows()])
    assert plan.digest == prune(evaluated, method, [windows()]).digest
    assert all(m.training for m in trained.modules())
