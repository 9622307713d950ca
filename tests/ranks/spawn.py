"""Runs a function on several gloo ranks of this machine: ``run(fn, world_size, *args)``; for tests, loopback only.

A spawn costs seconds (each rank imports torch and moefx), so a file runs all its cases in one spawn per world size::

    from spawn import run          # tests/ranks/conftest.py puts this folder on the path

    def cases(rank, world_size, seed):
        ...                        # the default process group is there; returns anything torch.save takes

    results = run(cases, 2, 0)     # [what rank 0 returned, what rank 1 returned]
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """What ``fn(rank, world_size, *args)`` returned on each rank. ``fn`` is a module-level function of any file.

    Raises:
        RuntimeError: with the traceback of the rank that failed first (the others usually fail after it, and say less).
        TimeoutError: some rank did not return within ``timeout`` seconds; all were stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = (fn.__code__.co_filename, fn.__qualname__, world_size, folder, args)
        context = mp.start_processes(_rank, args=job, nprocs=world_size, join=False, start_method="spawn")
        assert context is not None
        deadline, done, died = time.monotonic() + timeout, False, None
        try:
            while not done and time.monotonic() < deadline:
                done = context.join(timeout=max(0.0, deadline - time.monotonic()))
        except Exception as error:  # a rank ended badly: what it wrote itself says more
            died = error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        failures = sorted(Path(folder).glob("error-*"), key=lambda p: float(p.read_text().split("\n", 1)[0]))
        if failures:
            rank, text = failures[0].name.removeprefix("error-"), failures[0].read_text().split("\n", 1)[1]
            raise RuntimeError(f"rank {rank} of {world_size} failed first:\n{text}") from None
        if died is not None:
            raise RuntimeError(f"a rank of {world_size} ended without a word: {died}") from died
        if not done:
            raise TimeoutError(f"{fn.__qualname__} did not return on all {world_size} ranks within {timeout:.0f} s")
        return [torch.load(Path(folder, f"result-{r}"), weights_only=False) for r in range(world_size)]


def _rank(rank: int, file: str, name: str, world_size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        # by file, not by module name: pytest's importlib mode gives test modules names that nobody can import
        spec = importlib.util.spec_from_file_location("ranks_of_" + Path(file).stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        torch.save(getattr(module, name)(rank, world_size, *args), Path(folder, f"result-{rank}"))
        dist.barrier()  # nobody closes a connection that a slower rank still reads
        dist.destroy_process_group()
    except Exception:
        now = time.time()
        Path(folder, f"part-{rank}").write_text(f"{now}\n{traceback.format_exc()}")
        Path(folder, f"part-{rank}").rename(Path(folder, f"error-{rank}"))
        raise
