"""Raises ``silu(gate) * up`` to one ``moefx.swiglu``."""

from functools import cache

from moefx import ops
from moefx.match import f64
from moefx.raising import Raise


@cache
def RaiseSwiGLU() -> Raise:
    return Raise("swiglu", ops.swiglu, {"gate": f64(4, 8), "up": f64(4, 8)})
