"""A stand-in for a number in a call that raises when it is read: a graph captured with it holds for all numbers.

Transformers passes every keyword argument to every block, also those that differ in each step, such as the longest sequence of
a padding-free batch.
"""

from __future__ import annotations

from typing import Any

from moefx.errors import CaptureError


class Unread:
    """Stands for any int or float. Computing with it, comparing it or accessing its attributes raises CaptureError."""

    def __init__(self, name: str, kind: type):
        object.__setattr__(self, "_number", (name, kind))


def name_and_kind(stand_in: Unread) -> tuple[str, type]:
    """The argument's name, and ``int`` or ``float``."""
    return object.__getattribute__(stand_in, "_number")


def _refuse(self: Unread, *_: Any, **__: Any) -> Any:
    raise CaptureError(f"it reads its argument {name_and_kind(self)[0]}, a number that differs from call to call")


_KEPT = {*vars(object), "__dict__", "__module__", "__weakref__", "__init__"} - {"__eq__", "__hash__"}
_ASKED = {*dir(int), *dir(float), "__getattr__", "__iter__", "__len__", "__contains__", "__getitem__"}
for _name in _ASKED - _KEPT:
    setattr(Unread, _name, _refuse)
