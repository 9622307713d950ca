"""Grouped GEMMs by name: rows that lie expert by expert, each group times its own matrix, the bounds read on the device.

``bounds`` [E + 1] int32: expert e has the rows from bounds[e] to bounds[e + 1].
"""

from __future__ import annotations

from torch import Tensor

from ..grouped import _grouped_gemm, _grouped_outer

#: QuACK's tiles: rows, columns, ping-pong. Measured on an H200 with Qwen3-30B-A3B's shapes and 256 and 1,024 rows an expert: of
#: four to six variants these two are the fastest where the rules below choose them, or within 3 % of it.
_WIDE, _PINGPONG = (128, 256, False), (128, 192, True)
#: Products over fewer columns than this do not fill the wide tile's pipeline.
SHORT = 1024


def rows(gemm: str, x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    """x [R, a] times weight [E, a, b] -> [R, b]; ``gemm`` is "torch" or "quack"."""
    if gemm == "torch" or not x.shape[0]:
        return _grouped_gemm(x, weight, bounds[1:])
    return _by_quack(x, weight, bounds, x.shape[0])


def of_tokens(gemm: str, x: Tensor, order: Tensor, inverse: Tensor, top_k: int, weight: Tensor, bounds: Tensor) -> Tensor:
    """x [T, a], each token in the K rows that ``order`` and ``inverse`` (:func:`permute.sort_by_expert`) give it, times weight
    [E, a, b] -> [T * K, b]. QuACK gathers the tokens as it reads them, which writes no rows."""
    from .permute import expand

    if gemm == "torch" or not x.shape[0]:
        return rows(gemm, expand(x, inverse, top_k), weight, bounds)
    return _by_quack(x.contiguous(), weight, bounds, len(order), A_idx=order // top_k)


def outer(gemm: str, x: Tensor, y: Tensor, bounds: Tensor) -> Tensor:
    """x [R, a], y [R, b] -> [E, a, b], x.T @ y of each group, zeros for an empty one; ``gemm`` as above."""
    if gemm == "torch" or not x.shape[0]:
        return _grouped_outer(x, y, bounds[1:])
    out = x.new_empty(len(bounds) - 1, x.shape[1], y.shape[1])
    _quack(x.transpose(0, 1), y.transpose(0, 1), out, _PINGPONG, cu_seqlens_k=bounds)
    return out


def _by_quack(x: Tensor, weight: Tensor, bounds: Tensor, many: int, **gathered: Tensor) -> Tensor:
    out = x.new_empty(many, weight.shape[2])
    tile = _PINGPONG if x.shape[1] < SHORT else _WIDE
    _quack(x, weight.transpose(1, 2), out, tile, cu_seqlens_m=bounds, **gathered)
    return out


def _quack(a: Tensor, b: Tensor, out: Tensor, tile: tuple[int, int, bool], **bounds: Tensor) -> None:
    from quack.gemm import gemm

    gemm(a, b, out, None, None, tile[0], tile[1], 2, 1, pingpong=tile[2], **bounds)
