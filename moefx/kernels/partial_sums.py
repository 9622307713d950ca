"""What programs added up each for themselves, added in their order and rounded, in one kernel."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv


@triton.jit
def _sum(parts, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(parts + row[:, None] * width + column[None, :], mask=there, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < width)


@functools.lru_cache(KEPT)
def _launch(rows: int, width: int) -> Launch:
    tall = min(512, triton.next_power_of_2(rows))
    return Launch(_sum, rows, width, ROWS=tall, BLOCK=8, num_warps=8)


def partial_sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts [P, n] in fp32 -> [n]; the order of the sum depends on P alone."""
    out = parts.new_empty(parts.shape[1], dtype=dtype)
    launch = _launch(*parts.shape)
    launch((cdiv(parts.shape[1], launch.constants["BLOCK"]), 1, 1), parts, out)
    return out
