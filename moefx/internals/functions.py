"""What the code of Python functions names outside of themselves: other functions, classes, constants, modules."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function's code, and in that of the functions inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from names_in(inner)


def home(f: Any) -> str:
    """Name of the module that a function, a method or a class was written in (``functools.wraps`` copies ``__module__``)."""
    f = getattr(f, "__func__", f)
    found = f.__globals__.get("__name__") if isinstance(f, types.FunctionType) else getattr(f, "__module__", None)
    return found if isinstance(found, str) else ""


@functools.cache
def is_installed(package: str) -> bool:
    """Was the package of this name installed, other than for its development?"""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def is_of(module: str, packages: tuple[str, ...]) -> bool:
    """Is the module of this name one of ``packages``, or in one, or of Python itself?"""
    package = module.partition(".")[0]
    return package in packages or module in packages or package in sys.stdlib_module_names
