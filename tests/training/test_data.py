"""Windows of a text as the Trainer sees them."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from plprune import RecoveryData
from plprune.evaluation.perplexity import Protocol, passage
from plprune.io.text import IGNORED, tokenised
from plprune.training.data import ResumableSampler
from tests.builders import decode, jsonl, numbers, tokenizer


def data(train: str, **settings: Any) -> RecoveryData:
    defaults: dict[str, Any] = {"seq_len": 16, "num_samples": 4, "batch_size": 3}
    own = RecoveryData(train, **(defaults | settings))
    own.tokenizer = tokenizer()
    own.setup()
    return own


def rows_of(loader: Any) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in loader for row in batch["input_ids"]]


def batches_of(loader: Any) -> list[list[tuple[int, ...]]]:
    return [[tuple(row.tolist()) for row in batch["input_ids"]] for batch in loader]


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


@pytest.mark.parametrize(("count", "replicas", "skip"), [(20, 2, 0), (23, 2, 8), (23, 3, 6), (23, 4, 7), (5, 4, 9)])
def test_processes_see_together_what_one_would(count: int, replicas: int, skip: int) -> None:
    parts = [list(ResumableSampler(range(count), 3, 0, skip, replicas, rank)) for rank in range(replicas)]
    alone = list(ResumableSampler(range(count), 3, 0, skip))
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == (len(alone) // replicas)
    for i, row in enumerate(zip(*parts, strict=True)):
        assert list(row) == alone[i * replicas : (i + 1) * replicas]


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


@pytest.mark.parametrize("bos", [None, True, False])
def test_all_windows_follow_the_tokenizers_rule_for_bos_and_are_those_of_evaluate(
    tmp_path: Path, bos: bool | None
) -> None:
    backend, source = copy.deepcopy(tokenizer().backend_tokenizer), numbers(tmp_path / "text.txt")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = RecoveryData(source, validation=source, seq_len=16, num_samples=4, bos=bos)
    own.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    own.setup()
    judged = passage(source, own.tokenizer, Protocol(16, bos=bos)).windows
    assert torch.cat(own.held_out_windows()).equal(torch.cat(judged))
    windows = [torch.cat(judged), own._parts["train"].tensors[0], torch.cat(own.calibration().batches)]
    for each in windows:
        assert (each[:, 0] == 1).all() == (bos is not False)
        assert not (each[:, 1:] == 1).any()
        assert each.shape[1] == 16


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
    resumed.load_state_dict({"epoch": 1, "samples": 12})
    assert rows_of(resumed.train_dataloader()) == rows_of(loader)[12:]


def test_the_same_batches_in_every_epoch_cannot_be_gone_on_with(tmp_path: Path) -> None:
    own: Any = data(numbers(tmp_path / "text.txt"))
    own.trainer = SimpleNamespace(overfit_batches=2, state=SimpleNamespace(fn="validate"))
    own.load_state_dict({"epoch": 0, "samples": 3})
    own.trainer.state.fn = "fit"
    with pytest.raises(ValueError, match=r"trainer\.overfit_batches begins every epoch with the same batch"):
        own.load_state_dict({"epoch": 0, "samples": 3})


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_with_the_next_batch_if_the_loader_was_made_before(tmp_path: Path, workers: int) -> None:
    source = numbers(tmp_path / "text.txt")
    resumed = data(source, num_workers=workers)
    iterator = iter(resumed.train_dataloader())
    resumed.load_state_dict({"epoch": 0, "samples": 12})
    assert rows_of(iterator) == rows_of(data(source).train_dataloader())[12:]


class Share:
    """As much of a trainer as says which of several processes this is."""

    def __init__(self, replicas: int, rank: int) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": replicas, "rank": rank}
        self.lightning_module, self.overfit_batches = None, 0


@pytest.mark.parametrize("batch_size", [3, 7, 40])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_processes_train_on_the_global_batches_of_one(tmp_path: Path, replicas: int, batch_size: int) -> None:
    source = numbers(tmp_path / "text.txt")
    alone = batches_of(data(source, batch_size=replicas * batch_size).train_dataloader())
    ranks = []
    for rank in range(replicas):
        own = data(source, batch_size=batch_size)
        own.trainer = Share(replicas, rank)  # type: ignore[assignment]
        ranks.append(batches_of(own.train_dataloader()))
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    assert len(ranks[0]) == len(alone)
    for whole, *parts in zip(alone, *ranks, strict=True):
        seen = [row for part in parts for row in part]
        if len(whole) == replicas * batch_size:
            assert sorted(seen) == sorted(whole)
        else:  # the only batch, of a text with too few windows for a full one
            assert set(seen) <= set(whole)
            assert len(seen) == len(whole) // replicas * replicas


def test_batches_are_counted_anew_for_another_number_of_processes(tmp_path: Path) -> None:
    source = numbers(tmp_path / "text.txt")
    count = len(data(source)._parts["train"])
    for replicas, batch_size, samples in ((1, 4, 8), (2, 4, 8), (2, 2, 8), (3, 2, 8), (1, 4, count), (2, 1000, 2000)):
        own = data(source, batch_size=batch_size)
        own.trainer = Share(replicas, 0)  # type: ignore[assignment]
        own.load_state_dict({"epoch": 0, "samples": samples})
        loader = own.train_dataloader()
        assert own.batches_done() + len(batches_of(loader)) == len(loader)


def test_too_few_windows_for_the_processes_are_refused(tmp_path: Path) -> None:
    own = data(numbers(tmp_path / "text.txt", 0, 60), num_samples=1)
    own.trainer = Share(50, 0)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="too few for 50 processes: give more text"):
        own.train_dataloader()


@pytest.mark.parametrize("replicas", [2, 3, 7])
def test_every_held_out_window_counts_once_in_all_processes(tmp_path: Path, replicas: int) -> None:
    own = data(numbers(tmp_path / "text.txt"), max_windows=5)
    own.trainer = Share(replicas, 0)  # type: ignore[assignment]
    ids, labels = next(iter(DataLoader(own.val_dataloader().dataset, batch_size=100)))
    assert len(ids) % replicas == 0
    counted = ids[(labels != IGNORED).any(1)]
    assert torch.equal(counted, own._parts["validation"].tensors[0][:5])


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
    [
        {"held_out": 0},
        {"held_out": 1.0},
        {"max_dropped": -0.1},
        {"max_dropped": 1.1},
        {"train": "no.txt"},
        {"test": "no.txt"},
    ]
    + [{name: 0} for name in ("seq_len", "batch_size", "num_samples", "max_windows", "max_documents")]
    + [{name: -1} for name in ("calibration_seq_len", "calibration_batch_size")],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(settings))) if "no.txt" not in settings.values() else "no.txt"):
        RecoveryData(**settings)
