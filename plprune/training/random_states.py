"""The states of all processes' random generators, so that a resumed run draws the same numbers."""

import logging
from typing import cast

import torch
from torch import Tensor

from plprune.io import distributed

log = logging.getLogger(__name__)


def gather_random_states(device: torch.device) -> dict[str, Tensor]:  # [processes, bytes] each
    """Collects the generator states of all processes, by kind of device.

    Args:
        device: The device on which this process trains.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    group = distributed.world()
    return {kind: cast(Tensor, distributed.gather_rows(state[None], group)).cpu() for kind, state in states.items()}


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Sets this process's generators; only warns if the states come from another number of processes.

    Args:
        states: The states that :func:`gather_random_states` returned, or an empty dict.
        device: The device on which this process trains.
    """
    count, rank = distributed.size(distributed.world()), distributed.rank(distributed.world())
    if states and len(states["cpu"]) != count:
        log.warning(
            "the checkpoint is of %d processes and this run has %d: dropout differs from an uninterrupted run",
            *(len(states["cpu"]), count),
        )
    elif states:
        torch.set_rng_state(states["cpu"][rank].clone())  # torch would ignore the offset of a view
        if "cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"][rank].clone(), device)
