"""The search for attentions against a plain loop over perplexities of the whole model."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import innermost
from plprune.pruning import attention_search
from plprune.pruning.attention_search import AttentionSearch
from plprune.pruning.surgery import Surgery
from tests.builders import tiny, windows
from tests.methods import plain_loop, traced


def test_the_search_saves_two_fifths_of_the_work() -> None:
    model, ids = tiny(num_hidden_layers=12), windows(2)
    reference = copy.deepcopy(model)
    search = AttentionSearch(Surgery(model), list(ids.split(1)), model.device)
    search.drop(5)
    dropped = [block.index for block in blocks_of(model) if not block.has_attention]
    assert dropped == sorted(plain_loop(reference, ids, 5))
    plain = sum(12 - k for k in range(5)) * 12 * 2
    assert search.evaluations <= 0.6 * plain


def test_the_kept_states_are_those_of_the_model_after_every_drop() -> None:
    model, ids = tiny(num_hidden_layers=5), windows(1)
    search = AttentionSearch(Surgery(model), [ids], model.device)
    for count in range(1, 4):
        search.drop(1)
        assert sum(block.has_attention for block in blocks_of(model)) == 5 - count
        for kept, state in zip(search.entering, states(model, ids), strict=True):
            torch.testing.assert_close(kept[0].double(), state, rtol=1e-6, atol=1e-6)


def states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    return traced(without_groups(model), ids)[1]


def without_groups(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model whose attentions give zero where they were dropped."""
    dense = tiny(num_hidden_layers=5)
    for block, pruned in zip(blocks_of(dense), blocks_of(model), strict=True):
        if not pruned.has_attention:
            innermost(block.part("self_attn.o_proj")).weight.data.zero_()
    return dense


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([torch.nan, torch.nan, torch.nan], 0), ([torch.nan, 3.0, 2.0], 2), ([torch.inf, 1.0, 2.0], 1)],
)
def test_a_loss_that_is_not_finite_is_the_worst(
    losses: list[float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, left = tiny(), iter(losses)
    monkeypatch.setattr(attention_search, "next_token_loss", lambda *_: torch.tensor(next(left)))
    search = AttentionSearch(Surgery(model), [windows(1)], model.device)
    search.drop(1)
    assert [block.index for block in blocks_of(model) if not block.has_attention] == [expected]
    assert len(search.entering) == 4
