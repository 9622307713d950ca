"""Raises ``silu(gate) * up`` to one ``moefx.swiglu``."""

from functools import cache

from moefx import ops
from moefx.rewriting.pattern import f64
from moefx.rewriting.raise_ops import Raise


@cache
def RaiseSwiGLU() -> Raise:
    return Raise("swiglu", ops.swiglu, {"gate": f64(4, 8), "up": f64(4, 8)})
