"""Grouped GEMMs by name: rows that lie expert by expert, each group times its own matrix, the bounds read on the device.

``bounds`` [E + 1] int32: expert e has the rows from bounds[e] to bounds[e + 1]. Names are "torch"; "quack"; and "fp8", QuACK's
products of rows in 8 bits (:mod:`fp8_grouped`) while those that give the weights' gradients stay QuACK's in 16.
"""

from __future__ import annotations

from torch import Tensor

from moefx.kernels import fp8_grouped
from moefx.kernels.gemm import Tile, by_quack
from moefx.ops.grouped_mm import grouped_gemm, grouped_outer

GEMMS = ("torch", "quack", "fp8")
#: All tiles here are the choice of 54 (218 with the layouts of the operands) by the 36 products of three models' experts on an
#: H200: Qwen3-30B-A3B, Nemotron 3 Nano and GPT-OSS-20B with 4,096 and 16,384 tokens, 192 to 2,048 rows an expert. The fastest
#: tile of each product would save 2 % of a model's six.
_OUTER: Tile = (128, 192, True, 2, 1)
#: Gathered rows, of experts with few and with many: these read no block together along columns.
_FEW: Tile = (128, 256, False, 1, 1)
_MANY: Tile = (128, 192, True, 2, 1)
MANY = 640
#: Columns of a tile, and what a column costs in tiles of that width.
_WIDTHS = {192: 1.0, 160: 1.02, 128: 1.05}


def _tile(columns: int) -> Tile:
    """The tile for rows as they lie: the width that leaves the fewest columns empty.

    Pairs run along the columns: along the rows, an expert with an odd number of tiles would leave half a pair idle, which
    takes a quarter longer with 192 rows an expert.
    """

    def cost(width: int) -> float:
        return -(-columns // (2 * width)) * width * _WIDTHS[width]

    return 128, min(_WIDTHS, key=cost), True, 1, 2


def rows(gemm: str, x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    """x [R, a] times weight [E, a, b] -> [R, b]."""
    if gemm == "torch" or not x.shape[0]:
        return grouped_gemm(x, weight, bounds[1:])
    if gemm == "fp8":
        return fp8_grouped.rows(x, weight, bounds)
    return _rows_by_quack(x, weight, bounds, x.shape[0])


def of_tokens(gemm: str, x: Tensor, order: Tensor, inverse: Tensor, top_k: int, weight: Tensor, bounds: Tensor) -> Tensor:
    """x [T, a], each token in its K rows, times weight [E, a, b] -> [T * K, b].

    ``order`` and ``inverse`` are those of ``sort_by_expert``. QuACK gathers the tokens as it reads them, and writes no rows.
    """
    from moefx.kernels.permute import expand

    if gemm == "torch" or not x.shape[0]:
        return rows(gemm, expand(x, inverse, top_k), weight, bounds)
    if gemm == "fp8":
        return fp8_grouped.of_tokens(x, inverse, top_k, weight, bounds)
    return _rows_by_quack(x.contiguous(), weight, bounds, len(order), order // top_k)


def outer(gemm: str, x: Tensor, y: Tensor, bounds: Tensor, scale: float = 1.0) -> Tensor:
    """x [R, a], y [R, b] -> [E, a, b], ``scale`` times x.T @ y of each group, zeros for an empty one."""
    if gemm == "torch" or not x.is_cuda or not x.shape[0]:
        found = grouped_outer(x, y, bounds[1:])
        return found if scale == 1.0 else found.mul_(scale)
    out = x.new_empty(len(bounds) - 1, x.shape[1], y.shape[1])
    by_quack(x.transpose(0, 1), y.transpose(0, 1), out, _OUTER, scale=scale, cu_seqlens_k=bounds)
    return out


def _rows_by_quack(x: Tensor, weight: Tensor, bounds: Tensor, many: int, tokens: Tensor | None = None) -> Tensor:
    """``tokens`` [R]: the row of x that each row is."""
    out = x.new_empty(many, weight.shape[2])
    if tokens is None:
        tile = _tile(weight.shape[2])
    else:
        tile = _MANY if many >= MANY * weight.shape[0] else _FEW
    by_quack(x, weight.transpose(1, 2), out, tile, cu_seqlens_m=bounds, A_idx=tokens)
    return out
