"""The Triton kernels of :mod:`moefx.transports.permute`: a row is read once, sums are in float32, without atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.counting_sort import build_row_id_map
from moefx.transports import accumulation_dtype

__all__ = ["build_row_id_map", "pack", "permute", "unpermute"]


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
