"""Grouped GEMMs by name: rows that lie expert by expert, each group times its own matrix, the bounds read on the device.

``bounds`` [E + 1] int32: expert e has the rows from bounds[e] to bounds[e + 1].
"""

from __future__ import annotations

from torch import Tensor

from ..grouped import _grouped_gemm, _grouped_outer

#: QuACK's tiles: rows, columns, ping-pong. Measured on an H100 with Qwen3-30B-A3B's shapes and 256 and 1,024 rows an expert: of
#: six variants these two are the fastest or within 3 % of it, where the rules below choose them.
_WIDE, _PINGPONG = (128, 256, False), (128, 192, True)
MANY_ROWS = 512  #: an expert, on average: from here on ping-pong is faster for weights' gradients of all sizes
#: Products over fewer columns than this do not fill the wide tile's pipeline.
SHORT = 1024


def rows(gemm: str, x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    """x [R, a] times weight [E, a, b] -> [R, b]; ``gemm`` is "torch" or "quack"."""
    if gemm == "torch" or not x.shape[0]:
        return _grouped_gemm(x, weight, bounds[1:])
    out = x.new_empty(x.shape[0], weight.shape[2])
    tile = _PINGPONG if x.shape[1] < SHORT else _WIDE
    _quack(x, weight.transpose(1, 2), out, tile, cu_seqlens_m=bounds)
    return out


def outer(gemm: str, x: Tensor, y: Tensor, bounds: Tensor) -> Tensor:
    """x [R, a], y [R, b] -> [E, a, b], x.T @ y of each group, zeros for an empty one; ``gemm`` as above."""
    if gemm == "torch" or not x.shape[0]:
        return _grouped_outer(x, y, bounds[1:])
    experts = len(bounds) - 1
    out = x.new_empty(experts, x.shape[1], y.shape[1])
    many = x.shape[0] >= MANY_ROWS * experts or min(out.shape[1:]) < SHORT
    _quack(x.transpose(0, 1), y.transpose(0, 1), out, _PINGPONG if many else _WIDE, cu_seqlens_k=bounds)
    return out


def _quack(a: Tensor, b: Tensor, out: Tensor, tile: tuple[int, int, bool], **bounds: Tensor) -> None:
    from quack.gemm import gemm

    gemm(a, b, out, None, None, tile[0], tile[1], 2, 1, pingpong=tile[2], **bounds)
