"""Observing a model once, for all prunings to come that its activations decide."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from plprune.io.atomic import staged
from plprune.io.state import read_state, restore, write_state
from plprune.pruning.plan import fingerprint
from plprune.pruning.statistics import BlockInfluence, Moments, Norms, Statistic, Together
from plprune.pruning.stream import Calibration, Observations, Observed, observe, stream

KINDS = {kind.__name__: kind for kind in (Moments, Norms)}  # not Gram, which those need who look at what they changed


def survey(model: PreTrainedModel, calibration: Calibration) -> Observations:
    """Observes every consumer's inputs by all statistics in :data:`KINDS`, in one pass.

    Args:
        model: The model as it will be when it is pruned.
        calibration: The text.
    """
    blocks = []
    for block, inputs in stream(model, calibration, "calibrating"):
        rows = observe(block, inputs, lambda: Together([kind() for kind in KINDS.values()]))
        statistics = {group.consumer.path: dict(zip(KINDS, seen.parts, strict=True)) for group, seen in rows}
        blocks.append(Observed(inputs.influence, statistics))
    return Observations(fingerprint(model.named_parameters()), calibration.fingerprint, blocks)


def save(known: Observations, file: Path) -> None:
    """Writes observations, whole or not at all."""
    with staged(file, overwrite=True) as temporary:
        write_state(vars(known), temporary)


def load(file: Path, device: torch.device) -> Observations:
    """Observations that :func:`save` has written; those that an accelerator has made go to `device`."""
    state = read_state(file, device)
    return Observations(state["weights"], state["text"], [_block(block) for block in state["blocks"]])


def _block(state: dict) -> Observed:
    influence = BlockInfluence()
    restore(influence, state["influence"])
    statistics: dict[str, dict[str, Statistic]] = {
        path: {name: KINDS[name]() for name in kinds} for path, kinds in state["statistics"].items()
    }
    for path, kinds in statistics.items():
        for name, statistic in kinds.items():
            restore(statistic, state["statistics"][path][name])
    return Observed(influence, statistics)
