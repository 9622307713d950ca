"""Shared by all tests: one thread a process (the ranks' tests start several), quiet models."""

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Imports what takes long, where tests run: the process that only hands them out to others can do without."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ["MOEFX_TESTS_RANKS"] = str(
            Path(tempfile.mkdtemp(prefix="moefx-ranks-"), "socket")
        )  # one server for all: spawn.py
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in what tests start: they share the cores
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton's interpreter, slow but exact: read when Triton is imported

    from moefx.backends.compile import revision

    # tests compile operations by themselves, without moefx's cache key: code of another version's shapes must not be found
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"moefx-tests-{os.getuid()}-{revision()[:12]}"))
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: a collection that goes through all of it takes half a second, every few seconds."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()
    if "MOEFX_TESTS_RANKS" in os.environ and not hasattr(config, "workerinput"):
        shutil.rmtree(Path(os.environ["MOEFX_TESTS_RANKS"]).parent, ignore_errors=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def cached_captures() -> Iterator[None]:
    """Models of these tests that were captured before are not captured again."""
    from tests.support import capture_cache

    capture_cache.start()
    yield
    capture_cache.stop()


#: Files that take long, longest first: started last, one would run alone while the other process has nothing to do.
_LONG = (
    "distributed/test_parallelize",
    "distributed/test_families",
    "flows/test_examples",
    "runtime/test_router_state",
    "flows/test_families",
    "distributed/",
    "runtime/test_install",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(_LONG) if f"tests/{name}" in item.nodeid), len(_LONG))

    items.sort(key=order)
