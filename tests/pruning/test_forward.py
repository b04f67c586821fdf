"""Blocks run one by one do what the model does, on what it passes them."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.pruning.forward import (
    BlockInputs,
    Call,
    check_ids,
    checking_ids,
    checksums,
    evaluating,
    logits_from,
    record_inputs,
    run_block,
    same_values,
    split_call,
)
from plprune.pruning.hidden_states import MemoryStates
from plprune.pruning.journal import NotFinite
from tests.builders import logits, tiny, tokenizer, windows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny()


def first_block(model: PreTrainedModel) -> BlockInputs:
    """The first block on two batches."""
    hidden, calls = zip(*(record_inputs(model, ids) for ids in windows(4).split(2)), strict=True)
    return BlockInputs(blocks_of(model)[0], list(hidden), [each[0] for each in calls], CPU, lambda: MemoryStates(CPU))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])  # windows, positions and scales differ
def test_blocks_one_by_one_are_the_model(family: str) -> None:
    model, ids = tiny(family), windows(2, 12, seed=7)
    hidden, calls = record_inputs(model, ids)
    assert len(calls) == len(blocks_of(model))
    for block, call in zip(blocks_of(model), calls, strict=True):
        hidden = run_block(block, hidden, call)
    torch.testing.assert_close(logits_from(model, ids, hidden), logits(model, ids))
    torch.testing.assert_close(logits(model, ids), logits(tiny(family), ids))  # and it is itself again


def test_ids_beyond_the_embedding_are_named(model: PreTrainedModel) -> None:
    check_ids(model, [windows(), torch.tensor([[299]]), torch.empty(1, 0, dtype=torch.long)])
    with pytest.raises(ValueError, match=r"of 300 rows, has none for: 300, 301, 302, 303, 304 and 1 more; use"):
        check_ids(model, [torch.tensor([[305, 304, 0]]), torch.tensor([[300, 301, 302, 303, 303]])])
    with checking_ids(model, tokenizer()), pytest.raises(ValueError, match=r"has none for: None \(400\); use"):
        model(input_ids=torch.tensor([[400]]))
    with pytest.raises(IndexError):  # nobody looks any more
        model(input_ids=torch.tensor([[400]]))


def test_outputs_are_computed_again_only_where_weights_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, ran = first_block(tiny()), []
    run: Callable[..., None] = inputs.run
    monkeypatch.setattr(inputs, "run", lambda *args: (ran.append(1), run(*args)))
    before = torch.cat(list(inputs.outputs()))
    assert torch.equal(torch.cat(list(inputs.outputs())), before)
    assert len(ran) == 1
    inputs.observed.append({})
    next(inputs.block.module.parameters()).data[0, 0] += 1
    assert not torch.equal(torch.cat(list(inputs.outputs())), before)
    assert len(ran) == 2
    assert inputs.observed == []  # it was of the block as it had been


def test_an_activation_that_is_not_finite_is_said(model: PreTrainedModel) -> None:
    inputs = first_block(model)
    inputs.hidden = [inputs.hidden[0], inputs.hidden[1].clone().index_fill_(1, torch.tensor([3]), torch.inf)]
    with pytest.raises(NotFinite, match="NaN or infinity in the activations of block 0"):
        inputs.run()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.__setitem__((1, 2), w[1, 2] + 1e-6),
        lambda w: w.copy_(w.flip(0)),  # the same values in other rows
        lambda w: w.copy_(w.roll(2, 1)),
    ],
)
def test_checksums_tell_values_apart(change: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 4)
    before = checksums(linear)
    assert same_values(before, checksums(linear))
    assert sum(each.numel() for each in checksums(nn.Linear(64, 64)).values()) < 64 * 64 / 10
    change(linear.weight.data)
    assert not same_values(before, checksums(linear))


def test_checksums_see_small_changes_of_biases_and_other_names() -> None:
    odd = nn.Linear(5, 3)  # of rows that are no whole numbers of 64 bits
    before = checksums(odd)
    odd.bias.data[2] += 1e-6
    assert not same_values(before, checksums(odd))
    assert not same_values({}, before)


def test_a_mode_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in (model, *model)] == [True, True, False]


def test_a_call_moves_with_all_that_is_in_it() -> None:
    x, mask = torch.zeros(1), torch.ones(2)
    assert split_call((x, mask), {"a": 1}) == (x, Call((mask,), {"a": 1}))
    assert split_call((), {"hidden_states": x, "a": 1}) == (x, Call((), {"a": 1}))
    moved = Call((mask, [mask]), {"pair": (mask, mask), "use_cache": False}).to(torch.device("meta"))
    assert [moved.args[0].device.type, moved.kwargs["pair"][1].device.type] == ["meta"] * 2
    assert moved.kwargs["use_cache"] is False
