import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "/gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_logreport(report):
    """Shows a failure when it happens: a lent GPU may be gone before the summary."""
    if report.failed and torch.cuda.is_available():
        print(f"\nFAILED {report.nodeid} ({report.duration:.0f} s)\n{report.longreprtext[-7000:]}\n", flush=True)
