"""What the code of Python functions names outside of themselves: other functions, classes, constants, modules."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
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


#: Objects, one inside another, that :func:`calls_method` looks into.
_DEEPEST = 8


def calls_method(x: Any, of: Any, function: Any, depth: int = 0) -> bool:
    """Does the callable ``x`` hold ``function`` as a bound method of ``of``: in its closure, a default, an attribute?"""
    if depth > _DEEPEST or isinstance(x, type | types.ModuleType | str | bytes):
        return False
    if isinstance(x, types.MethodType):
        if x.__self__ is of:
            return x.__func__ is function or calls_method(x.__func__, of, function, depth + 1)
        parts: Iterable[Any] = (x.__func__, x.__self__)
    elif isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if c != types.CellType()]
        parts = (*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), *vars(x).values())
    elif isinstance(x, functools.partial):
        parts = (x.func, *x.args, *x.keywords.values())
    elif isinstance(x, Mapping):
        parts = x.values()
    elif isinstance(x, list | tuple | set | frozenset):
        parts = x
    elif callable(x) and hasattr(x, "__dict__") and x is not of:
        parts = vars(x).values()
    else:
        return False
    return any(calls_method(part, of, function, depth + 1) for part in parts)


def is_of(module: str, packages: tuple[str, ...]) -> bool:
    """Is the module of this name one of ``packages``, or in one, or of Python itself?"""
    package = module.partition(".")[0]
    return package in packages or module in packages or package in sys.stdlib_module_names
