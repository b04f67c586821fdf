from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from plprune.architecture.blocks import Decision
from plprune.checkpoint.weights import check_values
from plprune.io import state
from plprune.io.atomic import write_errors
from plprune.io.state import read_state, write_state
from plprune.pruning.hidden_states import DiskStates, MemoryStates
from plprune.pruning.journal import BlockRecord, Journal, NoJournal, PassLog
from plprune.pruning.statistics import BlockInfluence, Gram, HoldoutGram, Moments, Norms, Statistic, StatisticGroup

ASKED = {"method": "FLAP", "settings": {"sparsity": 0.2}, "seed": 0}


def journal(folder: Path, **how: Any) -> Journal:
    return Journal(folder / ".out.progress", how.pop("asked", ASKED), **how)


def never() -> Any:
    raise AssertionError("computed again")


def grouped() -> StatisticGroup:
    return StatisticGroup({"norms": Norms(), "gram": Gram()})


def numbers(statistic: Any) -> list[Any]:
    if isinstance(statistic, StatisticGroup):
        return [each for part in statistic.parts.values() for each in numbers(part)]
    if isinstance(statistic, HoldoutGram):
        return [statistic.next, *numbers(statistic.fitting), *numbers(statistic.held_out)]
    names = ("count", "samples", "mean", "norm", "pooled", "running_variance", "variance")
    return [torch.as_tensor(getattr(statistic, name)) for name in names if hasattr(statistic, name)]


@pytest.mark.parametrize("statistic", [Moments, Norms, Gram, HoldoutGram, grouped])
def test_a_statistic_that_was_kept_gives_the_same_numbers(statistic: Callable[[], Statistic], tmp_path: Path) -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    kept, again = statistic(), statistic()
    kept.update(x)
    write_state(kept.state_dict(), tmp_path / "state")
    again.load_state_dict(read_state(tmp_path / "state"))
    kept.update(2 * x)
    again.update(2 * x)
    for one, other in zip(numbers(again), numbers(kept), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_numbers_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    influence, again = BlockInfluence(), BlockInfluence()
    influence.update(torch.randn(1, 3, 4), torch.randn(1, 3, 4))
    write_state(influence.state_dict(), tmp_path / "state")
    again.load_state_dict(read_state(tmp_path / "state"))
    assert vars(again) == vars(influence)


def test_what_plain_statistics_are_made_of_comes_back(tmp_path: Path) -> None:
    x = torch.arange(4)
    value = {"a": [1, None, (True, "b")], 3: {"x": x[1:]}, "nan": float("nan"), "same": x[1:]}
    write_state(value, tmp_path / "state")
    again = read_state(tmp_path / "state")
    assert again["a"] == value["a"]
    assert torch.equal(again[3]["x"], x[1:])
    assert torch.equal(again["same"], x[1:])
    assert again["nan"] != again["nan"]


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    class Forgetful(Norms):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

    with pytest.raises(ValueError, match="Forgetful cannot be kept for --resume: add seen to its `state_fields`"):
        Forgetful().state_dict()
    with pytest.raises(ValueError, match="a set cannot be saved for --resume"):
        write_state({"a": {1, 2}}, tmp_path / "state")


def test_what_another_version_wrote_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "VERSION", "1")
    write_state({"count": 1}, tmp_path / "state")
    monkeypatch.undo()
    save_file({"0": torch.ones(1)}, tmp_path / "older", metadata={"plprune": "{}"})  # the first files had no version
    for file in ("state", "older"):
        with pytest.raises(ValueError, match=f"{file} was written by another version of plprune: start again"):
            read_state(tmp_path / file)


def test_an_unfinished_journal_is_not_forgotten(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        first.once("a", lambda: [1, 2])
    with pytest.raises(ValueError, match="go on with it by --resume, or start again by --overwrite"):
        journal(tmp_path)
    with journal(tmp_path, resume=True, overwrite=True) as again:
        assert again.once("a", never) == [1, 2]
    with journal(tmp_path, overwrite=True) as new:
        assert new.once("a", lambda: 3) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"settings": {"sparsity": 0.3}}, r"another sparsity \(0.2, now 0.3\)"),
        ({"device": "cuda"}, r"another device \(None, now cuda\)"),
    ],
)
def test_a_journal_is_of_one_command(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        first.once("a", lambda: 1)
    with pytest.raises(ValueError, match=said):
        journal(tmp_path, asked=ASKED | change, resume=True)
    with journal(tmp_path, resume=True) as again:
        assert again.once("a", never) == 1


def test_no_two_processes_write_to_one_journal(tmp_path: Path) -> None:
    with journal(tmp_path) as first:
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match="another process is at work"):
                journal(tmp_path, **how)
        assert first.once("a", lambda: 1) == first.once("a", never) == 1


def test_without_a_journal_everything_is_computed_and_kept_in_memory() -> None:
    computed: list[int] = []
    journal = NoJournal()
    for _ in range(2):
        journal.once("a", lambda: computed.append(1))
    assert len(computed) == 2
    assert isinstance(journal.hidden_states(torch.device("cpu")), list)


def test_nothing_is_left_of_a_run_that_did_nothing(tmp_path: Path) -> None:
    with journal(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_walk_keeps_the_hidden_states_of_one_block_only(tmp_path: Path) -> None:
    states = [torch.randn(2, 3) for _ in range(2)]
    with journal(tmp_path) as kept:
        log = PassLog(kept)
        for i in range(3):
            leaving = MemoryStates(torch.device("cpu"))
            leaving += [x + i for x in states]
            log.append(BlockRecord({"count": i}, [], 0), leaving)
    with journal(tmp_path, resume=True) as kept:
        log = PassLog(kept)
        assert log.done == 3
        assert all(torch.equal(a, b + 2) for a, b in zip(log.entering(), states, strict=True))
        assert [log.read(i, torch.device("cpu")).influence for i in range(3)] == [{"count": i} for i in range(3)]
        assert len(list(kept.folder.rglob("hidden"))) == 1
        assert PassLog(kept).done == 0  # of a second walk nothing is known


def test_decisions_come_back(tmp_path: Path) -> None:
    decisions = [Decision("blocks.0.ffn", torch.tensor([1, 3]), 5, ["w"]), Decision("b", torch.tensor([0]), 1)]
    with journal(tmp_path) as kept:
        kept.write_block(0, 1, {"x": torch.ones(2)}, decisions, check_values)
        assert kept.decisions_of(0, 1) == decisions
        assert kept.decisions_of(0, 1) != decisions[:1]


def test_what_is_half_written_does_not_count(tmp_path: Path) -> None:
    def fail(journal: Journal) -> None:
        with journal.publish("results/b") as folder:
            (folder / "result.json").write_text("1")
            raise RuntimeError

    with journal(tmp_path) as kept:
        kept.once("a", lambda: 1)
        with pytest.raises(RuntimeError):
            fail(kept)
        (kept.scratch("states") / "x").write_text("half")
    with journal(tmp_path, resume=True) as again:
        assert not (again.folder / "new").exists()
        assert again.once("b", lambda: 2) == 2


@pytest.mark.parametrize("error", [OSError(28, "no space"), Exception("no\nspace")])
def test_what_cannot_be_written_is_one_line(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"cannot write .*no space\): check free space .*--resume"),
        write_errors(tmp_path),
    ):
        raise error
    with pytest.raises(KeyError), write_errors(tmp_path):
        raise KeyError


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    filed = DiskStates(tmp_path)
    filed.append(torch.ones(3))
    (tmp_path / "00000.safetensors").write_bytes(b"xxxx")
    with pytest.raises(ValueError, match=r"00000\.safetensors is missing or damaged"):
        filed[0]
