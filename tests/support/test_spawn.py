"""The helper of the multi-process tests: the first failure with its traceback, a timeout, new processes for every job."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from tests.support.spawn import run

seen: list[int] = []


def fine(rank, world_size, text):
    seen.append(rank)
    return text, seen, dist.get_world_size(), os.getpid()


def second_rank_fails(rank, world_size):
    if rank == 1:
        raise ValueError("counts [3, 4] but 8 rows")
    dist.barrier()  # fails too, later, when rank 1 has gone


def second_rank_is_killed(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def never_returns(rank, world_size):
    if rank == 1:
        time.sleep(60)


def returns_what_cannot_be_saved(rank, world_size):
    return lambda: rank


def test_raises_the_failure_that_came_first():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed first:.*ValueError: counts \[3, 4\] but 8 rows"):
        run(second_rank_fails, 2)
    with pytest.raises(RuntimeError, match=r"(?s)rank [01] of 2 failed first:.*Can't (pickle|get) local object"):
        run(returns_what_cannot_be_saved, 2)


def test_stops_ranks_that_do_not_return():
    with pytest.raises(TimeoutError, match="never_returns did not return on all 2 ranks within 1 s"):
        run(never_returns, 2, timeout=1)


def test_tells_of_a_rank_that_was_killed():
    with pytest.raises(RuntimeError, match=r"rank 1 \(exit code -9\) of 2 ended without an error message"):
        run(second_rank_is_killed, 2)


def test_nothing_of_one_job_reaches_the_next():
    """After all of the above: new processes, new globals, another number of ranks."""
    first, second = run(fine, 1, "a"), run(fine, 3, "b")
    assert [f[:3] for f in first] == [("a", [0], 1)] and [f[:3] for f in second] == [("b", [r], 3) for r in range(3)]
    assert len({f[3] for f in (*first, *second)}) == 4
