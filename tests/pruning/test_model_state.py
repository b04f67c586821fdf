"""The state of a model: empty without a plan, the same through copies and adapters."""

import copy

from peft import LoraConfig, get_peft_model

from plprune import FLAP, prune
from plprune.pruning.model_state import ModelState, model_state
from plprune.pruning.surgery import plan_of
from tests.builders import tiny, windows


def test_a_plan_is_seen_through_copies_and_adapters() -> None:
    model = tiny()
    assert model_state(model) == ModelState()
    plan = prune(model, FLAP(0.3), [windows()])
    copied = plan_of(copy.deepcopy(model))
    assert copied is not None
    assert copied.digest == plan.digest
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    assert plan_of(adapted) is plan
    assert plan_of(adapted.unload()) is plan  # type: ignore[operator]
