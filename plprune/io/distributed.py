"""Processes that share work and end with the same result as a single process would.

All functions use `torch.distributed`. A `group` of None stands for a single process: the functions then return their
input.
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
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")  # set by torchrun
ProcessGroup = dist.ProcessGroup | None


def world() -> ProcessGroup:
    """All processes of the run; None if there is only one."""
    ready = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if ready else None


def launched_count() -> int:
    """The number of processes that torchrun started; 1 without torchrun. Needs no process group."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_rank() -> int:
    """The rank that torchrun gave this process; 0 without torchrun. Needs no process group."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The rank on this node, as set by torchrun, Lightning or SLURM; 0 without them. Needs no process group."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


@contextlib.contextmanager
def without_launcher() -> Iterator[int]:
    """Hides the launcher's variables, so that Lightning too takes this process for the only one; yields its rank."""
    with mock.patch.dict(os.environ):
        launched = launched_rank()
        for name in LAUNCHED:
            os.environ.pop(name, None)
        yield launched


def default_device() -> str:
    """`cuda` if a GPU is available, and `cpu` otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; a GPU by default, or the CPU if there is none.

    Under torchrun `cuda` is the GPU of the local rank, which becomes the current device.

    Raises:
        ValueError: This machine has no such device.
    """
    name = name or default_device()
    ranked = f"cuda:{local_rank()}" if name == "cuda" and launched_count() > 1 else name
    try:
        device = torch.empty(0, device=ranked).device
        if ranked != name:
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here ({error}): give cpu, cuda or cuda:1") from error


def log_device(device: torch.device, dtype: torch.dtype) -> None:
    """Logs the device and the dtype of a computation."""
    name = "the CPU" if device.type == "cpu" else device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    log.info("computing on %s in %s", name, str(dtype).removeprefix("torch."))


@contextlib.contextmanager
def process_group(where: torch.device) -> Iterator[ProcessGroup]:
    """The processes that torchrun started, as a group during the context; None if there is only one.

    Args:
        where: The device of this process: NCCL connects GPUs, Gloo the others.
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
    """The number of processes."""
    return dist.get_world_size(group) if group else 1


def rank(group: ProcessGroup) -> int:
    """The rank of this process."""
    return dist.get_rank(group) if group else 0


def shard(items: Sequence[T], group: ProcessGroup) -> list[T]:
    """This process's consecutive part of a sequence. Sizes differ by one at most; the first part is empty last."""
    start, end = (math.ceil(len(items) * k / size(group)) for k in (rank(group), rank(group) + 1))
    return list(items[start:end])


def all_reduce_sum(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all processes. A process without data gives a scalar zero, whatever the others' shape."""
    if group is None:
        return tensor
    shape = max(gather_objects(tuple(tensor.shape), group), key=len)
    result = tensor.to(_device(group)).expand(shape).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result.to(tensor.device) if tensor.ndim else result


def gather_rows(tensor: Tensor | None, group: ProcessGroup) -> Tensor | None:
    """The rows of all processes, by rank; a process without rows gives None."""
    if group is None:
        return tensor
    described = None if tensor is None else (len(tensor), tuple(tensor.shape[1:]), tensor.dtype)
    parts = gather_objects(described, group)
    if not any(parts):
        return None
    _, row, dtype = next(part for part in parts if part)
    counts = [part[0] if part else 0 for part in parts]
    rows = torch.zeros(sum(counts), *row, dtype=dtype, device=_device(group))
    if tensor is not None:  # adding zeros changes no bit
        rows[sum(counts[: rank(group)]) :][: len(tensor)] = tensor
    dist.all_reduce(rows, group=group)
    return rows if tensor is None else rows.to(tensor.device)


def broadcast_object(value: T, group: ProcessGroup) -> T:
    """The first process's value, in every process."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, dist.get_global_rank(group, 0), group, _device(group))
    return values[0]


def broadcast(tensor: Tensor, source: int, group: ProcessGroup) -> Tensor:
    """The tensor of rank `source`, in every process; the others pass one of the same shape and dtype."""
    if group is None:
        return tensor
    buffer = tensor.detach().to(_device(group)).contiguous()
    dist.broadcast(buffer, dist.get_global_rank(group, source), group)
    return buffer.to(tensor.device)


def gather_objects(value: T, group: ProcessGroup) -> list[T]:
    """The values of all processes, by rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * size(group)
    dist.all_gather_object(values, value, group)
    return values


def check_agreement(value: str, what: str, group: ProcessGroup) -> None:
    """Raises ValueError, with the first rank that differs, unless all processes have the same value."""
    values = gather_objects(value, group)
    others = [i for i, each in enumerate(values) if each != values[0]]
    if others:
        raise ValueError(
            f"processes disagree on {what}: rank 0 has {values[0]}, rank {others[0]} has {values[others[0]]}"
            f"{f' ({len(others)} of {len(values)} differ)' if len(others) > 1 else ''}; "
            "give every process the same code, model, text and library versions"
        )


def _device(group: ProcessGroup) -> torch.device:
    """The kind of device that the group's backend sends from."""
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
