"""Windows of a text as the Trainer sees them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from plprune import RecoveryData
from plprune.data import ResumableSampler
from plprune.text import (
    tokenised,
)
from tests.builders import decode, jsonl, numbers, tokenizer


def data(train: str, **settings: Any) -> RecoveryData:
    defaults: dict[str, Any] = {"seq_len": 16, "num_samples": 4, "batch_size": 3}
    own = RecoveryData(train, **(defaults | settings))
    own.tokenizer = tokenizer()
    own.setup()
    return own


def rows_of(loader: Any) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in loader for row in batch["input_ids"]]


# ---- reading


def test_a_sampler_visits_all_in_an_order_of_the_epoch_and_the_seed() -> None:
    sampler = ResumableSampler(range(20), seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1]
    assert len(sampler) == 20
    assert all(sorted(order) == list(range(20)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    assert list(ResumableSampler(range(20), seed=4)) != epochs[0]


def test_a_sampler_goes_on_within_its_first_epoch_only() -> None:
    whole, resumed = ResumableSampler(range(20), seed=3), ResumableSampler(range(20), seed=3, epoch=2, skip=12)
    for epoch, skip in ((2, 12), (3, 0), (4, 0)):
        whole.set_epoch(epoch)
        if epoch > 2:  # the trainer sets the epoch, but need not set the one to begin with
            resumed.set_epoch(epoch)
        assert list(resumed) == list(whole)[skip:]
        assert len(resumed) == len(whole) == 20


def test_processes_share_the_data() -> None:
    parts = [list(ResumableSampler(range(20), 3, num_replicas=2, rank=rank)) for rank in range(2)]
    rests = [list(ResumableSampler(range(20), 3, 0, 4, num_replicas=2, rank=rank)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(20))
    assert rests == [part[4:] for part in parts]


# ---- the data module


def test_the_held_out_part_shares_no_window_with_training(tmp_path: Path) -> None:
    own = data(numbers(tmp_path / "text.txt"), held_out=0.25)
    train, held_out = rows_of(own.train_dataloader()), rows_of(own.val_dataloader())
    tokens = tokenised(own.sources["train"] or "", tokenizer())[0].tolist()
    assert len(set(train + held_out)) == len(train) + len(held_out)
    assert len(held_out) == pytest.approx(len(tokens) * 0.25 / 16, abs=1)
    assert [token for row in held_out for token in row] == tokens[int(len(tokens) * 0.75) :][: len(held_out) * 16]
    assert [tuple(window[0].tolist()) for window in own.held_out_windows()] == held_out
    assert rows_of(own.test_dataloader()) == held_out


def test_calibration_is_drawn_from_what_is_trained_on(tmp_path: Path) -> None:
    own = data(numbers(tmp_path / "text.txt"), held_out=0.5, calibration_seq_len=20, calibration_batch_size=3)
    batches = own.calibration().batches
    assert [tuple(batch.shape) for batch in batches] == [(3, 20), (1, 20)]
    ids = tokenised(own.sources["train"] or "", tokenizer())[0]
    trained = [tuple(window.tolist()) for window in ids[: len(ids) // 2].unfold(0, 20, 20)]
    drawn = [tuple(window.tolist()) for batch in batches for window in batch]
    assert len(set(drawn)) == 4
    assert set(drawn) <= set(trained)


def test_every_part_may_have_a_text_of_its_own(tmp_path: Path) -> None:
    sources = {}
    for part, letter in (("train", "a"), ("validation", "b"), ("test", "c"), ("calibration", "d")):
        sources[part] = jsonl(tmp_path / f"{part}.jsonl", [{"text": letter * 100}])
    own = data(**sources)
    seen = [own.train_dataloader(), own.val_dataloader(), own.test_dataloader()]
    letters = [set(decode([token for row in rows_of(loader) for token in row]).replace("</s>", "")) for loader in seen]
    assert letters == [{"a"}, {"b"}, {"c"}]
    assert set(decode(torch.cat(own.calibration().batches).flatten()).replace("</s>", "")) == {"d"}


def test_limits(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [{"text": f"{i}" * 40} for i in range(9)])
    own = data(source, max_documents=3, max_windows=1, num_samples=1, held_out=0.4)
    text = decode([token for row in rows_of(own.train_dataloader()) for token in row])
    assert set(text.replace("</s>", "")) <= {"0", "1", "2"}
    assert len(own.held_out_windows()) == len(rows_of(own.val_dataloader())) == 1


def test_an_epoch_visits_every_window_once_and_drops_a_last_batch_that_is_not_full(tmp_path: Path) -> None:
    own = data(numbers(tmp_path / "text.txt"), batch_size=7)
    loader = own.train_dataloader()
    windows = own._parts["train"].tensors[0]
    rows = rows_of(loader)
    assert len(rows) == len(set(rows)) == len(windows) // 7 * 7
    assert set(rows) <= {tuple(window.tolist()) for window in windows}
    few = data(numbers(tmp_path / "text.txt", 0, 60), batch_size=1000, num_samples=1)
    assert len(rows_of(few.train_dataloader())) == len(few._parts["train"])


def test_training_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    source = numbers(tmp_path / "text.txt")
    loader, resumed = data(source).train_dataloader(), data(source)
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    resumed.load_state_dict({"epoch": 1, "batches": 4})
    assert rows_of(resumed.train_dataloader()) == rows_of(loader)[4 * 3 :]


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    own = data(numbers(tmp_path / "text.txt"))
    rows_of(own.train_dataloader())
    own.calibration()
    assert torch.get_rng_state().equal(before)


def test_a_text_is_needed_only_where_it_is_used(tmp_path: Path) -> None:
    own = data(numbers(tmp_path / "text.txt"), num_samples=1000)  # too many, for those who prune
    assert rows_of(own.train_dataloader())
    with pytest.raises(ValueError, match="num_samples is 1000"):
        own.calibration()


def test_a_failed_setup_does_not_pass_for_done(tmp_path: Path) -> None:
    own = RecoveryData(numbers(tmp_path / "text.txt", 0, 30), seq_len=64)
    own.tokenizer = tokenizer()
    for _ in range(2):
        with pytest.raises(ValueError, match="give more text"):
            own.setup()


def test_a_tokenizer_is_named_or_that_of_the_module(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = numbers(tmp_path / "text.txt")
    own = RecoveryData(source, tokenizer=str(tmp_path / "tokenizer"), seq_len=16)
    own.setup()
    assert own._parts["train"].tensors[0].equal(data(source)._parts["train"].tensors[0])
    with pytest.raises(ValueError, match="has no tokenizer: give `tokenizer`"):
        RecoveryData(source).setup()


@pytest.mark.parametrize(
    "settings",
    [{"held_out": 0}, {"held_out": 1.0}, {"train": "no.txt"}, {"test": "no.txt"}]
    + [{name: 0} for name in ("seq_len", "batch_size", "num_samples", "max_windows", "max_documents")]
    + [{name: -1} for name in ("calibration_seq_len", "calibration_batch_size")],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(settings))) if "no.txt" not in settings.values() else "no.txt"):
        RecoveryData(**settings)
