"""Every method decides on a GPU what it decides on the CPU, however the work is laid out there."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from plprune import FASP, PruningPlan, load_pruned, perplexity, prune
from plprune.checkpoint.load import load_model
from plprune.methods import Request
from plprune.pruning import surgery
from plprune.pruning.calibration import Calibration
from plprune.streaming import journal_path, open_streamed, prune_streamed
from tests.builders import METHODS, REPAIRED, method, tokenizer
from tests.gpu.models import JUDGED, TEXT, model, save, unlike

pytestmark = pytest.mark.gpu

MAIN = ("FLAP AL-AM", "FASP value_channels", "CFSP activation", "TwoSSP", "LearnedGates")
STREAMED = MAIN[:-1]  # LearnedGates needs the whole model


def pruned(
    name: str, device: torch.device, network: PreTrainedModel | None = None, **calibration: Any
) -> tuple[PreTrainedModel, PruningPlan]:
    network = model() if network is None else network
    return network, prune(network, method(name), Calibration(TEXT, device=device, **calibration))


@pytest.mark.parametrize("name", [*METHODS, *REPAIRED])
def test_the_decisions_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    """The model waits on the CPU, and one block at a time is on the GPU; LearnedGates has it there as a whole."""
    there, expected = pruned(name, torch.device("cpu"))
    here, found = pruned(name, device)
    assert {p.device.type for p in here.parameters()} == {"cpu"}
    assert unlike(found, expected) <= 0.001
    assert found.repaired == expected.repaired
    wanted = perplexity(there, JUDGED)
    assert perplexity(here, JUDGED) == pytest.approx(wanted, rel=1e-4)
    assert perplexity(here.to(device), JUDGED) == pytest.approx(wanted, rel=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MAIN)
def test_a_model_that_is_there_as_a_whole_is_pruned_there(name: str, device: torch.device) -> None:
    _, expected = pruned(name, device)
    here = model().to(device)  # type: ignore[arg-type]
    found = prune(here, method(name), TEXT)
    assert unlike(found, expected) <= 0.001
    assert {p.device for p in here.parameters()} == {device}
    assert perplexity(here, JUDGED) < float("inf")


@pytest.mark.parametrize("name", ["FLAP AL-AM", "FASP value_channels", "TwoSSP"])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_decisions_do_not_depend_on_the_batch(name: str, size: int, device: torch.device) -> None:
    _, expected = pruned(name, device)
    batches = list(torch.cat(TEXT).split(size))
    assert unlike(prune(model(), method(name), Calibration(batches, device=device)), expected) <= 0.001


@pytest.mark.parametrize("name", MAIN)
def test_hidden_states_that_wait_on_the_cpu_change_nothing(name: str, device: torch.device) -> None:
    _, expected = pruned(name, device)
    _, found = pruned(name, device, offload="cpu")
    assert unlike(found, expected) == 0


@pytest.mark.parametrize("name", MAIN)
def test_bfloat16(name: str, device: torch.device) -> None:
    exact, _ = pruned(name, device)
    here, plan = pruned(name, device, model().bfloat16())
    assert {p.dtype for p in here.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in here.parameters())
    assert plan.reached == pytest.approx(0.2, abs=0.01)
    there = perplexity(here.to(device), JUDGED)  # type: ignore[arg-type]
    assert there == pytest.approx(perplexity(exact, JUDGED), rel=0.1)


@pytest.mark.parametrize("name", STREAMED)
def test_a_model_that_streams_from_disk_is_pruned_as_in_memory(name: str, device: torch.device, tmp_path: Path) -> None:
    folder, calibration = save(tmp_path / "model"), Calibration(TEXT, device, "disk")
    network, expected = pruned(name, device, load_model(folder))
    found = prune_streamed(open_streamed(folder), Request(method(name)), calibration, tmp_path / "out", tokenizer())
    assert unlike(found, expected) == 0
    again = load_pruned(tmp_path / "out")
    for ours, theirs in zip(again.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["FASP value_channels", "FLAP restore"])
def test_a_stopped_streaming_run_goes_on_there(
    name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calibration = save(tmp_path / "model"), Calibration(TEXT, device, "disk")
    how = method(name)
    expected = prune_streamed(open_streamed(folder), Request(how), calibration, tmp_path / "whole")
    keep, calls = surgery.Surgery.keep, []

    def stopping(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        keep(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(surgery.Surgery, "keep", stopping)
        with pytest.raises(KeyboardInterrupt):
            prune_streamed(open_streamed(folder), Request(how), calibration, tmp_path / "out")
    assert journal_path(tmp_path / "out").exists()
    found = prune_streamed(open_streamed(folder), Request(how), calibration, tmp_path / "out", resume=True)
    assert found.digest == expected.digest
    whole, stopped = load_pruned(tmp_path / "whole"), load_pruned(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))


def test_one_block_at_a_time_takes_the_memory_of_a_block(device: torch.device) -> None:
    network = model(hidden_size=512, intermediate_size=1024, num_hidden_layers=12)
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prune(network, dataclasses.replace(FASP(0.2), attention="none"), Calibration(TEXT, device=device, offload="cpu"))
    if device.type == "cuda":
        assert torch.cuda.max_memory_allocated() - before < size / 2
        assert torch.cuda.memory_allocated() - before < size / 20
    assert {p.device.type for p in network.parameters()} == {"cpu"}
