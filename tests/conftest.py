"""Tests run side by side, one process a core: each of them, and what it starts, computes on one thread."""

import os

import pytest
import torch

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


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups when it is told of the items
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # a file stays in one process, with its fixtures; a file about families is shared out by them
        family = getattr(getattr(item, "callspec", None), "params", {}).get("family", "")
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {str(family).partition('/')[0]}"))
    if config.getoption("--method"):  # what is not about a method says nothing of this one
        items[:] = [item for item in items if "name" in getattr(getattr(item, "callspec", None), "params", ())]
