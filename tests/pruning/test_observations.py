"""Observations are what each statistic would have seen by itself, also once they were on disk."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.pruning.calibration import Calibration, Observations
from plprune.pruning.observations import KINDS, load, save, survey
from plprune.pruning.plan import fingerprint
from plprune.pruning.statistics import Moments, Norms
from plprune.pruning.stream import observe, stream
from tests.builders import tiny, windows

CPU = torch.device("cpu")
Surveyed = tuple[PreTrainedModel, Calibration, Observations]


@pytest.fixture(scope="module")
def surveyed() -> Surveyed:
    model, calibration = tiny(), Calibration([windows(4), windows(2, seed=3)])
    return model, calibration, survey(model, calibration)


def figures(known: Observations) -> list[torch.Tensor]:
    """All that can be asked of observations."""
    found = []
    for block in known.blocks:
        found += [torch.tensor(block.influence.distance(name)) for name in ("angular", "cosine", "mse", "mae")]
        for kinds in block.statistics.values():
            moments, norms = kinds["Moments"], kinds["Norms"]
            assert isinstance(moments, Moments)
            assert isinstance(norms, Norms)
            found += [moments.mean, moments.variance, moments.running_variance, moments.norm, norms.mean, norms.pooled]
            found += [torch.tensor([moments.count, norms.samples])]
    return found


def test_every_consumer_of_every_block_is_observed_by_every_kind(surveyed: Surveyed) -> None:
    model, calibration, known = surveyed
    assert [list(block.statistics) for block in known.blocks] == [
        [group.consumer.path for group in block.groups()] for block in blocks_of(model)
    ]
    for observed, (block, inputs) in zip(known.blocks, stream(model, calibration), strict=True):
        alone = observe(block, inputs, Moments), observe(block, inputs, Norms)
        for (group, moments), (_, norms) in zip(*alone, strict=True):
            there = observed.statistics[group.consumer.path]
            assert list(there) == list(KINDS)
            assert torch.equal(there["Moments"].variance, moments.variance)  # type: ignore[attr-defined]
            assert torch.equal(there["Norms"].mean, norms.mean)  # type: ignore[attr-defined]
        assert observed.influence.distance("angular") == inputs.influence.distance("angular") > 0


def test_observations_are_of_one_model_and_one_text(surveyed: Surveyed) -> None:
    model, calibration, known = surveyed
    assert known.weights == fingerprint(model.named_parameters())
    assert known.text == calibration.fingerprint
    assert survey(model, Calibration([windows(4)])).text != known.text
    assert survey(tiny(seed=1), calibration).weights != known.weights


def test_observations_come_back_from_disk_as_they_were(surveyed: Surveyed, tmp_path: Path) -> None:
    *_, known = surveyed
    save(known, tmp_path / "known.safetensors")
    again = load(tmp_path / "known.safetensors", CPU)
    assert (again.weights, again.text) == (known.weights, known.text)
    assert len(figures(again)) == len(figures(known)) == 3 * (4 + 2 * 7)
    assert all(torch.equal(one, other) for one, other in zip(figures(again), figures(known), strict=True))
    assert [list(block.statistics) for block in again.blocks] == [list(block.statistics) for block in known.blocks]
    assert [path.name for path in tmp_path.iterdir()] == ["known.safetensors"]
