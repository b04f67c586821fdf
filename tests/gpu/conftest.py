"""What needs an accelerator: `pytest -m gpu`. PLPRUNE_GPU_DRY=1 has the CPU stand in, to try it out."""

import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DRY = os.environ.get("PLPRUNE_GPU_DRY") == "1"
SECONDS = 600 if DRY else 100  # one test at most: a GPU is paid for while it hangs
REPEATED = ("test_real.py", "test_strategies.py")  # on the CPU these say what the slow tests do, and take minutes

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what is deterministic on CUDA needs it


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `dry` the first case of each test: enough to see, where there is no GPU, that the test is sound."""
    seen = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if item.path.parent == Path(__file__).parent and item.path.name not in REPEATED and name not in seen:
            item.add_marker("dry")
            seen.add(name)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if not DRY:
        pytest.fail("there is no GPU here: PLPRUNE_GPU_DRY=1 has the CPU stand in for it")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(SECONDS + 15, exit=True)  # where no signal is listened to
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
