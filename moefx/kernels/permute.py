"""Tokens to rows in the order of :func:`moefx.kernels.counting_sort.sort_by_expert`, and weighted sums of rows per token."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv


@triton.jit
def _expand(x, inverse, rows, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """One token, read once, written to its K rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    value = tl.load(x + token * width + column, mask=there)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + k).to(tl.int64)
        tl.store(rows + row * width + column, value, mask=there)


@functools.lru_cache(KEPT)
def _launch_expand(width: int, top_k: int) -> Launch:
    return Launch(_expand, width, TOP_K=top_k, BLOCK=min(4096, triton.next_power_of_2(width)), num_warps=4)


def expand(x: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Tokens x [T, H] -> rows [T*K, H], each token in its K rows."""
    tokens, width = x.shape
    rows = x.new_empty(tokens * top_k, width)
    if rows.numel():
        launch = _launch_expand(width, top_k)
        launch((tokens, cdiv(width, launch.constants["BLOCK"]), 1), x.contiguous(), inverse, rows)
    return rows


@triton.jit
def _reduce(
    rows,
    weights,
    index,
    bias,
    inverse,
    out,
    width,
    experts,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        flat = token * TOP_K + k
        row = tl.load(inverse + flat).to(tl.int64)
        if BIASED or SOME:
            expert = tl.load(index + flat)
        mine = there
        if SOME:
            mine = there & (tl.full((BLOCK,), 0, tl.int64) + expert < experts)  # a lone truth is no mask to the interpreter
        value = tl.load(rows + row * width + column, mask=mine, other=0.0).to(tl.float32)
        if BIASED:
            value += tl.load(bias + expert * width + column, mask=there).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + flat).to(tl.float32)
        total += value
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=there)


@functools.lru_cache(KEPT)
def _launch_reduce(width: int, experts: int, top_k: int, weighted: bool, biased: bool) -> Launch:
    block = min(2048, triton.next_power_of_2(width))
    constants = {"WEIGHTED": weighted, "BIASED": biased, "SOME": experts > 0, "BLOCK": block, "num_warps": 4}
    return Launch(_reduce, width, experts, TOP_K=top_k, **constants)


def reduce(
    rows: Tensor,
    inverse: Tensor,
    top_k: int,
    dtype: torch.dtype,
    *,
    weights: Tensor | None = None,
    index: Tensor | None = None,
    bias: Tensor | None = None,
    experts: int = 0,
) -> Tensor:
    """``y[t] = sum_k weights[t, k] * (rows[row(t, k)] + bias[index[t, k]])`` [T, H] in ``dtype``, added in fp32 in order.

    rows [T*K, H]; weights [T, K] or None (ones); bias [E, H] or None; ``experts``, unless 0: rows of others than these first
    belong to zero-computation experts and are not read. For these two index [T, K] is needed.
    """
    flats, width = rows.shape
    out = rows.new_empty(flats // top_k, width, dtype=dtype)
    if out.numel():
        nothing = rows  # an argument that the kernel does not read
        launch = _launch_reduce(width, experts, top_k, weights is not None, bias is not None)
        launch(
            (out.shape[0], cdiv(width, launch.constants["BLOCK"]), 1),
            rows,
            nothing if weights is None else weights.contiguous(),
            nothing if index is None else index.contiguous(),
            nothing if bias is None else bias,
            inverse,
            out,
        )
    return out
