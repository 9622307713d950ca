"""Root mean square norms of rows, with the residual addition before them: each row is read once, forward and backward."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv
from moefx.kernels.partial_sums import partial_sums
from moefx.ops import NormSpec

#: Programs of the backward, two for each of an H200's processors: each adds up its share of the weight's gradient, in order,
#: before all are added. More would not run at once, and the last would run alone: twice as many took 1.6 times as long.
PROGRAMS = 264
#: Numbers of a program's tile, at least; it has two rows where they are longer.
TILE = 4096


@triton.jit
def _read(x, row, stride, column, there):
    return tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _write(x, row, width, column, there, value):
    at = x + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=there)


@triton.jit
def _forward(
    x,
    residual,
    weight,
    y,
    total,
    x_stride,
    residual_stride,
    rows,
    width,
    eps,
    offset,
    ADDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CASTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < width)[None, :]
    h = _read(x, row, x_stride, column, there)
    DTYPE: tl.constexpr = total.dtype.element_ty
    if ADDS:  # the norm is that of the rounded sum
        h = (h + _read(residual, row, residual_stride, column, there)).to(DTYPE).to(tl.float32)
        _write(total, row, width, column, there, h)
    h *= tl.rsqrt(tl.sum(h * h, axis=1) / width + eps)[:, None]
    if WEIGHTED:
        if CASTS:
            h = h.to(DTYPE).to(tl.float32)
        h *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :] + offset
    _write(y, row, width, column, there, h)


@triton.jit
def _backward(
    grad,
    to_total,
    x,
    weight,
    to_x,
    to_weight,
    grad_stride,
    to_total_stride,
    x_stride,
    rows,
    width,
    eps,
    offset,
    ADDS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    if WEIGHTED:
        w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    if SUMS:
        sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < width)[None, :]
        h = _read(x, row, x_stride, column, there)
        g = _read(grad, row, grad_stride, column, there)
        if ADDS:
            more = _read(to_total, row, to_total_stride, column, there)
        norm = tl.rsqrt(tl.sum(h * h, axis=1) / width + eps)[:, None]
        h *= norm
        if SUMS:
            sums += tl.sum(g * h, axis=0)
        if WEIGHTED:
            g *= w[None, :]
        g = (g - h * (tl.sum(g * h, axis=1) / width)[:, None]) * norm
        if ADDS:
            g += more
        _write(to_x, row, width, column, there, g)
    if SUMS:
        tl.store(to_weight + tl.program_id(0) * width + column, sums, mask=column < width)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x with its rows contiguous, and how far apart they lie."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def _sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    rows = max(2 if block <= 2 * TILE else 1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 1024))}


@functools.lru_cache(KEPT)
def _launch_forward(
    rows: int, width: int, strides: tuple[int, ...], eps: float, offset: float, adds: bool, weighted: bool, casts: bool
) -> Launch:
    return Launch(_forward, *strides, rows, width, eps, offset, ADDS=adds, WEIGHTED=weighted, CASTS=casts, **_sizes(width))


@functools.lru_cache(KEPT)
def _launch_backward(
    rows: int, width: int, strides: tuple[int, ...], eps: float, offset: float, adds: bool, weighted: bool, sums: bool
) -> Launch:
    constants = {"ADDS": adds, "WEIGHTED": weighted, "SUMS": sums, **_sizes(width)}
    return Launch(_backward, *strides, rows, width, eps, offset, **constants)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    spec: NormSpec,
    of_y: torch.dtype,
    of_total: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x and residual [..., H] -> their sum's norm, contiguous, and the sum (empty without ``residual``: it is x).

    ``of_y``, ``of_total``: their dtypes.
    """
    shape, adds = x.shape, residual is not None
    y, total = x.new_empty(shape, dtype=of_y), x.new_empty(shape if adds else 0, dtype=of_total)
    width = shape[-1]
    rows = y.numel() // width
    if not rows:
        return y, total
    x, stride = _rows(x)
    more, more_stride = (x, stride) if residual is None else _rows(residual)
    casts = spec.cast_first and not spec.offset
    launch = _launch_forward(rows, width, (stride, more_stride), eps, spec.offset, adds, weight is not None, casts)
    launch((cdiv(rows, launch.constants["ROWS"]), 1, 1), x, more, x if weight is None else weight.contiguous(), y, total)
    return y, total


def backward(
    grad: Tensor, to_total: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, spec: NormSpec, of_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, whose norm's gradient is ``grad`` and to whose own ``to_total`` is added, and of the weight, if asked."""
    to_x, width, weighted = x.new_empty(x.shape), x.shape[-1], weight is not None
    rows = to_x.numel() // width
    if not rows:
        return to_x, torch.zeros_like(weight) if weight is not None and of_weight else None
    (x, stride), (grad, grad_stride) = _rows(x), _rows(grad)
    more, more_stride = (x, stride) if to_total is None else _rows(to_total)
    strides = grad_stride, more_stride, stride
    sums = weighted and of_weight
    launch = _launch_backward(rows, width, strides, eps, spec.offset, to_total is not None, weighted, sums)
    programs = min(cdiv(rows, launch.constants["ROWS"]), PROGRAMS)
    parts = x.new_empty((programs, width) if sums else 0, dtype=torch.float32)
    launch((programs, 1, 1), grad, more, x, x if weight is None else weight.contiguous(), to_x, parts)
    return to_x, partial_sums(parts, weight.dtype) if weight is not None and of_weight else None
