"""Quantizing rows in blocks of 128 and back, each in one kernel: see :mod:`moefx.transports.fp8_rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Blocks of a row that one program takes.
TOGETHER = 8


@triton.jit
def _quantize(x, q, scales, width, many, x_stride, q_stride, scales_stride, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-30)
    tl.store(q + row * q_stride + column, (value * (448.0 / largest)[:, None]).to(tl.float8e4nv), mask=column < width)
    tl.store(scales + row * scales_stride + block, largest / 448.0, mask=block < many)


@triton.jit
def _dequantize(q, scales, out, width, many, q_stride, scales_stride, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(q + row * q_stride + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.load(scales + row * scales_stride + block, mask=block < many, other=0.0)
    tl.store(out + row * width + column, (value * scale[:, None]).to(out.dtype.element_ty), mask=column < width)


def _grid(rows: int, many: int) -> tuple[int, int]:
    return rows, triton.cdiv(many, TOGETHER)


def quantize(x: Tensor, q: Tensor, scales: Tensor) -> None:
    """x [T, H] into q [T, H] e4m3 and scales [T, H / 128] float32, both with rows that may be strided."""
    if x.numel():
        with torch.cuda.device_of(x):
            _quantize[_grid(*scales.shape)](
                x, q, scales, x.shape[1], scales.shape[1], x.stride(0), q.stride(0), scales.stride(0), TOGETHER, 128
            )


def dequantize(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q times its scales, in ``dtype``: the inverse of :func:`quantize`, but for its rounding."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if q.numel():
        with torch.cuda.device_of(q):
            _dequantize[_grid(*scales.shape)](
                q, scales, out, q.shape[1], scales.shape[1], q.stride(0), scales.stride(0), TOGETHER, 128
            )
    return out
