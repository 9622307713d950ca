"""Shared by all tests: one thread a process (the ranks' tests start several), quiet models, ``spawn`` importable."""

import logging
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parent / "ranks"))  # under pytest's importlib mode no test folder is on the path
logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


#: Files that take long, longest first: started last, one would run alone while the other process has nothing to do.
_LONG = ("ranks/test_parallelize", "ranks/test_families", "test_examples", "test_routing", "test_families", "ranks/", "test_install")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(_LONG) if f"tests/{name}" in item.nodeid), len(_LONG))

    items.sort(key=order)
