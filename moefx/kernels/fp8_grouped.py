"""Grouped products in FP8: rows that lie expert by expert times their expert's matrix.

Both are rounded to e4m3, each with one float32 scale for all numbers that are summed: a row has one, and so has a column of
each expert's matrix. ``scale = max|x| / 448``, so nothing overflows, and a row that means nothing (a dispatch with a capacity
has such) spoils no other. Rounding moves a number by 2**-4 of itself at most, or, below 2**-6, by 2**-10 in units of its
scale. Sums are fp32: QuACK adds what the tensor cores' short sums give to registers, which they alone would round to 14 bits.

On a CPU the same numbers are multiplied in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from moefx.ops.grouped_mm import grouped_gemm

LARGEST = 448.0  #: of float8_e4m3fn
TINY = 1e-30  #: keeps the scale of zeros, and its inverse, finite

#: Columns of QuACK's tile and what a column costs in it, on an H200 of the products of Qwen3-30B-A3B's, Nemotron 3 Nano's and
#: GPT-OSS-20B's experts. Two accumulators fill the registers: ping-pong tiles, or 256 columns, are 3 to 15 times slower.
_WIDTHS = {192: 1.0, 160: 1.0, 208: 1.01, 128: 1.02}


def rows(x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    """x [R, a] times weight [E, a, b] -> [R, b] in x's dtype."""
    if not x.is_cuda:
        return _product(*_rounded(x), weight, bounds, x.dtype)
    from moefx.kernels.fp8_quantize import rows as quantize

    return _product(*quantize(x), weight, bounds, x.dtype)


def of_tokens(x: Tensor, inverse: Tensor, top_k: int, weight: Tensor, bounds: Tensor) -> Tensor:
    """x [T, a], each token in its K rows (``inverse`` [T * K] says which), times weight [E, a, b] -> [T * K, b].

    Tokens are rounded once, and written to their rows in 8 bits.
    """
    if x.is_cuda:
        from moefx.kernels.fp8_quantize import rows as quantize

        return _product(*quantize(x, inverse, top_k), weight, bounds, x.dtype)
    token = torch.empty_like(inverse).scatter_(0, inverse.long(), torch.arange(len(inverse), dtype=inverse.dtype) // top_k)
    return rows(x[token], weight, bounds)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] -> e4m3 [..., n], scales [...] float32."""
    largest = x.float().abs().amax(-1).clamp_min(TINY) if x.numel() else x.new_zeros(x.shape[:-1], dtype=torch.float32)
    times = torch.full_like(largest, LARGEST) / largest  # a number over a tensor is two roundings, as its inverse times that
    return (x.float() * times.unsqueeze(-1)).to(torch.float8_e4m3fn), largest / LARGEST


def _product(q: Tensor, scales: Tensor, weight: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    if not q.is_cuda:
        w, of_columns = _rounded(weight.transpose(1, 2))
        exact = w.float() * of_columns.unsqueeze(-1)
        return grouped_gemm(q.float() * scales.unsqueeze(-1), exact.transpose(1, 2), bounds[1:]).to(dtype)
    from moefx.kernels.fp8_quantize import matrices

    out = torch.empty(q.shape[0], weight.shape[2], dtype=dtype, device=q.device)
    if out.numel():
        w, of_columns = matrices(weight)
        width = min(_WIDTHS, key=lambda n: -(-out.shape[1] // (2 * n)) * n * _WIDTHS[n])
        given = {"of_row": scales, "of_column": of_columns}
        _scaled().gemm(q, w, out, epi_args=given, tile_M=128, tile_N=width, cluster_M=1, cluster_N=2, cu_seqlens_m=bounds)
    return out


@functools.cache
def _scaled() -> Any:
    """QuACK's product with its scales: both are named, so that no shape decides which is which."""
    from quack.epilogue import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad, RowVecLoad

    @gemm_epilogue(ops={"of_row": ColVecLoad("of_row"), "of_column": RowVecLoad("of_column")})
    def scaled(acc, of_row, of_column):
        return {"D": acc * of_row * of_column}

    return scaled
