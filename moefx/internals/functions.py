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


def calls_method(x: Any, of: Any, function: Any) -> bool:
    """Does the callable ``x`` hold ``function`` as a bound method of ``of``: in its closure, a default, an attribute?"""
    seen: set[int] = set()
    found, left = False, [x]
    while left and not found:
        part = left.pop()
        if id(part) not in seen:
            seen.add(id(part))
            found = isinstance(part, types.MethodType) and part.__self__ is of and part.__func__ is function
            left += _held_by(part, of)
    return found


def _held_by(x: Any, other_than: Any) -> Iterable[Any]:
    """What a callable or a container holds."""
    if isinstance(x, types.MethodType):
        return (x.__func__, x.__self__)
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or () if c != types.CellType()]
        return (*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), *vars(x).values())
    if isinstance(x, functools.partial):
        return (x.func, *x.args, *x.keywords.values())
    if isinstance(x, Mapping):
        return x.values()
    if isinstance(x, list | tuple | set | frozenset):
        return x
    if isinstance(x, type) or x is other_than or not callable(x):
        return ()
    return vars(x).values() if hasattr(x, "__dict__") else ()


def is_of(module: str, packages: tuple[str, ...]) -> bool:
    """Is the module of this name one of ``packages``, or in one, or of Python itself?"""
    package = module.partition(".")[0]
    return package in packages or module in packages or package in sys.stdlib_module_names
