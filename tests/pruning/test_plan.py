"""The plan as numbers and as a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plprune.pruning.plan import FILE, PruningPlan, fingerprint


def plan(**changes: Any) -> PruningPlan:
    parts: dict[str, Any] = {
        "keep": {"blocks.0.attention": torch.tensor([], dtype=torch.long), "blocks.0.ffn": torch.tensor([0, 2, 5])},
        "sizes": {"blocks.0.attention": 4, "blocks.0.ffn": 6},
        "importance": torch.tensor([0.25, 0.75], dtype=torch.float64),
        "before": [100, 300],
        "after": [50, 250],
        "rest": 600,
        "sparsity": 0.2,
        "method": "FLAP",
        "settings": {"sparsity": 0.2, "metric": "WIFV"},
        "repaired": ["model.layers.0.mlp.down_proj.bias"],
        "config": {"model_type": "llama", "rope": {"theta": 1e4}},
        "origin": {"model": "m", "seed": None, "versions": {"torch": "2"}},
    }
    return PruningPlan(**parts | changes)


def same(a: PruningPlan, b: PruningPlan) -> bool:
    fields = [f.name for f in dataclasses.fields(a) if f.name not in ("keep", "importance", "previous")]
    return (
        all(getattr(a, name) == getattr(b, name) for name in fields)
        and a.keep.keys() == b.keep.keys()
        and all(torch.equal(a.keep[name], b.keep[name]) for name in a.keep)
        and all(k.dtype == torch.long for k in b.keep.values())
        and torch.equal(a.importance, b.importance)
        and (a.previous is None) == (b.previous is None)
        and (a.previous is None or b.previous is None or same(a.previous, b.previous))
    )


def test_the_numbers() -> None:
    assert plan().reached == pytest.approx(100 / 400)
    assert plan().reached_of_model == pytest.approx(100 / 1000)
    assert plan().damage.tolist() == pytest.approx([0.5, 1 / 6])


def test_a_block_that_gained_a_bias_has_negative_damage() -> None:
    assert plan(after=[110, 250]).damage[0].item() == pytest.approx(-0.1)


def test_chain_is_oldest_first() -> None:
    first = plan()
    second = plan(previous=first)
    third = plan(previous=second)
    assert third.chain() == [first, second, third]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_plan_comes_back_from_its_file_as_it_was(depth: int, tmp_path: Path) -> None:
    whole = plan()
    for i in range(1, depth):
        keep = {"blocks.0.ffn": torch.arange(i)}
        whole = plan(previous=whole, keep=keep, importance=torch.full((2,), float(i), dtype=torch.float64))
    whole.save(tmp_path / "plan.safetensors")
    again = PruningPlan.load(tmp_path / "plan.safetensors")
    assert same(whole, again)
    assert again.digest == whole.digest


def test_a_folder_stands_for_the_plan_in_it(tmp_path: Path) -> None:
    plan().save(tmp_path / FILE)
    assert same(PruningPlan.load(tmp_path), plan())


def test_the_file_reads_with_plain_safetensors_and_json(tmp_path: Path) -> None:
    plan(previous=plan()).save(tmp_path / FILE)
    tensors = load_file(tmp_path / FILE)
    assert tensors["keep.blocks.0.ffn"].tolist() == [0, 2, 5]
    assert tensors["keep.blocks.0.ffn"].dtype == torch.int32
    assert tensors["importance"].tolist() == [0.25, 0.75]
    with safe_open(tmp_path / FILE, framework="pt") as file:
        receipt = json.loads(file.metadata()["plprune"])
    assert (receipt["method"], receipt["sizes"]["blocks.0.ffn"]) == ("FLAP", 6)
    assert receipt["previous"]["before"] == [100, 300]


def test_the_plan_of_an_8b_model_is_about_a_megabyte(tmp_path: Path) -> None:
    keep = {f"blocks.{i}.ffn": torch.arange(11000) for i in range(32)}
    keep |= {f"blocks.{i}.attention": torch.arange(6) for i in range(32)}
    plan(keep=keep, before=[2 * 10**8] * 32, after=[10**8] * 32).save(tmp_path / FILE)
    assert (tmp_path / FILE).stat().st_size < 1.5e6


def test_an_existing_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    plan().save(tmp_path / FILE)
    with pytest.raises(FileExistsError):
        plan(rest=7).save(tmp_path / FILE)
    plan(rest=7).save(tmp_path / FILE, overwrite=True)
    assert PruningPlan.load(tmp_path).rest == 7
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("length", [0, 5, 100, -30])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    plan().save(tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:length])
    with pytest.raises(ValueError, match="truncated, corrupted or not a plan"):
        PruningPlan.load(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"plprune": "{not json"},
        {"plprune": "[]"},
        {"plprune": "5"},
        {"plprune": '{"method": "FLAP"}'},
        {"plprune": '{"of": "a later version"}'},
    ],
)
def test_a_foreign_file_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"importance": torch.ones(2)}, tmp_path / FILE, metadata=metadata)
    with pytest.raises(ValueError, match="not a plan"):
        PruningPlan.load(tmp_path)


def test_text_is_no_plan_and_nothing_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep the first three channels, please")
    with pytest.raises(ValueError, match="not a plan"):
        PruningPlan.load(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="does not exist"):
        PruningPlan.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="does not exist"):
        PruningPlan.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"keep": {"blocks.0.ffn": torch.tensor([0, 2, 4])}},
        {"keep": {"blocks.1.ffn": torch.tensor([0, 2, 5])}},
        {"importance": torch.tensor([0.25, 0.5], dtype=torch.float64)},
        {"method": "FASP"},
        {"settings": {"sparsity": 0.3}},
        {"after": [50, 249]},
        {"repaired": []},
        {"origin": {"model": "another"}},
        {"previous": plan()},
    ],
)
def test_the_digest_tells_plans_apart(change: dict[str, Any]) -> None:
    assert plan().digest == plan().digest
    assert plan(**change).digest != plan().digest


def test_a_fingerprint_tells_names_shapes_types_and_values_apart() -> None:
    w = torch.arange(6.0)
    prints = [("w", w), ("v", w), ("w", w.view(2, 3)), ("w", w.double()), ("w", w.flip(0)), ("w", w.bfloat16())]
    assert len({fingerprint([pair]) for pair in prints}) == len(prints)
    assert fingerprint([("w", w)]) == fingerprint([("w", w.clone())])


def test_a_fingerprint_of_a_large_tensor_is_of_a_sample_spread_over_it() -> None:
    w = torch.zeros(100_000)
    one, last = w.clone(), w.clone()
    one[::20] = 1
    last[-1000:] = 1
    assert len({fingerprint([("w", t)]) for t in (w, one, last)}) == 3
