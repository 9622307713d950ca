"""How a function of another package is replaced: once, for good, and in effect only in the context that asks for it.

A function that is replaced and put back is replaced for all threads meanwhile; of two threads that overlap, the second restores
the replacement of the first for good. Which functions are replaced stands in ``torch_patches`` and ``transformers_patches``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_INSTALLING = threading.Lock()


class Patch:
    """``owner.name``: within ``by(function)``, a call of it calls ``function(original, *args, **kwargs)`` instead.

    Args:
        owner: a class or module of another package.
        name: of the function in it.
        seen: the versions of the package in which the patch was seen to work.
        symptom: what a user sees when it does not.
    """

    def __init__(self, owner: Any, name: str, *, seen: str, symptom: str):
        self.owner, self.name, self.seen, self.symptom = owner, name, seen, symptom
        self._instead: ContextVar[Callable | None] = ContextVar(f"moefx_{name}", default=None)
        self._ours: Any = None

    @contextmanager
    def by(self, function: Callable) -> Iterator[None]:
        """Context, of this thread, in which ``function`` is called with the original function and its arguments."""
        if getattr(self.owner, self.name) is not self._ours:  # the first time, or another package has replaced it since
            self._install()
        token = self._instead.set(function)
        try:
            yield
        finally:
            self._instead.reset(token)

    def _install(self) -> None:
        with _INSTALLING:
            original = getattr(self.owner, self.name)
            if original is self._ours:
                return
            instead = self._instead

            @functools.wraps(original)
            def dispatch(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_dynamo_compiling():  # it cannot trace a ContextVar, and no patch is in effect there
                    return original(*args, **kwargs)
                function = instead.get()
                return original(*args, **kwargs) if function is None else function(original, *args, **kwargs)

            self._ours = dispatch
            setattr(self.owner, self.name, dispatch)
