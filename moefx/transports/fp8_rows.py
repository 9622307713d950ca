"""Tokens in 8 bits for the dispatch: float8_e4m3fn with one float32 scale for each block of 128 elements of a row.

The format of DeepSeek-V3's dispatch (arXiv 2412.19437, section 3.3.3) and of DeepEP's tests: ``scale = max|x| / 448`` over a
block, ``q = x / scale`` rounded to float8_e4m3fn; the receiver computes ``q * scale`` and rounds it to the dtype of x.

Error bound. e4m3 has 3 mantissa bits, so rounding changes a number by at most 2**-4 of itself; its subnormals, below 2**-6, are
2**-9 apart, so there by at most 2**-10. Nothing overflows, since ``|x / scale| <= 448``. Rounding to 16 bits and the float32
arithmetic add u = 2**-8 (bfloat16; float32: 2**-22) of the result:

    |received - x| <= (1 + u) * max(2**-4 * |x|, 2**-10 * max|x of the block| / 448) + u * |x|
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.transports.row_layout import empty_rows, row_bytes, unpack

BLOCK = 128
LARGEST = 448.0  #: finite value of float8_e4m3fn
TINY = 1e-30  #: keeps the scale of a block of zeros and its inverse finite


def blocks(hidden: int) -> int:
    """Scales of a row."""
    return (hidden + BLOCK - 1) // BLOCK


def _parts(hidden: int) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
    return (hidden, torch.float8_e4m3fn), (blocks(hidden), torch.float32)


def width(hidden: int, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that an encoded row takes: quantized elements, then scales."""
    return row_bytes(*_parts(hidden)) // dtype.itemsize


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, H] -> e4m3 [T, H], scales [T, H / 128] float32 (the last block of a row may be shorter)."""
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[0], blocks(x.shape[1]), dtype=torch.float32, device=x.device)
    _quantize(x, q, scales)
    return q, scales


def _quantize(x: Tensor, q: Tensor, scales: Tensor) -> None:
    if x.is_cuda:
        from moefx.kernels.fp8_rows import quantize

        return quantize(x.contiguous(), q, scales)
    hidden, many = x.shape[1], scales.shape[1]
    parts = F.pad(x.float(), (0, many * BLOCK - hidden)).view(-1, many, BLOCK)
    largest = parts.abs().amax(dim=2).clamp_min(TINY)
    q.copy_((parts * (LARGEST / largest).unsqueeze(2)).view(-1, many * BLOCK)[:, :hidden].to(q.dtype))
    scales.copy_(largest / LARGEST)


def dequantize(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q [T, H] and scales [T, H / 128] -> [T, H] in ``dtype``. Rows of both may be strided."""
    if q.is_cuda:
        from moefx.kernels.fp8_rows import dequantize

        return dequantize(q, scales, dtype)
    return (q.float() * scales.repeat_interleave(BLOCK, dim=1)[:, : q.shape[1]]).to(dtype)


def encode(x: Tensor) -> Tensor:
    """x [T, H] -> rows [T, width] in the dtype of x, which hold quantized elements and scales: what transports send."""
    parts = _parts(x.shape[1])
    rows = empty_rows(x, x.shape[0], *parts)
    _quantize(x, *unpack(rows, *parts))
    return rows


def decode(rows: Tensor, hidden: int) -> Tensor:
    """Encoded rows [N, width] -> [N, H] in their dtype. Rows may be strided."""
    q, scales = unpack(rows, *_parts(hidden))
    return dequantize(q, scales, rows.dtype)
