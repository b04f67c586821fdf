"""Every sub-block pruned alone: the same as pruning it, computed once."""

import copy
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from plprune import perplexity
from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import matrix
from plprune.cli import main
from plprune.evaluation import sensitivity
from plprune.evaluation.sensitivity import BlockInputs, Sensitivity
from plprune.io.atomic import file_lock
from plprune.io.cache import Cache
from plprune.pruning.allocation import top_k
from plprune.pruning.calibration import Calibration
from plprune.pruning.surgery import Surgery
from tests.builders import numbers, save_tiny, tiny, windows

TEXT = list(windows(3, 12, seed=3).split(1))
CALIBRATION = Calibration([windows(4, 12, seed=5)])


def found(model, folder: Path, **settings) -> Sensitivity:
    return sensitivity.sensitivity(model, TEXT, CALIBRATION, Cache(folder), **settings)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks of which something was computed, in order."""
    done: list[int] = []
    own = BlockInputs.perplexity

    def counted(self: BlockInputs, block):
        done.append(block.index)
        return own(self, block)

    monkeypatch.setattr(BlockInputs, "perplexity", counted)
    return done


@pytest.mark.parametrize(
    "family", ["llama", "olmo2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gemma2", "opt", "phi3"))]
)
def test_it_is_the_perplexity_of_the_model_pruned_so(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = found(model, tmp_path)
    assert result.dense == perplexity(model, TEXT)
    assert len(result.cells) == 3 * 2 * 3
    scores = sensitivity._scores(model, CALIBRATION)
    for cell in result.cells:
        real = copy.deepcopy(model)
        block = blocks_of(real)[cell.block]
        group = next(group for group in block.groups() if group.kind == cell.kind)
        Surgery(real).keep(block, group, top_k(scores[group.name], len(group) - cell.removed))
        assert cell.perplexity == pytest.approx(perplexity(real, TEXT), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_whole_ffn_goes_where_no_width_can_be_0(tmp_path: Path) -> None:
    model = tiny("gpt2")
    cells = found(model, tmp_path, fractions=[1.0]).cells
    matrix(blocks_of(model)[2].part("mlp.c_proj")).data.zero_()
    assert cells[-1].perplexity == pytest.approx(perplexity(model, TEXT), rel=1e-5)


def test_the_units_that_put_out_least_go_first() -> None:
    model = tiny("llama")
    block = blocks_of(model)[1]
    attention, ffn = block.groups()
    with torch.no_grad():
        matrix(block.part("mlp.down_proj"))[:, 7] *= 1e-4
        matrix(block.part("self_attn.o_proj"))[:, attention.consumer.index[2]] *= 1e-4
    scores = sensitivity._scores(model, CALIBRATION)
    assert scores[ffn.name].argmin() == 7
    assert scores[attention.name].argmin() == 2


def test_at_least_one_unit_goes(tmp_path: Path) -> None:
    cells = found(tiny("llama"), tmp_path, fractions=[0.01]).cells
    assert {(cell.kind, cell.removed, cell.units) for cell in cells} == {("attention", 1, 4), ("ffn", 1, 48)}


def test_parts_that_are_gone_are_left_out(tmp_path: Path) -> None:
    model = tiny("llama")
    surgery = Surgery(model)
    block = surgery.blocks[0]
    surgery.keep(block, block.groups()[0], torch.zeros(0, dtype=torch.long))
    cells = found(model, tmp_path, fractions=[1.0]).cells
    assert [(cell.block, cell.kind) for cell in cells if cell.block == 0] == [(0, "ffn")]


@pytest.mark.parametrize("fractions", [[], [0.0], [0.5, 1.2], [math.nan]])
def test_impossible_fractions_are_refused(fractions: list[float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        found(tiny("llama"), tmp_path, fractions=fractions)


def test_a_stopped_run_computes_only_what_is_missing(tmp_path: Path, computed: list[int], monkeypatch) -> None:
    model = tiny("llama")
    counted = BlockInputs.perplexity

    def killed(self: BlockInputs, block):
        if len(computed) == 7:
            raise KeyboardInterrupt
        return counted(self, block)

    monkeypatch.setattr(BlockInputs, "perplexity", killed)
    with pytest.raises(KeyboardInterrupt):
        found(model, tmp_path / "a")
    monkeypatch.setattr(BlockInputs, "perplexity", counted)
    again = found(model, tmp_path / "a")
    assert computed == [0] * 6 + [1] * 6 + [2] * 6
    whole = found(model, tmp_path / "b")
    assert again == whole


def test_each_process_takes_what_nobody_is_at(tmp_path: Path, computed: list[int]) -> None:
    whole, locks = found(tiny("llama"), tmp_path / "a"), tmp_path / "b" / "locks"
    computed.clear()
    with ExitStack() as held, ThreadPoolExecutor() as other:
        for cell in [path for path in (tmp_path / "a").glob("*.json") if "removed" in path.read_text()][:4]:
            held.enter_context(file_lock(locks / cell.stem))
        result = other.submit(found, tiny("llama"), tmp_path / "b")
        end = time.monotonic() + 60
        while len(computed) < 14:
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(TimeoutError):  # it waits for the others
            result.result(0.1)
        held.close()
        assert result.result(30) == whole
    assert len(computed) == 18


def test_what_is_known_is_not_computed(tmp_path: Path, computed: list[int], monkeypatch) -> None:
    first = found(tiny("llama"), tmp_path)
    computed.clear()
    for name in ("record_inputs", "stream", "perplexity"):
        monkeypatch.setattr(f"plprune.evaluation.sensitivity.{name}", lambda *_: pytest.fail("ran the model"))
    assert found(tiny("llama"), tmp_path) == first
    assert computed == []


def test_another_model_text_or_calibration_is_computed_anew(tmp_path: Path, computed: list[int]) -> None:
    found(tiny("llama"), tmp_path)
    for model, text, calibration, cells in (
        (tiny("llama", seed=9), TEXT, CALIBRATION, 18),
        (tiny("llama"), TEXT[:2], CALIBRATION, 18),
        (tiny("llama"), TEXT, Calibration([windows(4, 12, seed=6)]), 12),  # whole parts are the same
    ):
        computed.clear()
        sensitivity.sensitivity(model, text, calibration, Cache(tmp_path))
        assert len(computed) == cells


def test_a_model_that_breaks_has_no_perplexity(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("plprune.evaluation.sensitivity.next_token_loss", lambda *_: torch.tensor(math.nan))
    result = found(tiny("llama"), tmp_path, fractions=[1.0])
    assert {cell.perplexity for cell in result.cells} == {None}
    assert "inf" in sensitivity.sensitivity_table(result)


def test_the_table_shows_both_ends() -> None:
    cells = [sensitivity.SubBlockResult(block, "ffn", 1.0, 4, 4, 10.0 + block) for block in range(13)]
    lines = sensitivity.sensitivity_table(Sensitivity(9.0, cells)).splitlines()
    assert [line.split()[1] for line in lines[1:6]] == ["12", "11", "10", "9", "8"]
    assert lines[6] == "... 3 more ..."
    assert [line.split()[1] for line in lines[7:12]] == ["4", "3", "2", "1", "0"]


# ---- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tiny(tmp_path / "model")
    numbers(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ["sensitivity", "model", "--output=out", "--text=text.txt", "--seq_len=16", "--max_windows=2"]


def test_the_command_writes_what_it_finds(here: Path, capsys, computed: list[int]) -> None:
    main([*COMMAND, "--num_samples=4", "--fractions=0.5,1"])
    printed = capsys.readouterr().out
    record = json.loads((here / "out" / "sensitivity.json").read_text())
    assert record["kind"] == "sensitivity"
    assert record["fractions"] == [0.5, 1.0]
    assert [(c["block"], c["kind"], c["fraction"]) for c in record["cells"]] == [
        (block, kind, fraction) for block in range(3) for kind in ("attention", "ffn") for fraction in (0.5, 1.0)
    ]
    assert record["protocol"]["text"] == "text.txt"
    assert f"{record['dense']:.2f}" in printed
    assert "out/sensitivity.html" in printed
    assert (here / "out" / "sensitivity.html").read_text().startswith("<!doctype html>")
    computed.clear()
    main([*COMMAND, "--num_samples=4", "--fractions=1"])  # going on is not overwriting
    assert computed == []
    assert len(json.loads((here / "out" / "sensitivity.json").read_text())["cells"]) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fractions=2"], "fractions must be above 0 and at most 1"),
        (["--fractions=some"], "fractions are numbers separated by commas"),
        (["--max_windows=0"], "max_windows is 0"),
        (["--num_samples=4000"], "num_samples is 4000"),
        (["--text=no.txt"], "no.txt does not exist"),
        (["--device=gpu"], "there is no device 'gpu'"),
    ],
)
def test_bad_input_is_one_line(here: Path, capsys, options: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*COMMAND, *options])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (here / "out").exists()
