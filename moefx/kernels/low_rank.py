"""Products with the factors of experts' low-rank updates (LoRA), on rows that lie expert by expert.

A rank is small, so that each product takes as long as its rows take to be read and written: :func:`into` reads rows of n
numbers and writes r, :func:`add_` adds r to n in place, :func:`outer` sums over each expert's rows. Sums are in fp32 and have
one fixed order. Factors are [E, r, n] with any strides; ``bounds`` [E + 1] int32: expert e has the rows from bounds[e] to
bounds[e + 1]. The three products are those of Punica (arXiv 2310.18547), by expert instead of by adapter.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv
from moefx.ops.expert_weights import LowRank


@triton.jit
def _tile(bounds, experts, tile, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of the tiles of ROWS rows, each of one expert's: the expert, the first row and the end of the expert's rows."""
    e = tl.arange(0, EXPERTS)
    start = tl.load(bounds + e, mask=e < experts, other=0)
    end = tl.load(bounds + e + 1, mask=e < experts, other=0)
    tiles = tl.where(e < experts, (end - start + ROWS - 1) // ROWS, 0)
    before = tl.cumsum(tiles, 0) <= tile
    expert = tl.sum(before.to(tl.int32))
    skipped = tl.sum(tl.where(before, tiles, 0))
    there = expert < experts
    first = tl.load(bounds + expert, mask=there, other=0) + (tile - skipped) * ROWS
    return expert, first, tl.load(bounds + expert + 1, mask=there, other=0)


@triton.jit
def _into(
    x, factor, bounds, index, out,
    width, experts, rank, by_expert, by_rank, by_column,
    GATHERED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    expert, first, end = _tile(bounds, experts, tl.program_id(0), ROWS, EXPERTS)
    if expert >= experts:
        return
    row = first + tl.arange(0, ROWS)
    r = tl.arange(0, RANK)
    at = tl.load(index + row, mask=row < end, other=0) if GATHERED else row
    start = x + at.to(tl.int64)[:, None] * width
    of = factor + expert.to(tl.int64) * by_expert + r[:, None] * by_rank
    total = tl.zeros((ROWS, RANK), tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        there = (row < end)[:, None] & (column < width)[None, :]
        given = tl.load(start + column[None, :], mask=there, other=0.0)
        matrix = tl.load(of + column[None, :] * by_column, mask=(r < rank)[:, None] & (column < width)[None, :], other=0.0)
        total = tl.dot(given, tl.trans(matrix), total, input_precision="ieee")
    here = out + row.to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(here, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (r < rank)[None, :])


@triton.jit
def _add(
    out, inner, factor, bounds,
    width, experts, rank, by_expert, by_rank, by_column,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    expert, first, end = _tile(bounds, experts, tl.program_id(0), ROWS, EXPERTS)
    if expert >= experts:
        return
    row, r = first + tl.arange(0, ROWS), tl.arange(0, RANK)
    left = inner + row.to(tl.int64)[:, None] * rank + r[None, :]
    given = tl.load(left, mask=(row < end)[:, None] & (r < rank)[None, :], other=0.0)
    start = out + row.to(tl.int64)[:, None] * width
    of = factor + expert.to(tl.int64) * by_expert + r[:, None] * by_rank
    for i in range(BLOCKS):  # finding the tile takes as long as a block, so that a program adds several
        column = (tl.program_id(1) * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        there = (row < end)[:, None] & (column < width)[None, :]
        matrix = tl.load(of + column[None, :] * by_column, mask=(r < rank)[:, None] & (column < width)[None, :], other=0.0)
        old = tl.load(start + column[None, :], mask=there, other=0.0).to(tl.float32)
        new = tl.dot(given, matrix, old, input_precision="ieee")
        tl.store(start + column[None, :], new.to(out.dtype.element_ty), mask=there)


@triton.jit
def _outer(
    inner, x, bounds, index, weights, order, out,
    width, experts, rank, by_expert, by_rank, by_column,
    GATHERED: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0).to(tl.int64)
    start, end = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    r, column = tl.arange(0, RANK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((RANK, BLOCK), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        at = tl.load(index + row, mask=row < end, other=0) if GATHERED else row
        left = inner + row.to(tl.int64)[:, None] * rank + r[None, :]
        given = tl.load(left, mask=(row < end)[:, None] & (r < rank)[None, :], other=0.0)
        if WEIGHTED:
            weight = tl.load(weights + tl.load(order + row, mask=row < end, other=0), mask=row < end, other=0.0)
            given = (given * weight.to(tl.float32)[:, None]).to(given.dtype)
        there = (row < end)[:, None] & (column < width)[None, :]
        right = tl.load(x + at.to(tl.int64)[:, None] * width + column[None, :], mask=there, other=0.0)
        total = tl.dot(tl.trans(given), right, total, input_precision="ieee")
    of = out + expert * by_expert + r[:, None] * by_rank + column[None, :] * by_column
    tl.store(of, total.to(out.dtype.element_ty), mask=(r < rank)[:, None] & (column < width)[None, :])


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _block(width: int) -> int:
    return max(16, min(128, triton.next_power_of_2(width)))


def _tiles(rows: int, experts: int, size: int) -> int:
    """At least as many tiles of one expert's rows as there are."""
    return cdiv(rows, size) + min(experts, rows)


@functools.lru_cache(KEPT)
def _launch_into(width: int, experts: int, rank: int, strides: tuple[int, int, int], gathered: bool) -> Launch:
    sizes = {"EXPERTS": triton.next_power_of_2(experts), "ROWS": 64, "BLOCK": _block(width), "RANK": _padded(rank)}
    return Launch(_into, width, experts, rank, *strides, GATHERED=gathered, **sizes, num_warps=4, num_stages=3)


@functools.lru_cache(KEPT)
def _launch_add(width: int, experts: int, rank: int, strides: tuple[int, int, int]) -> Launch:
    block = _block(width)
    sizes = {"EXPERTS": triton.next_power_of_2(experts), "ROWS": 32, "BLOCK": block, "RANK": _padded(rank)}
    return Launch(_add, width, experts, rank, *strides, **sizes, BLOCKS=min(2, cdiv(width, block)), num_warps=4)


@functools.lru_cache(KEPT)
def _launch_outer(width: int, experts: int, rank: int, strides: tuple[int, int, int], gathered: bool, weighted: bool) -> Launch:
    sizes = {"ROWS": 64, "BLOCK": _block(width), "RANK": _padded(rank)}
    kinds = {"GATHERED": gathered, "WEIGHTED": weighted}
    return Launch(_outer, width, experts, rank, *strides, **kinds, **sizes, num_warps=4, num_stages=3)


def into(x: Tensor, factor: Tensor, bounds: Tensor, index: Tensor | None = None) -> Tensor:
    """x [R, n], each row times its expert's factor [E, r, n] transposed: [R, r] in x's dtype.

    index [R]: the row of x that each row is. Rows after the last expert's are undefined.
    """
    (experts, rank, width), rows = factor.shape, x.shape[0] if index is None else index.shape[0]
    out = x.new_empty(rows, rank)
    if out.numel():
        launch = _launch_into(width, experts, rank, factor.stride(), index is not None)
        grid = (_tiles(rows, experts, launch.constants["ROWS"]), 1, 1)
        launch(grid, x.contiguous(), factor, bounds, bounds if index is None else index, out)
    return out


def add_(out: Tensor, inner: Tensor, factor: Tensor, bounds: Tensor) -> None:
    """Adds inner [R, r] times each row's factor [E, r, n] to out [R, n], contiguous, in place; rounded once."""
    experts, rank, width = factor.shape
    if out.numel():
        launch = _launch_add(width, experts, rank, factor.stride())
        columns = launch.constants["BLOCK"] * launch.constants["BLOCKS"]
        launch((_tiles(out.shape[0], experts, launch.constants["ROWS"]), cdiv(width, columns), 1), out, inner, factor, bounds)


def outer(
    inner: Tensor,
    x: Tensor,
    bounds: Tensor,
    index: Tensor | None = None,
    *,
    transposed: bool = False,
    weights: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """inner [R, r], x [R, n] -> [E, r, n], inner' x of each expert's rows, zeros without rows; ``transposed``: [E, n, r].

    index [R]: the row of x that each row is. Row i of inner is multiplied by weights[order[i]], flat, if they are given.
    """
    experts, rank, width = len(bounds) - 1, inner.shape[1], x.shape[1]
    out = x.new_empty(experts, width, rank) if transposed else x.new_empty(experts, rank, width)
    by_expert, *others = out.stride()
    by_rank, by_column = reversed(others) if transposed else others
    launch = _launch_outer(width, experts, rank, (by_expert, by_rank, by_column), index is not None, weights is not None)
    grid = (experts, cdiv(width, launch.constants["BLOCK"]), 1)
    by_row = (inner, bounds) if weights is None or order is None else (weights.contiguous(), order)
    launch(grid, inner, x.contiguous(), bounds, bounds if index is None else index, *by_row, out)
    return out


def update_(out: Tensor, x: Tensor, update: LowRank, bounds: Tensor, index: Tensor | None = None) -> Tensor:
    """Adds (x a') b' to out [R, n], in place, and returns x a' [R, r]; x and index are those of :func:`into`."""
    inner = into(x, update.a, bounds, index)
    add_(out, inner, update.b.transpose(1, 2), bounds)
    return inner
