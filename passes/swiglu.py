"""Raises ``silu(gate) * up`` to one ``moefx.swiglu``."""

from moefx import ops
from moefx.rewriting.pattern import f64
from moefx.rewriting.raise_ops import Raise


class SwiGLU(Raise):
    """The factors may be in either order."""

    def __init__(self) -> None:
        super().__init__("swiglu", ops.swiglu, {"gate": f64(4, 8), "up": f64(4, 8)})
