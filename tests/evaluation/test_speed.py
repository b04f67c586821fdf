"""Speed: greedy writing against runs without a cache, the doubling of batches, and what is said of slow models."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from plprune.evaluation import speed
from plprune.evaluation.speed import Speed, Spread, measure_speed, speed_table, why_not_faster
from plprune.evaluation.standalone import greedy_tokens
from plprune.methods import prune
from tests.builders import DEFAULTS, FAMILIES, method, tiny, windows

SETTINGS: dict[str, Any] = {"prompt": 8, "new_tokens": 4, "repeats": 2, "max_batch": 2}


@pytest.mark.parametrize("pruned", [None, *DEFAULTS])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
@pytest.mark.filterwarnings("error::FutureWarning")
@torch.no_grad()
def test_what_is_written_is_what_a_model_without_a_cache_would_write(family: str, pruned: str | None) -> None:
    model = tiny(family)
    if pruned:
        prune(model, method(pruned), [windows()])
    ids = windows(2, 12)
    written = torch.cat(list(greedy_tokens(model, ids, 5)), 1)
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids[:, 12:])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family: str) -> None:
    found = measure_speed(tiny(family), **SETTINGS)
    assert min(found.first_token.low, found.reading.low, found.writing.low, found.saturated.low) > 0
    assert found.first_token.low <= found.first_token.median <= found.first_token.high
    assert found.saturated.median >= found.writing.median
    assert (found.device, found.dtype, found.gathers) == ("cpu", "float32", 0)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["widths"] == found.widths


def test_the_structure_that_bears_on_speed_is_that_of_the_model() -> None:
    model = tiny()
    dense = measure_speed(model, **SETTINGS)
    prune(model, method("FASP value_channels"), [windows()])
    found = measure_speed(model, **SETTINGS)
    assert dense.widths == [48] * 3
    assert dense.attention_widths == [32] * 3
    assert found.weights == 4 * sum(p.numel() for p in model.parameters()) < dense.weights
    assert all(a < b for a, b in zip(found.widths, dense.widths, strict=True))
    assert found.gathers > dense.gathers == 0
    prune(model, method("TwoSSP"), [windows()])
    assert 0 in measure_speed(model, **SETTINGS).attention_widths


def test_the_peak_of_memory_is_that_of_the_run() -> None:
    before = speed._resident_peak()
    if before is None:
        pytest.skip("no /proc/self/status, as Linux has it")
    held = torch.ones(150_000_000 // 4)
    found = measure_speed(tiny(), **SETTINGS)
    assert found.peak is not None
    assert found.peak > held.numel() * 4
    del held
    later = measure_speed(tiny(), **SETTINGS)
    assert later.peak is not None
    assert later.peak < found.peak - 100_000_000
    assert later.saturated_peak is not None
    assert later.saturated_peak >= later.peak


def test_the_mode_of_a_model_stays() -> None:
    model = tiny().train()
    measure_speed(model, **SETTINGS)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("seconds", "cap", "batch", "ended_by"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, 8, 8, "cap"),
        ({1: 1.0, 2: 1.1, 4: 2.1, 8: 9.0}, 8, 4, "gain"),  # the last that gained anything
        ({1: 1.0, 2: 1.1, 4: 2.3, 8: 9.0}, 8, 2, "gain"),
        ({1: 1.0, 2: 2.5}, 8, 1, "gain"),
        ({1: 1.0, 2: 1.1, 4: None}, 8, 2, "memory"),
        ({1: 1.0}, 1, 1, "cap"),
    ],
)
def test_batches_are_doubled_while_it_pays(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float | None], cap: int, batch: int, ended_by: str
) -> None:
    def runs(model: Any, ids: Any, new_tokens: int, repeats: int) -> list[tuple[float, float]]:
        if (rest := seconds[len(ids)]) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [(0.5, rest)] * repeats

    monkeypatch.setattr(speed, "_runs", runs)
    found = measure_speed(tiny(), prompt=8, new_tokens=11, repeats=3, max_batch=cap)
    assert (found.batch, found.ended_by) == (batch, ended_by)
    assert found.first_token == Spread(0.5, 0.5, 0.5)
    assert found.reading.median == 16
    assert found.writing.median == 10
    assert found.saturated.median == pytest.approx(batch * 10 / (seconds[batch] or 0))


def test_other_faults_are_not_taken_for_a_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(model: Any, ids: Any, new_tokens: int, repeats: int) -> list[tuple[float, float]]:
        if len(ids) > 1:
            raise RuntimeError("shapes do not match")
        return [(0.5, 1.0)] * repeats

    monkeypatch.setattr(speed, "_runs", runs)
    with pytest.raises(RuntimeError, match="shapes"):
        measure_speed(tiny(), **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"new_tokens": 1}, "at least 2"),
        ({"repeats": 0}, "repeats is 0"),
        ({"prompt": 120}, "the model takes 128 tokens"),
    ],
)
def test_what_cannot_be_measured(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        measure_speed(tiny(), **settings)


def made(scale: float = 1.0, **others: Any) -> Speed:
    """A model of 100 MB; `scale` is how fast."""
    spread = Spread(100 * scale, 98 * scale, 102 * scale)
    facts = {"device": "cpu", "dtype": "float32", "threads": 1, "prompt": 128, "new_tokens": 32, "repeats": 5}
    figures = {"first_token": Spread(1 / scale, 1 / scale, 1 / scale), "reading": spread, "writing": spread}
    figures |= {"saturated": spread, "batch": 8, "ended_by": "gain", "peak": 10**9, "saturated_peak": None}
    shape = {"peak_of": "resident set", "weights": 10**8, "widths": [128], "attention_widths": [64], "gathers": 0}
    return Speed(**{**facts, **figures, **shape, **others})


def test_a_faster_model_needs_no_excuse() -> None:
    assert why_not_faster(made(), made(1.2, weights=8 * 10**7, widths=[97], gathers=4)) == []


def test_each_figure_that_is_not_faster_is_named() -> None:
    lines = why_not_faster(made(), made(1.2, writing=Spread(101, 99, 103), saturated=Spread(50, 49, 51)))
    assert lines[0] == "writing at batch 1 is not faster beyond the spread: 101.0 tokens/s, dense 100.0"
    assert lines[1] == "writing at saturation is slower: 50.0 tokens/s, dense 100.0"
    assert "reading" not in "".join(lines[:2])


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"weights": 8 * 10**7}, "20% fewer bytes can give 1.25 times the speed at most"),
        ({"weights": 8 * 10**7}, "weights are read at 8.0 GB/s, dense 10.0"),
        ({"weights": 10**8}, "as many bytes as the dense model's"),
        ({"widths": [97, 128]}, "1 of 2 FFN widths are no multiples of 8,"),
        ({"widths": [104, 104]}, "2 of 2 FFN widths are no multiples of 32,"),
        ({"widths": [96, 128]}, "1 of 2 FFN widths are no multiples of 64,"),
        ({"attention_widths": [51]}, "1 of 1 attention widths are no multiples of 8,"),
        ({"gathers": 6}, "6 projections pick or place single value channels"),
    ],
)
def test_the_reasons_are_those_of_the_structure(facts: dict[str, Any], said: str) -> None:
    assert any(said in line for line in why_not_faster(made(), made(**facts)))


def test_widths_that_the_dense_model_has_too_are_no_reason() -> None:
    dense, pruned = made(widths=[97], attention_widths=[30]), made(widths=[75], attention_widths=[30])
    assert not any("multiples" in line for line in why_not_faster(dense, pruned))


def test_speeds_of_other_machines_are_not_compared() -> None:
    with pytest.raises(ValueError, match="measure both on one machine"):
        why_not_faster(made(), made(device="cuda"))


def test_the_table_has_a_column_for_each_model() -> None:
    lines = speed_table({"dense": made(), "pruned": made(2.0, batch=16, ended_by="memory")}).splitlines()
    assert lines[0].split() == ["dense", "pruned"]
    assert lines[1].split()[-6:] == ["1000.0", "[1000.0,", "1000.0]", "500.0", "[500.0,", "500.0]"]
    assert "8 (more gains less than 10%)" in lines[5]
    assert "16 (more does not fit)" in lines[5]
    assert lines[6].split()[-4:] == ["1", "GB", "1", "GB"]
    assert lines[7].split()[-2:] == ["-", "-"]
    assert "128 tokens read, 32 written; float32, cpu, 1 CPU threads; medians and quartiles of 5 runs" in lines[8]
