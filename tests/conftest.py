"""Set-up of all tests: one thread per process (tests of ranks start several), quiet models, the order of files."""

import gc
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
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


#: Seconds that each file of tests took on two idle cores: `make durations` writes it, a run of some files updates those.
DURATIONS = Path(__file__).with_name("durations.json")
_took: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="also those of kernels that are left to a GPU")
    parser.addoption("--record-durations", action="store_true", help="write the seconds of each file to tests/durations.json")


#: Triton's interpreter takes seconds where a GPU takes none: of a kernel's test with more cases than this, one of three runs on it.
MOST_INTERPRETED = 6


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that take long come first: started last, one would run alone while the other process has nothing to do. Files that
    were never timed come before them."""
    import torch

    if not torch.cuda.is_available() and not config.getoption("every_case"):
        left_out = _left_to_a_gpu(items)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    known = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -known.get(_file(item.nodeid), float("inf")))


def _left_to_a_gpu(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of the tests of kernels with many cases, those that `make gpu-check` alone runs."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.nodeid.startswith("tests/kernels/"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {item for cases in tests.values() if len(cases) > MOST_INTERPRETED for n, item in enumerate(cases) if n % 3}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _took[_file(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("record_durations") and not hasattr(session.config, "workerinput"):
        known = {f: s for f, s in json.loads(DURATIONS.read_text()).items() if (DURATIONS.parent / f).exists()}
        known |= {f: round(s, 1) for f, s in _took.items()}
        DURATIONS.write_text(json.dumps(dict(sorted(known.items(), key=lambda e: (-e[1], e[0]))), indent=1) + "\n")


def _file(nodeid: str) -> str:
    """The path of a test's file in this folder, by the test's name."""
    return nodeid.partition("::")[0].removeprefix("tests/")
