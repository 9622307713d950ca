"""Rows of tokens in the order of their experts, and back: one stable counting sort, one write, one read; no atomics.

"Flat" positions are those of (token, k) in the router's index [T, K]; "rows" are the same things expert by expert.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv

#: Elements of the one-hot table of a block of the counting sort: it has to stay in registers.
TABLE = 1 << 14


@triton.jit
def _count(index, counts, flats, blocks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a block's flat positions go to each expert; counts [EXPERTS, blocks]."""
    block = tl.program_id(0)
    flat = block * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, EXPERTS)
    chosen = tl.load(index + flat, mask=flat < flats, other=EXPERTS)
    here = (chosen[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts + experts * blocks + block, tl.sum(here, axis=0))


@triton.jit
def _scan(counts, totals, blocks, BLOCK: tl.constexpr):
    """Of one expert: its positions in the blocks before each block, in place of the counts, and its total."""
    expert = tl.program_id(0)
    before = 0
    for first in range(0, blocks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        n = tl.load(counts + expert * blocks + at, mask=at < blocks, other=0)
        tl.store(counts + expert * blocks + at, before + tl.cumsum(n, 0) - n, mask=at < blocks)
        before += tl.sum(n, 0)
    tl.store(totals + expert, before)


@triton.jit
def _place(
    index,
    counts,
    totals,
    bounds,
    order,
    inverse,
    flats,
    blocks,
    experts_there,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where each flat position goes: the expert's first row, plus its positions in earlier blocks and earlier in this one."""
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    total = tl.load(totals + experts)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(bounds, 0)
        tl.store(bounds + 1 + experts, ends, mask=experts < experts_there)
    first = ends - total + tl.load(counts + experts * blocks + block)
    flat = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(index + flat, mask=flat < flats, other=EXPERTS)
    here = (chosen[:, None] == experts[None, :]).to(tl.int32)
    rows = tl.sum(here * (first[None, :] + tl.cumsum(here, axis=0) - 1), axis=1)
    tl.store(inverse + flat, rows, mask=flat < flats)
    tl.store(order + rows, flat, mask=flat < flats)


@functools.lru_cache(KEPT)
def _sort(flats: int, experts: int) -> tuple[int, int, Launch, Launch, Launch]:
    """Blocks, experts up to a power of two, and the three launches."""
    width = triton.next_power_of_2(experts)
    block = max(16, min(256, TABLE // width))
    blocks = triton.cdiv(flats, block)
    shape = {"EXPERTS": width, "BLOCK": block, "num_warps": 8}
    return (
        blocks,
        width,
        Launch(_count, flats, blocks, **shape),
        Launch(_scan, blocks, BLOCK=min(1024, triton.next_power_of_2(blocks))),
        Launch(_place, flats, blocks, experts, **shape),
    )


def sort_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``order`` [T*K]: the flat position of each row; ``inverse`` [T*K]: the row of each flat position; ``bounds``
    [E + 1]: expert e has the rows from bounds[e] to bounds[e + 1]. All int32; index [T, K] int64. A stable sort: within an
    expert, rows stand by token.
    """
    flats = index.numel()

    def integers(*shape: int) -> Tensor:
        return index.new_empty(shape, dtype=torch.int32)

    order, inverse = integers(flats), integers(flats)
    if not flats:
        return order, inverse, torch.zeros(experts + 1, dtype=torch.int32, device=index.device)
    blocks, width, count, scan, place = _sort(flats, experts)
    counts, totals, bounds = integers(width, blocks), integers(width), integers(experts + 1)
    index = index.contiguous()
    count((blocks, 1, 1), index, counts)
    scan((width, 1, 1), counts, totals)
    place((blocks, 1, 1), index, counts, totals, bounds, order, inverse)
    return order, inverse, bounds


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
    are nobody's and are not read. For these two index [T, K] is needed.
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
