"""Tests run side by side, one process a core: each of them, and what it starts, computes on one thread."""

import os
from collections import Counter
from typing import Any

import pytest
import torch

FIRST = ("test_notebooks", "test_golden", "test_real_export", "test_readme")  # minutes each: none is left for the end

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "have tests/test_contract.py judge a method of your own, and nothing else: `my_module.MyMethod`"
    parser.addoption("--method", metavar="MODULE.CLASS", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--method"):
        from tests.builders import judge_only  # slow to import, and needed before the tests are collected

        try:
            judge_only(path)
        except ValueError as error:
            raise pytest.UsageError(f"--method: {error}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--method"):  # what is not about a method says nothing of this one
        items[:] = [item for item in items if "name" in getattr(getattr(item, "callspec", None), "params", ())]
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in FIRST, -counts[item.path]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.shares import Shares  # a machine that runs one process needs no xdist

    return Shares(config, log)
