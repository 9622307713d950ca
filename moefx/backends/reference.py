"""The reference backend: each operation is its own body. Any device, any dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moefx import ops
from moefx.backends import Backend, Kernel
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped

_OPAQUE = (dispatch_combine.dispatch, dispatch_combine.combine, grouped.grouped_mlp)


class _Table(Mapping):
    """Every operation, those that ``moefx.op`` defines later included."""

    def __getitem__(self, op: Any) -> Kernel:
        if op in ops.BODIES or op in _OPAQUE:
            return Kernel(op, why="the operation's own body")
        raise KeyError(op)

    def __iter__(self) -> Iterator[Any]:
        yield from ops.BODIES
        yield from _OPAQUE

    def __len__(self) -> int:
        return len(ops.BODIES) + len(_OPAQUE)


BACKEND = Backend("reference", _Table())
