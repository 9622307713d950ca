"""What the code of Python functions names outside of themselves: other functions, classes, constants, modules."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function's code, and in that of the functions inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from names_in(inner)


def is_of(module: str | None, packages: tuple[str, ...]) -> bool:
    """Does the module of this name belong to one of ``packages``, or to Python itself?"""
    package = (module or "").partition(".")[0]
    return package in packages or package in sys.stdlib_module_names
