"""Perplexity and counts against plain loops."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.anatomy import FAMILIES, blocks_of
from plprune.evaluation import (
    Measurement,
    as_dict,
    measure,
    next_token_loss,
    parameters,
    perplexity,
    table,
    tokens_per_second,
)
from tests.builders import tiny, windows


@torch.no_grad()
def slow_perplexity(model: PreTrainedModel, ids: list[Tensor]) -> float:
    """Token by token."""
    losses = []
    for window in [row for batch in ids for row in batch]:
        scores = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        losses += [-float(scores[t - 1, window[t]]) for t in range(1, len(window))]
    return math.exp(sum(losses) / len(losses))


def test_the_loss_is_that_of_transformers_and_leaves_out_what_is_masked() -> None:
    model, ids = tiny(), windows(3)
    labels = ids.clone()
    labels[0, 5:9] = labels[2, -1] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(next_token_loss(output.logits, labels), output.loss)
    counted = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(next_token_loss(output.logits, labels, "sum"), output.loss * counted)


def test_the_loss_of_half_precision_logits_is_taken_in_full() -> None:
    logits, ids = torch.randn(2, 5, 7).bfloat16(), torch.randint(7, (2, 5))
    loss = next_token_loss(logits, ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_token_loss(logits.float(), ids), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_a_loop_over_tokens(family: str) -> None:
    model, ids = tiny(family), [windows(2), windows(1, 7), windows(3, 4)]
    assert perplexity(model, ids) == pytest.approx(slow_perplexity(model, ids), rel=1e-6)


def test_perplexity_does_not_depend_on_the_batches() -> None:
    model, ids = tiny(), windows(6)
    assert perplexity(model, ids.split(1)) == pytest.approx(perplexity(model, [ids]), rel=1e-6)


def test_perplexity_is_measured_without_dropout_and_leaves_the_mode() -> None:
    model = tiny("opt", dropout=0.5)
    expected = perplexity(model, [windows(2)])
    model.train()
    assert perplexity(model, [windows(2)]) == expected
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("ids", [[], [windows(3, 1)]])
def test_nothing_to_predict_is_refused(ids: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(tiny(), ids)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    model = tiny()
    model.lm_head.weight.data *= 1e6  # type: ignore[union-attr,operator]
    assert perplexity(model, [windows(1)]) == math.inf


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_parameters_count_once(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    own = {p.data_ptr(): p.numel() for p in model.parameters()}
    in_blocks, in_all = parameters(model)
    assert in_all == sum(own.values())
    assert in_blocks == sum(p.numel() for block in blocks_of(model) for p in block.module.parameters())
    assert parameters(tiny(family, tie_word_embeddings=False))[1] - in_all == (300 * 32 if tied else 0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_measurement_is_of_the_model_as_it_stands(dtype: torch.dtype, size: int) -> None:
    model: Any = tiny().to(dtype)  # type: ignore[arg-type]
    row = measure(model, [windows(2), windows(1)])
    assert row.perplexity == perplexity(model, [windows(2), windows(1)])
    assert (row.block_parameters, row.parameters) == parameters(model)
    assert row.bytes == size * row.parameters
    assert row.tokens_per_second is not None
    assert row.tokens_per_second > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_speed_is_measured_on_every_family(family: str) -> None:
    assert tokens_per_second(tiny(family), windows(1), repeats=1) > 0


ROWS = {
    "dense": Measurement(26.984, 106_202_880, 134_515_008, 538_060_032, 1234.56),
    "recovered": Measurement(math.inf, 7, 12_345, 49_380, 2.0),
}


def test_the_table_has_a_row_for_each_model_under_its_heading() -> None:
    assert table(ROWS).splitlines() == [
        "model       perplexity   in blocks  parameters   on disk   tokens/s",
        "dense            26.98 106,202,880 134,515,008  538.1 MB     1234.6",
        "recovered          inf           7      12,345    0.0 MB        2.0",
    ]


def test_a_speed_that_was_not_measured_is_a_dash() -> None:
    row = measure(tiny(), [windows(1)], speed=False)
    assert row.tokens_per_second is None
    assert table({"pruned": row}).splitlines()[1].split()[-1] == "-"
    assert "tokens_per_second" not in as_dict({"pruned": row})["pruned"]


def test_measurements_are_json() -> None:
    values = json.loads(json.dumps(as_dict({"dense": ROWS["dense"]})))
    assert values["dense"]["perplexity"] == 26.984
    assert set(values["dense"]) == {"perplexity", "block_parameters", "parameters", "bytes", "tokens_per_second"}
