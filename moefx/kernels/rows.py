"""The moves of :mod:`moefx.transports.permute` on a CUDA device: a row is read once, sums are in float32, nothing is atomic."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.transports import wide

#: Numbers of a block's table of (token, bucket): it has to stay in registers.
TABLE = 1 << 13


# --- tables of places: a stable counting sort into buckets -------------------------------------------------------------


@triton.jit
def _count(
    index,
    counts,
    entries,
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
    """Of a block of tokens: the rows for each bucket, and (ONCE) the (token, k). counts, entries [BUCKETS, blocks]."""
    block = tl.program_id(0)
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    buckets = tl.arange(0, BUCKETS)
    wanted = tl.zeros((BLOCK, BUCKETS), tl.int32)
    many = tl.zeros((BUCKETS,), tl.int32)
    for k in tl.static_range(TOP_K):
        e = tl.load(index + token * stride + k, mask=token < tokens, other=-1).to(tl.int32) - first
        here = ((e >= 0)[:, None] & ((e // each)[:, None] == buckets[None, :]) & (buckets < there)[None, :]).to(tl.int32)
        if ONCE:
            many += tl.sum(here, axis=0)
            wanted = tl.maximum(wanted, here)
        else:
            wanted += here
    tl.store(counts + buckets * blocks + block, tl.sum(wanted, axis=0))
    if ONCE:
        tl.store(entries + buckets * blocks + block, many)


@triton.jit
def _scan(counts, entries, totals, blocks, ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Of one bucket: its rows in the blocks before each block, in place of the counts; and its totals (int64)."""
    bucket = tl.program_id(0)
    before = 0
    many = 0
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        n = tl.load(counts + bucket * blocks + at, mask=at < blocks, other=0)
        tl.store(counts + bucket * blocks + at, before + tl.cumsum(n, 0) - n, mask=at < blocks)
        before += tl.sum(n, 0)
        if ONCE:
            many += tl.sum(tl.load(entries + bucket * blocks + at, mask=at < blocks, other=0), 0)
    if ONCE:
        tl.store(totals + 2 * bucket, before)
        tl.store(totals + 2 * bucket + 1, many)
    else:
        tl.store(totals + bucket, before)


@triton.jit
def _place(
    index,
    counts,
    totals,
    place,
    once,
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
    """Where each (token, k) goes: its bucket's first row, plus the bucket's rows of earlier blocks, tokens and k."""
    block = tl.program_id(0)
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    buckets = tl.arange(0, BUCKETS)
    total = tl.load(totals + buckets * (2 if ONCE else 1), mask=buckets < there, other=0).to(tl.int32)
    start = tl.cumsum(total, 0) - total + tl.load(counts + buckets * blocks + block)
    wanted = tl.zeros((BLOCK, BUCKETS), tl.int32)
    for k in tl.static_range(TOP_K):
        e = tl.load(index + token * stride + k, mask=token < tokens, other=-1).to(tl.int32) - first
        here = ((e >= 0)[:, None] & ((e // each)[:, None] == buckets[None, :]) & (buckets < there)[None, :]).to(tl.int32)
        wanted = tl.maximum(wanted, here) if ONCE else wanted + here
    row = start[None, :] + tl.cumsum(wanted, axis=0) - wanted
    seen = tl.zeros((BLOCK, BUCKETS), tl.int32)
    for k in tl.static_range(TOP_K):
        e = tl.load(index + token * stride + k, mask=token < tokens, other=-1).to(tl.int32) - first
        here = ((e >= 0)[:, None] & ((e // each)[:, None] == buckets[None, :]) & (buckets < there)[None, :]).to(tl.int32)
        known = tl.sum(here, axis=1) > 0  # among these buckets
        at = tl.sum(here * (row if ONCE else row + seen), axis=1)
        tl.store(place + token * TOP_K + k, tl.where(known, at, -1), mask=token < tokens)
        if ONCE:
            again = tl.sum(here * seen, axis=1) > 0
            tl.store(once + token * TOP_K + k, tl.where(known & (again == 0), at, -1), mask=token < tokens)
        seen += here


def places(index: Tensor, first: int, each: int, buckets: int, totals: Tensor, place: Tensor, once: Tensor | None) -> None:
    """Expert e goes into the bucket ``(e - first) // each``, if it is one of ``buckets``. Writes ``place`` and ``totals``.

    With ``once`` a token has one row in a bucket, however many of its experts are there: ``once`` has the first of them, and
    totals [buckets, 2] are rows and (token, k). Without, each (token, k) has a row: totals [buckets].
    """
    tokens, top_k = index.shape
    if not index.numel():
        totals.zero_()
        return
    width, alone = max(2, triton.next_power_of_2(buckets)), once is not None
    block = max(16, min(128, TABLE // width))
    blocks = triton.cdiv(tokens, block)
    counts = torch.empty(2, width, blocks, dtype=torch.int32, device=index.device)
    shape = {"TOP_K": top_k, "BUCKETS": width, "ONCE": alone, "BLOCK": block, "num_warps": 8}
    with torch.cuda.device_of(index):
        _count[(blocks,)](index, counts[0], counts[1], tokens, blocks, index.stride(0), first, each, buckets, **shape)
        _scan[(buckets,)](counts[0], counts[1], totals, blocks, alone, min(1024, triton.next_power_of_2(blocks)))
        _place[(blocks,)](
            index,
            counts[0],
            totals,
            place,
            place if once is None else once,
            tokens,
            blocks,
            index.stride(0),
            first,
            each,
            buckets,
            **shape,
        )


# --- from tokens to rows ---------------------------------------------------------------------------------------------


@triton.jit
def _spread(
    x,
    place,
    out,
    values,
    row_values,
    width,
    x_stride,
    out_stride,
    values_stride,
    TOP_K: tl.constexpr,
    WIDE_K: tl.constexpr,
    VALUED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token, read once, written to its rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * x_stride + column, mask=inside)
    for k in tl.static_range(TOP_K):
        row = tl.load(place + token * TOP_K + k).to(tl.int64)
        if row >= 0:
            tl.store(out + row * out_stride + column, value, mask=inside)
    if VALUED:
        if tl.program_id(1) == 0:
            ks = tl.arange(0, WIDE_K)
            rows = tl.load(place + token * TOP_K + ks, mask=ks < TOP_K, other=-1)
            each = tl.load(values + token * values_stride + ks, mask=ks < TOP_K)
            tl.store(row_values + rows, each, mask=rows >= 0)


@triton.jit
def _pack(
    x,
    index,
    weights,
    once,
    hidden,
    row_weights,
    experts,
    width,
    hidden_stride,
    weights_stride,
    experts_stride,
    local,
    TOP_K: tl.constexpr,
    WIDE_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token to the rows that travel, with its weights and, numbered as the receiver numbers them, its experts."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, mask=inside)
    for k in tl.static_range(TOP_K):
        row = tl.load(once + token * TOP_K + k).to(tl.int64)
        if row >= 0:
            tl.store(hidden + row * hidden_stride + column, value, mask=inside)
    if tl.program_id(1) == 0:
        ks = tl.arange(0, WIDE_K)
        e = tl.load(index + token * TOP_K + ks, mask=ks < TOP_K, other=-1).to(tl.int32)
        w = tl.load(weights + token * TOP_K + ks, mask=ks < TOP_K, other=0.0).to(tl.float32)
        for k in tl.static_range(TOP_K):
            row = tl.load(once + token * TOP_K + k).to(tl.int64)
            if row >= 0:
                rank = tl.load(index + token * TOP_K + k).to(tl.int32) // local
                there = tl.where((e >= 0) & (e // local == rank), e - rank * local, -1)
                tl.store(experts + row * experts_stride + ks, there, mask=ks < TOP_K)
                tl.store(row_weights + row * weights_stride + ks, w, mask=ks < TOP_K)


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def spread(x: Tensor, place: Tensor, out: Tensor, values: Tensor | None, row_values: Tensor) -> None:
    """See :func:`moefx.transports.permute.spread`."""
    (tokens, top_k), width, x = place.shape, x.shape[1], _inner(x)
    if place.numel():
        block = min(2048, max(128, triton.next_power_of_2(width)))
        with torch.cuda.device_of(x):
            _spread[(tokens, triton.cdiv(width, block))](
                x,
                place,
                out,
                x if values is None else values,
                row_values,
                width,
                x.stride(0),
                out.stride(0),
                0 if values is None else values.stride(0),
                TOP_K=top_k,
                WIDE_K=triton.next_power_of_2(top_k),
                VALUED=values is not None,
                BLOCK=block,
                num_warps=4,
            )


def pack(x: Tensor, index: Tensor, weights: Tensor, once: Tensor, local: int, out: Any) -> None:
    """See :func:`moefx.transports.permute.pack`."""
    (tokens, top_k), width = index.shape, x.shape[1]
    if index.numel():
        block = min(2048, max(128, triton.next_power_of_2(width)))
        with torch.cuda.device_of(x):
            _pack[(tokens, triton.cdiv(width, block))](
                x,
                index,
                weights,
                once,
                *out,
                width,
                out.hidden.stride(0),
                out.weights.stride(0),
                out.experts.stride(0),
                local,
                TOP_K=top_k,
                WIDE_K=triton.next_power_of_2(top_k),
                BLOCK=block,
                num_warps=4,
            )


# --- from rows to tokens ---------------------------------------------------------------------------------------------


@triton.jit
def _sum(
    rows,
    place,
    out,
    width,
    row_stride,
    out_stride,
    values,
    value_place,
    picked,
    value_stride,
    value_column,
    picked_stride,
    TOP_K: tl.constexpr,
    WIDE_K: tl.constexpr,
    PICKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK numbers of one result."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        at = tl.load(place + token * TOP_K + k)
        there = column < tl.where(at >= 0, width, 0)
        total += tl.load(rows + at.to(tl.int64) * row_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
    if PICKED:
        if tl.program_id(1) == 0:
            ks = tl.arange(0, WIDE_K)
            wanted = tl.load(value_place + token * TOP_K + ks, mask=ks < TOP_K, other=-1).to(tl.int64)
            value = tl.load(values + wanted * value_stride + ks * value_column, mask=wanted >= 0, other=0.0)
            tl.store(picked + token * picked_stride + ks, value, mask=ks < TOP_K)


def _check(rows: Tensor) -> None:
    if wide(rows.dtype) is torch.float64:
        raise ValueError("these kernels add in float32, float64 rows would lose: train on CUDA in float32 or bfloat16")


def sum_rows(rows: Tensor, place: Tensor, out: Tensor, picked: Any) -> None:
    """See :func:`moefx.transports.permute.sum_rows`."""
    _check(rows)
    (tokens, top_k), width, rows = place.shape, rows.shape[1], _inner(rows)
    if not tokens:
        return
    block = min(1024, max(128, triton.next_power_of_2(width)))
    if picked is None:
        extra = (rows, place, out, 0, 0, 0)
    else:
        values = picked.values
        steps = (values.stride(0), values.stride(1) if values.dim() == 2 else 0)
        extra = (values, picked.place, picked.out, *steps, picked.out.stride(0))
    with torch.cuda.device_of(rows):
        _sum[(tokens, triton.cdiv(width, block))](
            rows,
            place,
            out,
            width,
            rows.stride(0),
            out.stride(0),
            *extra,
            TOP_K=top_k,
            WIDE_K=triton.next_power_of_2(top_k),
            PICKED=picked is not None,
            BLOCK=block,
            num_warps=4,
        )
