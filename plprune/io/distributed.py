"""Several processes that act as one: each takes its share of the work, and all end with what one process would have.

Everything goes through `torch.distributed`. A `group` of None means that this process is alone, and every function then
gives back what it was given.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
log = logging.getLogger(__name__)
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")  # what torchrun sets
ProcessGroup = dist.ProcessGroup | None


def world() -> ProcessGroup:
    """All processes of the run; None if there is only this one."""
    ready = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if ready else None


def launched_count() -> int:
    """How many processes torchrun has started, known before any group exists; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_rank() -> int:
    """Which of these this one is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def without_launcher() -> Iterator[int]:
    """The rank; within the context all, Lightning too, take this process for the only one."""
    with mock.patch.dict(os.environ):
        own = launched_rank()
        for name in LAUNCHED:
            os.environ.pop(name, None)
        yield own


def default_device() -> str:
    """A GPU if there is one, and the CPU otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; a GPU if none is given and there is one, and the CPU otherwise.

    Of several processes, each gets a GPU of its own, which is then its current device.

    Raises:
        ValueError: It is not there.
    """
    name = name or default_device()
    own = f"cuda:{local_rank()}" if name == "cuda" and launched_count() > 1 else name
    try:
        place = torch.empty(0, device=own).device
        if own != name:
            torch.cuda.set_device(place)
        return place
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here ({error}): give cpu, cuda or cuda:1") from error


def log_device(where: torch.device, dtype: torch.dtype) -> None:
    """Says where is computed, and in what."""
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "the CPU" if where.type == "cpu" else where
    log.info("computing on %s in %s", name, str(dtype).removeprefix("torch."))


@contextlib.contextmanager
def process_group(where: torch.device) -> Iterator[ProcessGroup]:
    """The processes that torchrun has started, for the time of the context; None if there is only this one.

    Args:
        where: Where what they send each other goes through: a GPU must be each one's own.
    """
    if launched_count() > 1:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        try:
            yield world()
        finally:
            dist.destroy_process_group()
    else:
        yield None


def size(group: ProcessGroup) -> int:
    """How many processes there are."""
    return dist.get_world_size(group) if group else 1


def rank(group: ProcessGroup) -> int:
    """Which of them this one is."""
    return dist.get_rank(group) if group else 0


def local_rank() -> int:
    """Which of its node's processes this one is, known before any group exists: from torchrun, Lightning or SLURM."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def device(group: ProcessGroup) -> torch.device:
    """Where tensors must be to be sent."""
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def shard(items: Sequence[T], group: ProcessGroup) -> list[T]:
    """This process's part of a sequence: in order, without gaps, of sizes that differ by one at most.

    The first process has something if anyone has.
    """
    n, i = size(group), rank(group)
    start, end = (math.ceil(len(items) * k / n) for k in (i, i + 1))
    return list(items[start:end])


def all_reduce_sum(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all processes; a scalar zero stands for a process that had nothing to count, of whatever shape."""
    if group is None:
        return tensor
    shape = max(gather_objects(tuple(tensor.shape), group), key=len)
    result = tensor.to(device(group)).expand(shape).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result.to(tensor.device) if tensor.ndim else result


def gather_rows(tensor: Tensor | None, group: ProcessGroup) -> Tensor | None:
    """The rows of all processes, in the order of their ranks; None from one that has none."""
    if group is None:
        return tensor
    own = None if tensor is None else (len(tensor), tuple(tensor.shape[1:]), tensor.dtype)
    parts = gather_objects(own, group)
    if not any(parts):
        return None
    _, row, dtype = next(part for part in parts if part)
    counts = [part[0] if part else 0 for part in parts]
    rows = torch.zeros(sum(counts), *row, dtype=dtype, device=device(group))
    if tensor is not None:  # adding zeros changes no bit
        rows[sum(counts[: rank(group)]) :][: len(tensor)] = tensor
    dist.all_reduce(rows, group=group)
    return rows if tensor is None else rows.to(tensor.device)


def broadcast_object(value: T, group: ProcessGroup) -> T:
    """The first process's value, for all."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, dist.get_global_rank(group, 0), group, device(group))
    return values[0]


def broadcast(tensor: Tensor, source: int, group: ProcessGroup) -> Tensor:
    """The tensor of the process of rank `source`, for all; the others give one of the same shape and dtype."""
    if group is None:
        return tensor
    buffer = tensor.detach().to(device(group)).contiguous()
    dist.broadcast(buffer, dist.get_global_rank(group, source), group)
    return buffer.to(tensor.device)


def check_agreement(value: str, what: str, group: ProcessGroup) -> None:
    """Makes sure that all processes came to the same value.

    Raises:
        ValueError: They did not; the message names those that differ from the first.
    """
    values = gather_objects(value, group)
    others = [i for i, each in enumerate(values) if each != values[0]]
    if others:
        raise ValueError(
            f"processes disagree on {what}: rank 0 has {values[0]}, rank {others[0]} has {values[others[0]]}"
            f"{f' ({len(others)} of {len(values)} differ)' if len(others) > 1 else ''}; "
            "give every process the same code, model, text and library versions"
        )


def gather_objects(value: T, group: ProcessGroup) -> list[T]:
    """What each process has, by rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * size(group)
    dist.all_gather_object(values, value, group)
    return values
