"""Functions of other packages that do something else while moefx asks for it, in the thread that asks.

Whoever replaces a function and puts it back afterwards changes it for all threads meanwhile, and of two that do so at once the
second puts the first one's back, for good. So a function is replaced once and stays so; the caller's context decides what it
does.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_INSTALLING = threading.Lock()


class Patch:
    """``owner.name``; within ``by(function)`` a call of it calls ``function(what it was, *args, **kwargs)``."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name = owner, name
        self._instead: ContextVar[Callable | None] = ContextVar(f"moefx_{name}", default=None)
        self._ours: Any = None

    @contextmanager
    def by(self, function: Callable) -> Iterator[None]:
        if getattr(self.owner, self.name) is not self._ours:  # the first time, or somebody else has replaced it since
            self._install()
        token = self._instead.set(function)
        try:
            yield
        finally:
            self._instead.reset(token)

    def _install(self) -> None:
        with _INSTALLING:
            before = getattr(self.owner, self.name)
            if before is self._ours:
                return
            instead = self._instead

            @functools.wraps(before)
            def dispatch(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_dynamo_compiling():  # it cannot trace a ContextVar, and nobody asks there
                    return before(*args, **kwargs)
                function = instead.get()
                return before(*args, **kwargs) if function is None else function(before, *args, **kwargs)

            self._ours = dispatch
            setattr(self.owner, self.name, dispatch)


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
    """Within: warnings of this thread, and what it tells ``loggers``, are not shown.

    (``warnings.catch_warnings`` is of all threads: who enters it meanwhile would leave warnings off for good.)
    """
    filters: Any = warnings.filters
    if not filters or filters[0] is not _IGNORE:  # whoever wants warnings to be errors has put that before it
        filters[:] = [_IGNORE, *(f for f in filters if f is not _IGNORE)]
    for name in loggers:
        logging.getLogger(name).addFilter(_FILTER)  # which is there once, however often it is added
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)
