"""Stable counting sort of (token, k) pairs into buckets, of experts or ranks: three kernels, without atomics.

A pair (t, k) with the expert e goes into the bucket ``(e - first) // each``; one whose bucket is not one of ``buckets`` gets no
row. ``sort_by_expert`` sorts all pairs of a router, ``build_row_id_map`` those of a dispatch, where a token may have one row in
a bucket, however many of its experts are there.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch

#: Elements of a block's table of (pair, bucket) and of (token, bucket): it has to stay in registers.
PAIRS_TABLE, TOKENS_TABLE = 1 << 14, 1 << 13


@triton.jit
def _bucket(topk_ids, at, inside, first, each, there, buckets):
    """1 where a pair goes into a bucket: [BLOCK, BUCKETS] int32."""
    e = tl.load(topk_ids + at, mask=inside, other=-1).to(tl.int32) - first
    return ((e >= 0)[:, None] & ((e // each)[:, None] == buckets[None, :]) & (buckets < there)[None, :]).to(tl.int32)


@triton.jit
def _count(
    topk_ids,
    counts,
    pairs,
    tokens,
    blocks,
    stride,
    first,
    each,
    there,
    TOP_K: tl.constexpr,
    BUCKETS: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a block of tokens: the rows for each bucket, and (ONCE) the pairs. counts, pairs [BUCKETS, blocks]."""
    block = tl.program_id(0)
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    buckets = tl.arange(0, BUCKETS)
    wanted = tl.zeros((BLOCK, BUCKETS), tl.int32)
    many = tl.zeros((BUCKETS,), tl.int32)
    for k in tl.static_range(TOP_K):
        here = _bucket(topk_ids, token * stride + k, token < tokens, first, each, there, buckets)
        if ONCE:
            many += tl.sum(here, axis=0)
            wanted = tl.maximum(wanted, here)
        else:
            wanted += here
    tl.store(counts + buckets * blocks + block, tl.sum(wanted, axis=0))
    if ONCE:
        tl.store(pairs + buckets * blocks + block, many)


@triton.jit
def _scan(counts, pairs, totals, blocks, ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Of one bucket: its rows in the blocks before each block, in place of the counts; and its totals."""
    bucket = tl.program_id(0)
    before = 0
    many = 0
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        n = tl.load(counts + bucket * blocks + at, mask=at < blocks, other=0)
        tl.store(counts + bucket * blocks + at, before + tl.cumsum(n, 0) - n, mask=at < blocks)
        before += tl.sum(n, 0)
        if ONCE:
            many += tl.sum(tl.load(pairs + bucket * blocks + at, mask=at < blocks, other=0), 0)
    if ONCE:
        tl.store(totals + 2 * bucket, before)
        tl.store(totals + 2 * bucket + 1, many)
    else:
        tl.store(totals + bucket, before)


@triton.jit
def _map_rows(
    topk_ids,
    counts,
    totals,
    row_id_map,
    send_map,
    order,
    bounds,
    tokens,
    blocks,
    stride,
    first,
    each,
    there,
    TOP_K: tl.constexpr,
    BUCKETS: tl.constexpr,
    ONCE: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of each pair: its bucket's first row, plus the bucket's rows of earlier blocks, tokens and k.

    ORDERED: every pair has a row; the pair of each row (order) and the first row of each bucket (bounds) are written too.
    """
    block = tl.program_id(0)
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    buckets = tl.arange(0, BUCKETS)
    total = tl.load(totals + buckets * (2 if ONCE else 1), mask=buckets < there, other=0).to(tl.int32)
    ends = tl.cumsum(total, 0)
    if ORDERED:
        if block == 0:
            tl.store(bounds, 0)
            tl.store(bounds + 1 + buckets, ends, mask=buckets < there)
    start = ends - total + tl.load(counts + buckets * blocks + block, mask=buckets < there, other=0)
    wanted = tl.zeros((BLOCK, BUCKETS), tl.int32)
    for k in tl.static_range(TOP_K):
        here = _bucket(topk_ids, token * stride + k, token < tokens, first, each, there, buckets)
        wanted = tl.maximum(wanted, here) if ONCE else wanted + here
    row = start[None, :] + tl.cumsum(wanted, axis=0) - wanted
    seen = tl.zeros((BLOCK, BUCKETS), tl.int32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        if TOP_K > 1:  # else here is what it was
            here = _bucket(topk_ids, token * stride + k, token < tokens, first, each, there, buckets)
        at = tl.sum(here * (row if ONCE else row + seen), axis=1)
        if ORDERED:
            tl.store(row_id_map + pair, at, mask=token < tokens)
            tl.store(order + at, pair.to(tl.int32), mask=token < tokens)
        else:
            known = tl.sum(here, axis=1) > 0  # among these buckets
            tl.store(row_id_map + pair, tl.where(known, at, -1), mask=token < tokens)
            if ONCE:
                again = tl.sum(here * seen, axis=1) > 0
                tl.store(send_map + pair, tl.where(known & (again == 0), at, -1), mask=token < tokens)
        seen += here


def build_row_id_map(
    topk_ids: Tensor, first: int, each: int, buckets: int, totals: Tensor, row_id_map: Tensor, send_map: Tensor | None
) -> None:
    """Writes ``row_id_map`` [T, K] int32 (-1: no row) and ``totals`` int64 for topk_ids [T, K], whose rows may be strided.

    With ``send_map`` a token has one row in a bucket, however many of its experts are there, and ``send_map`` names it at the
    first of them only; totals [buckets, 2] are rows and pairs. Without, each pair has a row: totals [buckets].
    """
    tokens, top_k = topk_ids.shape
    if not topk_ids.numel():
        totals.zero_()
        return
    width, once = max(2, triton.next_power_of_2(buckets)), send_map is not None
    block = max(16, min(128, TOKENS_TABLE // width))
    blocks = triton.cdiv(tokens, block)
    counts = torch.empty(2, width, blocks, dtype=torch.int32, device=topk_ids.device)
    sizes = (tokens, blocks, topk_ids.stride(0), first, each, buckets)
    shape = {"TOP_K": top_k, "BUCKETS": width, "ONCE": once, "BLOCK": block, "num_warps": 8}
    unused = row_id_map  # an argument that the kernel does not read
    # not by Launch, which keeps what it found for certain sizes: how many tokens arrive differs in each step
    with torch.cuda.device_of(topk_ids):
        _count[(blocks,)](topk_ids, counts[0], counts[1], *sizes, **shape)
        _scan[(buckets,)](counts[0], counts[1], totals, blocks, once, min(1024, triton.next_power_of_2(blocks)))
        maps = (row_id_map, unused if send_map is None else send_map, unused, unused)
        _map_rows[(blocks,)](topk_ids, counts[0], totals, *maps, *sizes, ORDERED=False, **shape)


@functools.lru_cache(KEPT)
def _launches(pairs: int, experts: int) -> tuple[int, int, Launch, Launch, Launch]:
    """Blocks, experts up to a power of two, and the three launches."""
    width = max(2, triton.next_power_of_2(experts))
    block = max(16, min(256, PAIRS_TABLE // width))
    blocks = triton.cdiv(pairs, block)
    sizes = (pairs, blocks, 1, 0, 1, experts)
    shape = {"TOP_K": 1, "BUCKETS": width, "ONCE": False, "BLOCK": block, "num_warps": 8}
    return (
        blocks,
        width,
        Launch(_count, *sizes, **shape),
        Launch(_scan, blocks, ONCE=False, BLOCK=min(1024, triton.next_power_of_2(blocks))),
        Launch(_map_rows, *sizes, ORDERED=True, **shape),
    )


def sort_by_expert(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable sort of the pairs of topk_ids [T, K] int64 by expert: within an expert, rows are in the order of the tokens.

    Returns:
        order [T * K], the pair (``t * K + k``) of each row; inverse [T * K], the row of each pair; bounds [E + 1]: expert e has
        the rows from ``bounds[e]`` to ``bounds[e + 1]``. All int32.
    """
    pairs = topk_ids.numel()

    def integers(*shape: int) -> Tensor:
        return topk_ids.new_empty(shape, dtype=torch.int32)

    order, inverse = integers(pairs), integers(pairs)
    if not pairs:
        return order, inverse, torch.zeros(experts + 1, dtype=torch.int32, device=topk_ids.device)
    blocks, width, count, scan, map_rows = _launches(pairs, experts)
    counts, totals, bounds = integers(width, blocks), integers(width), integers(experts + 1)
    topk_ids = topk_ids.contiguous()
    count((blocks, 1, 1), topk_ids, counts, counts)
    scan((experts, 1, 1), counts, counts, totals)
    map_rows((blocks, 1, 1), topk_ids, counts, totals, inverse, inverse, order, bounds)
    return order, inverse, bounds
