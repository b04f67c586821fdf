"""Real processes in one group, each running the same function."""

import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist

from tests.runs import context


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_ranks(function: Callable[..., Any], *args: Any, processes: int = 2, seconds: float = 120) -> list[Any]:
    """What `function(*args)` returns in each rank of a new group of processes."""
    port = free_port()
    results = context.Queue()
    children = [
        context.Process(target=_rank, args=(i, processes, port, results, function, args), daemon=True)
        for i in range(processes)
    ]
    for child in children:
        child.start()
    try:
        by_rank = dict(results.get(timeout=seconds) for _ in children)
    finally:
        for child in children:
            child.join(10)
            child.kill()
    faults = [text for kind, text in by_rank.values() if kind == "fault"]
    assert not faults, faults[0]
    return [pickle.loads(by_rank[i][1]) for i in range(processes)]


def _rank(
    rank: int, processes: int, port: int, results: "Queue[Any]", function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    try:
        results.put((rank, ("value", pickle.dumps(function(*args)))))  # tensors as they are would outlive their owner
    except BaseException:
        results.put((rank, ("fault", traceback.format_exc())))
    results.close()
    results.join_thread()
    dist.destroy_process_group()
