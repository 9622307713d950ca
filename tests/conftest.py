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
