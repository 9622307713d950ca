"""The helper of the multi-process tests: the first failure with its traceback, a limit in time."""

import time

import pytest
import torch.distributed as dist
from spawn import run


def second_rank_fails(rank, world_size):
    if rank == 1:
        raise ValueError("counts [3, 4] but 8 rows")
    dist.barrier()  # fails too, later, when rank 1 has gone


def never_returns(rank, world_size):
    time.sleep(60)


def test_raises_the_failure_that_came_first():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed first:.*ValueError: counts \[3, 4\] but 8 rows"):
        run(second_rank_fails, 2)


def test_stops_ranks_that_do_not_return():
    with pytest.raises(TimeoutError, match="never_returns did not return on all 2 ranks within 1 s"):
        run(never_returns, 2, timeout=1)
