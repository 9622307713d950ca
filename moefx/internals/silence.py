"""Keeping quiet in one thread: warnings and loggers, without what ``warnings.catch_warnings`` does to all threads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_silent: ContextVar[bool] = ContextVar("moefx_silent", default=False)


class _WhileSilent(logging.Filter):
    """A filter of warnings, which asks whether a text matches, and of loggers, which ask whether a record passes."""

    def match(self, _: str) -> bool:
        return _silent.get()

    def filter(self, _: logging.LogRecord) -> bool:
        return not _silent.get()


_FILTER = _WhileSilent()
_IGNORE: Any = ("ignore", _FILTER, Warning, None, 0)


@contextmanager
def silent(*loggers: str) -> Iterator[None]:
    """Context in which warnings of this thread and its records to ``loggers`` are not shown.

    ``warnings.catch_warnings`` would not do: it swaps the filters of all threads, and two that overlap may leave them off.
    """
    filters: Any = warnings.filters
    if not filters or filters[0] is not _IGNORE:  # pytest.warns or -W error came in front of it
        filters[:] = [_IGNORE, *(f for f in filters if f is not _IGNORE)]
    for name in loggers:
        logging.getLogger(name).addFilter(_FILTER)  # addFilter adds a filter only once
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)
