"""Sums of chosen rows and their gradient: each row is read once, added in float32, and written once. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transports import wide


@triton.jit
def _sum(rows, place, weights, out, width, row_stride, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program for BLOCK numbers of one result."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        at = tl.load(place + token * TOP_K + k)
        row = tl.load(rows + at * row_stride + column, mask=inside & (at >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights + at, mask=at >= 0, other=0.0).to(tl.float32)
        total += row
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, rows, weights, tokens, to_rows, to_weights, width, BLOCK: tl.constexpr):
    """One program for one row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    here = token >= 0
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (column < width) & here
        g = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
        total += g * x
        tl.store(to_rows + row * width + column, (g * weight).to(to_rows.dtype.element_ty), mask=column < width)
    tl.store(to_weights + row, tl.sum(total, axis=0).to(to_weights.dtype.element_ty))


def _block(width: int, most: int) -> int:
    return min(most, max(128, triton.next_power_of_2(width)))


def _check(rows: Tensor) -> None:
    if wide(rows.dtype) is torch.float64:
        raise ValueError("these kernels add in float32, float64 rows would lose: train on CUDA in float32 or bfloat16")


def sum_rows(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """See :func:`moefx.rows.sum_rows`."""
    _check(rows)
    (tokens, top_k), width = place.shape, rows.shape[1]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if tokens:
        block = _block(width, 1024)
        with torch.cuda.device(rows.device):
            _sum[(tokens, triton.cdiv(width, block))](
                rows, place.contiguous(), rows if weights is None else weights, out, width, rows.stride(0), TOP_K=top_k,
                WEIGHTED=weights is not None, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out


def weighted_backward(grad: Tensor, rows: Tensor, weights: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`moefx.rows.weighted_backward`; token [R]: the row of ``grad``, -1 for none."""
    _check(rows)
    grad, rows = grad.contiguous(), rows.contiguous()
    to_rows, to_weights = torch.empty_like(rows), torch.empty_like(weights)
    if rows.shape[0]:
        width = rows.shape[1]
        with torch.cuda.device(rows.device):
            _backward[(rows.shape[0],)](
                grad, rows, weights, token, to_rows, to_weights, width, BLOCK=_block(width, 2048), num_warps=4
            )
    return to_rows, to_weights
