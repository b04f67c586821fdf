"""The loss of recovery against what the model's own forward pass loses."""

import copy
from typing import Any

import pytest
import torch

from plprune import REAP, prune
from plprune.training.objective import Objective
from tests.builders import windows
from tests.zoo import build


@pytest.mark.parametrize("whole_head", [True, False])
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_unequal_loads_of_experts_count_as_in_the_models_own_forward(
    family: str, asked: bool, whole_head: bool
) -> None:
    model: Any = build(family, router_aux_loss_coef=0.5, output_router_logits=asked)
    prune(model, REAP(0.25, sparsity_of="experts"), [windows()])
    theirs, ids = copy.deepcopy(model), windows(3)
    batch, objective = {"input_ids": ids, "labels": ids}, Objective(model, None, whole_head, False)
    expected = theirs(input_ids=ids, labels=ids, use_cache=False)
    loss = objective.losses(batch, objective.denominators(batch))["train_loss"]
    torch.testing.assert_close(loss, expected.loss)
    assert (expected.aux_loss is not None) == asked
    loss.backward()
    expected.loss.backward()
    for parameter, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_unequal_loads_weigh_as_the_counted_tokens_of_their_batches() -> None:
    model: Any = build("mixtral", router_aux_loss_coef=0.5, output_router_logits=True)
    objective, sizes = Objective(model, None, True, False), (1, 3)
    batches = [{"input_ids": windows(n, seed=n), "labels": windows(n, seed=n)} for n in sizes]
    total = torch.stack([objective.denominators(batch) for batch in batches]).sum(0)
    found = sum(objective.losses(batch, total)["train_loss"] for batch in batches)
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    torch.testing.assert_close(found, (losses[0] + 3 * losses[1]) / 4)
