"""What a model card says is what the plan and the record say."""

from pathlib import Path

import pytest

from plprune.checkpoint.model_card import CARD, RECORD, UNKNOWN, card, record_of, write_card
from tests.pruning.test_plan import plan

ORIGIN = {"model": "org/base", "weights": "abc", "calibration": "def", "tokens": 4096, "seed": 7}


def test_it_counts_what_is_left_and_what_was_there() -> None:
    first = plan(origin=ORIGIN)
    text = card(plan(before=[50, 250], after=[40, 200], previous=first, origin={"tokens": 1}), {})
    assert "# base, pruned\n\n840 parameters, of 1,000 before." in text
    assert text.count("By FLAP (`sparsity: 0.2`, `metric: WIFV`): ") == 2
    assert text.index("25.0% of the blocks'") < text.index("20.0% of the blocks'")  # the oldest first
    assert "| 0 | 50 of 100 | 0 of 4 kv heads, 3 of 6 FFN channels |\n| 1 | 250 of 300 |  |" in text
    assert "- Base model: org/base, weights abc" in text


def test_it_says_where_it_comes_from() -> None:
    text = card(plan(origin=ORIGIN | {"versions": {"torch": "2", "python": "3"}}), {})
    assert "- Calibration: 4,096 tokens, fingerprint def, seed 7" in text
    assert text.endswith(f"- Plan {plan(origin=ORIGIN | {'versions': {'torch': '2', 'python': '3'}}).digest}; "
                         "torch 2, python 3\n")  # fmt: skip
    assert f"- Licence: {UNKNOWN}" in text


def test_it_names_the_best_of_several_candidates_with_its_settings() -> None:
    best = {"method": "CFSP", "a": 3.0, "divergence": 0.25}
    text = card(plan(origin=ORIGIN | {"best": best}, settings={"candidates": [{}, {}], "held_out": 2}), {})
    assert "By CFSP, the best of 2 candidates, (`a: 3.0`, `divergence: 0.25`): " in text


def test_a_plan_without_its_origin_has_a_card_too() -> None:
    assert "- Calibration: not recorded" in card(plan(), {})


@pytest.mark.parametrize(("model", "named"), [("org/base", True), ("./org", False), ("/org/base", False), ("a", False)])
def test_only_a_name_on_the_hub_is_its_base_model(model: str, named: bool) -> None:
    head = card(plan(origin=ORIGIN | {"model": model}), {"licence": "mit"}).split("---")[1]
    assert (f"\nbase_model: {model}" in head) == named
    assert head.startswith("\nlicense: mit\n")
    assert "license" not in card(plan(origin=ORIGIN), {}).split("---")[1]


def test_it_shows_what_the_run_has_measured() -> None:
    record = {"perplexity": {"dense": 8.0, "recovered": 9.126}, "text": {"train": "a.txt", "validation": None}}
    text = card(plan(origin=ORIGIN), record | {"training": {"trained": "lora", "steps": 50}}, "| parity |")
    assert "## What it cost\n\n|  | perplexity |\n|---|---|\n| dense | 8.00 |\n| recovered | 9.13 |" in text
    assert "held-out text of the run: train a.txt.\n\nRecovered: trained lora, steps 50.\n" in text
    assert "## Checked\n\n| parity |\n\n" in text
    assert "## Recovery\n\n\nRecovered: steps 5." in card(plan(origin=ORIGIN), {"training": {"steps": 5}})
    assert not any(head in card(plan(origin=ORIGIN), {}) for head in ("## What it cost", "## Recovery", "## Checked"))


def test_the_record_stands_beside_the_card(tmp_path: Path) -> None:
    record = {"perplexity": {"dense": 8.0}, "licence": "mit"}
    write_card(tmp_path, plan(origin=ORIGIN), record)
    assert record_of(tmp_path) == record
    assert (tmp_path / CARD).read_text() == card(plan(origin=ORIGIN), record)
    write_card(tmp_path / ".", plan(origin=ORIGIN), record_of(tmp_path))  # from what is there, it is the same
    assert record_of(str(tmp_path)) == record


@pytest.mark.parametrize("record", [None, {}, {"licence": None}])
def test_a_record_of_nothing_is_not_written(record: dict | None, tmp_path: Path) -> None:
    write_card(tmp_path, plan(origin=ORIGIN), record)
    assert not (tmp_path / RECORD).exists()
    assert record_of(tmp_path) == {}
