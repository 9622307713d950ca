"""The Triton kernels of :mod:`moefx.transports.permute`: a row is read once, sums are in float32, without atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.transports import accumulation_dtype

#: Elements of a block's table of (token, bucket): it has to stay in registers.
TABLE = 1 << 13


# --- maps: a stable counting sort into buckets -----------------------------------------------------------------------


@triton.jit
def _count(
    topk_ids,
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
        e = tl.load(topk_ids + token * stride + k, mask=token < tokens, other=-1).to(tl.int32) - first
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
def _map_rows(
    topk_ids,
    counts,
    totals,
    row_id_map,
    send_map,
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
        e = tl.load(topk_ids + token * stride + k, mask=token < tokens, other=-1).to(tl.int32) - first
        here = ((e >= 0)[:, None] & ((e // each)[:, None] == buckets[None, :]) & (buckets < there)[None, :]).to(tl.int32)
        wanted = tl.maximum(wanted, here) if ONCE else wanted + here
    row = start[None, :] + tl.cumsum(wanted, axis=0) - wanted
    seen = tl.zeros((BLOCK, BUCKETS), tl.int32)
    for k in tl.static_range(TOP_K):
        e = tl.load(topk_ids + token * stride + k, mask=token < tokens, other=-1).to(tl.int32) - first
        here = ((e >= 0)[:, None] & ((e // each)[:, None] == buckets[None, :]) & (buckets < there)[None, :]).to(tl.int32)
        known = tl.sum(here, axis=1) > 0  # among these buckets
        at = tl.sum(here * (row if ONCE else row + seen), axis=1)
        tl.store(row_id_map + token * TOP_K + k, tl.where(known, at, -1), mask=token < tokens)
        if ONCE:
            again = tl.sum(here * seen, axis=1) > 0
            tl.store(send_map + token * TOP_K + k, tl.where(known & (again == 0), at, -1), mask=token < tokens)
        seen += here


def build_row_id_map(
    topk_ids: Tensor, first: int, each: int, buckets: int, totals: Tensor, row_id_map: Tensor, send_map: Tensor | None
) -> None:
    """Expert e goes into the bucket ``(e - first) // each``, if it is one of ``buckets``. Writes ``row_id_map`` and ``totals``.

    With ``send_map`` a token has one row in a bucket, however many of its experts are there, and ``send_map`` names it at the
    first of them only; totals [buckets, 2] are rows and (token, k). Without, each (token, k) has a row: totals [buckets].
    """
    tokens, top_k = topk_ids.shape
    if not topk_ids.numel():
        totals.zero_()
        return
    width, alone = max(2, triton.next_power_of_2(buckets)), send_map is not None
    block = max(16, min(128, TABLE // width))
    blocks = triton.cdiv(tokens, block)
    counts = torch.empty(2, width, blocks, dtype=torch.int32, device=topk_ids.device)
    shape = {"TOP_K": top_k, "BUCKETS": width, "ONCE": alone, "BLOCK": block, "num_warps": 8}
    with torch.cuda.device_of(topk_ids):
        _count[(blocks,)](topk_ids, counts[0], counts[1], tokens, blocks, topk_ids.stride(0), first, each, buckets, **shape)
        _scan[(buckets,)](counts[0], counts[1], totals, blocks, alone, min(1024, triton.next_power_of_2(blocks)))
        _map_rows[(blocks,)](
            topk_ids,
            counts[0],
            totals,
            row_id_map,
            row_id_map if send_map is None else send_map,
            tokens,
            blocks,
            topk_ids.stride(0),
            first,
            each,
            buckets,
            **shape,
        )


# --- from tokens to rows ---------------------------------------------------------------------------------------------


@triton.jit
def _permute(
    x,
    row_id_map,
    out,
    values,
    row_values,
    width,
    x_stride,
    out_stride,
    values_stride,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    VALUED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token, read once, written to its rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * x_stride + column, mask=inside)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_id_map + token * TOP_K + k).to(tl.int64)
        if row >= 0:
            tl.store(out + row * out_stride + column, value, mask=inside)
    if VALUED:
        if tl.program_id(1) == 0:
            ks = tl.arange(0, PADDED_K)
            rows = tl.load(row_id_map + token * TOP_K + ks, mask=ks < TOP_K, other=-1)
            each = tl.load(values + token * values_stride + ks, mask=ks < TOP_K)
            tl.store(row_values + rows, each, mask=rows >= 0)


@triton.jit
def _pack(
    x,
    topk_ids,
    topk_weights,
    send_map,
    hidden,
    sent_weights,
    sent_ids,
    width,
    hidden_stride,
    weights_stride,
    ids_stride,
    local,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token to the rows that are sent, with its weights and its experts as the receiver numbers them."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, mask=inside)
    for k in tl.static_range(TOP_K):
        row = tl.load(send_map + token * TOP_K + k).to(tl.int64)
        if row >= 0:
            tl.store(hidden + row * hidden_stride + column, value, mask=inside)
    if tl.program_id(1) == 0:
        ks = tl.arange(0, PADDED_K)
        e = tl.load(topk_ids + token * TOP_K + ks, mask=ks < TOP_K, other=-1).to(tl.int32)
        w = tl.load(topk_weights + token * TOP_K + ks, mask=ks < TOP_K, other=0.0).to(tl.float32)
        for k in tl.static_range(TOP_K):
            row = tl.load(send_map + token * TOP_K + k).to(tl.int64)
            if row >= 0:
                rank = tl.load(topk_ids + token * TOP_K + k).to(tl.int32) // local
                there = tl.where((e >= 0) & (e // local == rank), e - rank * local, -1)
                tl.store(sent_ids + row * ids_stride + ks, there, mask=ks < TOP_K)
                tl.store(sent_weights + row * weights_stride + ks, w, mask=ks < TOP_K)


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def permute(x: Tensor, row_id_map: Tensor, out: Tensor, values: Tensor | None, row_values: Tensor) -> None:
    """See :func:`moefx.transports.permute.permute`."""
    (tokens, top_k), width, x = row_id_map.shape, x.shape[1], _inner(x)
    if row_id_map.numel():
        block = min(2048, max(128, triton.next_power_of_2(width)))
        with torch.cuda.device_of(x):
            _permute[(tokens, triton.cdiv(width, block))](
                x,
                row_id_map,
                out,
                x if values is None else values,
                row_values,
                width,
                x.stride(0),
                out.stride(0),
                0 if values is None else values.stride(0),
                TOP_K=top_k,
                PADDED_K=triton.next_power_of_2(top_k),
                VALUED=values is not None,
                BLOCK=block,
                num_warps=4,
            )


def pack(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, send_map: Tensor, local: int, out: Any) -> None:
    """See :func:`moefx.transports.permute.pack`."""
    (tokens, top_k), width = topk_ids.shape, x.shape[1]
    if topk_ids.numel():
        block = min(2048, max(128, triton.next_power_of_2(width)))
        with torch.cuda.device_of(x):
            _pack[(tokens, triton.cdiv(width, block))](
                x,
                topk_ids,
                topk_weights,
                send_map,
                *out,
                width,
                out.hidden.stride(0),
                out.topk_weights.stride(0),
                out.topk_ids.stride(0),
                local,
                TOP_K=top_k,
                PADDED_K=triton.next_power_of_2(top_k),
                BLOCK=block,
                num_warps=4,
            )


# --- from rows to tokens ---------------------------------------------------------------------------------------------


@triton.jit
def _unpermute(
    rows,
    row_id_map,
    out,
    width,
    row_stride,
    out_stride,
    values,
    value_map,
    gathered,
    value_stride,
    value_column,
    gathered_stride,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK numbers of one result."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        at = tl.load(row_id_map + token * TOP_K + k)
        there = column < tl.where(at >= 0, width, 0)
        total += tl.load(rows + at.to(tl.int64) * row_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
    if GATHERED:
        if tl.program_id(1) == 0:
            ks = tl.arange(0, PADDED_K)
            wanted = tl.load(value_map + token * TOP_K + ks, mask=ks < TOP_K, other=-1).to(tl.int64)
            value = tl.load(values + wanted * value_stride + ks * value_column, mask=wanted >= 0, other=0.0)
            tl.store(gathered + token * gathered_stride + ks, value, mask=ks < TOP_K)


def _check(rows: Tensor) -> None:
    if accumulation_dtype(rows.dtype) is torch.float64:
        raise ValueError("these kernels accumulate in float32, the rows are float64: train on CUDA in float32 or bfloat16")


def unpermute(rows: Tensor, row_id_map: Tensor, out: Tensor, gather: Any) -> None:
    """See :func:`moefx.transports.permute.unpermute`."""
    _check(rows)
    (tokens, top_k), width, rows = row_id_map.shape, rows.shape[1], _inner(rows)
    if not tokens:
        return
    block = min(1024, max(128, triton.next_power_of_2(width)))
    if gather is None:
        extra = (rows, row_id_map, out, 0, 0, 0)
    else:
        values = gather.values
        steps = (values.stride(0), values.stride(1) if values.dim() == 2 else 0)
        extra = (values, gather.row_id_map, gather.out, *steps, gather.out.stride(0))
    with torch.cuda.device_of(rows):
        _unpermute[(tokens, triton.cdiv(width, block))](
            rows,
            row_id_map,
            out,
            width,
            rows.stride(0),
            out.stride(0),
            *extra,
            TOP_K=top_k,
            PADDED_K=triton.next_power_of_2(top_k),
            GATHERED=gather is not None,
            BLOCK=block,
            num_warps=4,
        )
