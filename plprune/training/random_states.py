"""The states of all processes' random generators, for a run that goes on as it would have."""

import logging
from typing import cast

import torch
from torch import Tensor

from plprune.io import distributed

log = logging.getLogger(__name__)


def gathered(device: torch.device) -> dict[str, Tensor]:  # [processes, bytes] each
    """The states of all processes, by the kind of device.

    Args:
        device: Where this process trains.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    group = distributed.world()
    return {kind: cast(Tensor, distributed.gather_rows(state[None], group)).cpu() for kind, state in states.items()}


def restore(states: dict[str, Tensor], device: torch.device) -> None:
    """Gives this process its state; says so if the states are of another number of processes.

    Args:
        states: As :func:`gathered` returned them; empty if there are none.
        device: Where this process trains.
    """
    count, rank = distributed.size(distributed.world()), distributed.rank(distributed.world())
    if states and len(states["cpu"]) != count:
        log.warning(
            "the checkpoint is of %d processes, this run has %d: dropout is not what it would have been",
            *(len(states["cpu"]), count),
        )
    elif states:
        torch.set_rng_state(states["cpu"][rank].clone())  # a row as it is would have torch read elsewhere
        if "cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"][rank].clone(), device)
