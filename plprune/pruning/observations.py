"""Computes, saves and loads the statistics of a dense model, so that several prunings can share them."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from plprune.io.atomic import staged
from plprune.io.state import read_state, write_state
from plprune.pruning.calibration import Calibration, Observations, Observed
from plprune.pruning.plan import fingerprint
from plprune.pruning.statistics import BlockInfluence, Moments, Norms, Statistic, StatisticGroup
from plprune.pruning.stream import observe, stream

# Without Gram: the methods that use it prune earlier blocks first, which changes the inputs of later ones.
KINDS: dict[str, type[Statistic]] = {kind.__name__: kind for kind in (Moments, Norms)}


def survey(model: PreTrainedModel, calibration: Calibration) -> Observations:
    """Computes all statistics in :data:`KINDS` of the inputs of every consumer but experts, in one pass.

    Args:
        model: The model, with the same weights as at pruning.
        calibration: The calibration text.
    """
    blocks = []
    for block, inputs in stream(model, calibration, "calibrating"):
        rows = observe(block, inputs, _every_kind, experts=False)  # each method observes these itself
        blocks.append(Observed(inputs.influence, {group.consumer.path: seen.parts for group, seen in rows}))
    return Observations(fingerprint(model.named_parameters()), calibration.fingerprint, blocks)


def _every_kind() -> StatisticGroup:
    return StatisticGroup({name: kind() for name, kind in KINDS.items()})


def save(known: Observations, file: Path) -> None:
    """Writes observations to a file, atomically."""
    state = {"weights": known.weights, "text": known.text, "blocks": [_state(block) for block in known.blocks]}
    with staged(file, overwrite=True) as temporary:
        write_state(state, temporary)


def load(file: Path, device: torch.device) -> Observations:
    """Reads a file that :func:`save` wrote; tensors that were on an accelerator go to `device`.

    Raises:
        ValueError: The file is damaged, or another version of plprune wrote it.
    """
    state = read_state(file, device)
    return Observations(state["weights"], state["text"], [_block(block) for block in state["blocks"]])


def _state(block: Observed) -> dict[str, Any]:
    statistics = {path: StatisticGroup(parts).state_dict() for path, parts in block.statistics.items()}
    return {"influence": block.influence.state_dict(), "statistics": statistics}


def _block(state: dict[str, Any]) -> Observed:
    block = Observed(BlockInfluence(), {path: {n: KINDS[n]() for n in of} for path, of in state["statistics"].items()})
    block.influence.load_state_dict(state["influence"])
    for path, parts in block.statistics.items():
        StatisticGroup(parts).load_state_dict(state["statistics"][path])
    return block
