"""The reference backend: each operation is its own body. Any device, any dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .. import exchange, grouped, ops
from . import Backend, Kernel

_OPAQUE = (exchange.dispatch, exchange.combine, grouped.grouped_mlp)


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
