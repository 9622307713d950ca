"""Shared by all tests: one thread a process (the ranks' tests start several), quiet models."""

import logging

import pytest
import torch

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
