"""Causal attention with short windows and packed sequences, forward and backward.

A query attends to the last ``window`` keys, its own included, but to none before its sequence begins. Flash attention's recipe
(arXiv 2205.14135, 2307.08691) with what a short window allows. A block of queries meets two or three blocks of keys. In the
backward a program takes a block of keys and the few queries that see it, of all heads that share the keys: their gradients are
summed in registers, in one order, where torch's kernel writes them for each head and adds them up later. A sink is where the
softmax begins: a logit without a value.

All tensors are contiguous: q, out and their gradients [B, S, A, D], k, v and theirs [B, S, C, D] where A / C heads share one
of keys, sinks [A], lse and delta [B, A, S] (fp32). Of packed sequences ``starts`` and ``ends`` [B, S] (int32), ascending in a
row, are the first and the last position of each position's sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv

_LOG2E = tl.constexpr(math.log2(math.e))
#: By head size: rows of queries and of keys in a block, warps and stages, of the forward, the queries' gradient and the keys'.
#: The fastest of 36 on an H200, 64 heads of 64 (8 of keys), 32 of 128 (8), 16 of 256 (4), windows of 128 to 2,048.
_TILES = {
    64: {"forward": (64, 32, 4, 3), "to_queries": (64, 32, 4, 3), "to_keys": (64, 64, 4, 3)},
    128: {"forward": (64, 32, 4, 3), "to_queries": (64, 32, 4, 2), "to_keys": (64, 64, 4, 2)},
    256: {"forward": (128, 64, 8, 2), "to_queries": (128, 32, 8, 2), "to_keys": (64, 32, 4, 2)},
}


@triton.jit
def _rows(at, rows, length, row_size, size, D: tl.constexpr):
    """Rows of one head [n, D]: ``at`` its first, ``row_size`` numbers from one to the next; zeros outside."""
    lanes = tl.arange(0, D)
    mask = (rows < length)[:, None] & (lanes < size)[None, :]
    return tl.load(at + rows[:, None].to(tl.int64) * row_size + lanes[None, :], mask=mask, other=0.0)


@triton.jit
def _put(at, rows, length, row_size, size, value, D: tl.constexpr):
    lanes = tl.arange(0, D)
    mask = (rows < length)[:, None] & (lanes < size)[None, :]
    tl.store(at + rows[:, None].to(tl.int64) * row_size + lanes[None, :], value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _begin(batch, head, length, heads, shared, size):
    """Where the rows of a head's queries begin, and those of its keys."""
    return batch * length * heads * size + head * size, batch * length * shared * size + head // (heads // shared) * size


@triton.jit
def _first_keys(rows, starts, batch, length, window, PACKED: tl.constexpr):
    """The first key that each query sees [n]."""
    first = tl.maximum(rows - window + 1, 0)
    if PACKED:
        first = tl.maximum(first, tl.load(starts + batch * length + rows, mask=rows < length, other=0))
    return first


@triton.jit
def _meet(query, rows, seen, k, v, of_keys, start, length, row_size, size, scale2, D: tl.constexpr, KEYS: tl.constexpr):
    """The block of keys from ``start`` on: keys and values [m, D], and the base-2 logits [n, m] of the queries ``rows``.

    Logits are -inf before the first key that a query attends to (``seen``), and after its own.
    """
    columns = start + tl.arange(0, KEYS)
    key = _rows(k + of_keys, columns, length, row_size, size, D)
    value = _rows(v + of_keys, columns, length, row_size, size, D)
    there = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= seen[:, None])
    score = tl.where(there, tl.dot(query, tl.trans(key)) * scale2, float("-inf"))
    return key, value, score


@triton.jit
def _forward(
    q,
    k,
    v,
    sinks,
    starts,
    out,
    lse,
    length,
    heads,
    shared,
    size,
    window,
    scale2,
    SINKS: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    of_queries, of_keys = _begin(batch, head, length, heads, shared, size)
    query = _rows(q + of_queries, rows, length, heads * size, size, D)
    if SINKS:
        top = tl.zeros([ROWS], tl.float32) + tl.load(sinks + head).to(tl.float32) * _LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    sum_ = tl.zeros([ROWS, D], tl.float32)
    seen = _first_keys(rows, starts, batch, length, window, PACKED)
    begin = _first_keys(first, starts, batch, length, window, PACKED) // KEYS * KEYS
    for start in range(begin, tl.minimum(first + ROWS, length), KEYS):
        _, value, score = _meet(query, rows, seen, k, v, of_keys, start, length, shared * size, size, scale2, D, KEYS)
        higher = tl.maximum(top, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        bent = tl.exp2(top - higher)
        total = total * bent + tl.sum(share, 1)
        sum_ = tl.dot(share.to(value.dtype), value, sum_ * bent[:, None])
        top = higher
    _put(out + of_queries, rows, length, heads * size, size, sum_ / total[:, None], D)
    tl.store(lse + (batch * heads + head) * length + rows, (top + tl.log2(total)) / _LOG2E, mask=rows < length)


@triton.jit
def _to_queries(
    grad,
    q,
    k,
    v,
    out,
    lse,
    starts,
    delta,
    to_q,
    length,
    heads,
    shared,
    size,
    window,
    scale2,
    scale,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Also delta, sum(grad * out) of each query, for :func:`_to_keys`."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    of_queries, of_keys = _begin(batch, head, length, heads, shared, size)
    of_rows = (batch * heads + head) * length + rows
    query = _rows(q + of_queries, rows, length, heads * size, size, D)
    to_out = _rows(grad + of_queries, rows, length, heads * size, size, D)
    done = _rows(out + of_queries, rows, length, heads * size, size, D)
    below = tl.sum(to_out.to(tl.float32) * done.to(tl.float32), 1)
    tl.store(delta + of_rows, below, mask=rows < length)
    whole = tl.load(lse + of_rows, mask=rows < length, other=0.0) * _LOG2E
    sum_ = tl.zeros([ROWS, D], tl.float32)
    seen = _first_keys(rows, starts, batch, length, window, PACKED)
    begin = _first_keys(first, starts, batch, length, window, PACKED) // KEYS * KEYS
    for start in range(begin, tl.minimum(first + ROWS, length), KEYS):
        key, value, score = _meet(query, rows, seen, k, v, of_keys, start, length, shared * size, size, scale2, D, KEYS)
        share = tl.exp2(score - whole[:, None])
        to_score = share * (tl.dot(to_out, tl.trans(value)) - below[:, None])
        sum_ = tl.dot(to_score.to(key.dtype), key, sum_)
    _put(to_q + of_queries, rows, length, heads * size, size, sum_ * scale, D)


@triton.jit
def _last_queries(columns, ends, batch, length, window, PACKED: tl.constexpr):
    """The last query that sees each key [m]."""
    last = tl.minimum(columns + window, length) - 1
    if PACKED:
        last = tl.minimum(last, tl.load(ends + batch * length + columns, mask=columns < length, other=0))
    return last


@triton.jit
def _to_keys(
    grad,
    q,
    k,
    v,
    lse,
    delta,
    ends,
    to_k,
    to_v,
    length,
    heads,
    shared,
    size,
    window,
    scale2,
    scale,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    first = tl.program_id(0) * KEYS
    group = heads // shared
    batch = tl.program_id(2).to(tl.int64)
    columns = first + tl.arange(0, KEYS)
    _, of_keys = _begin(batch, tl.program_id(1) * group, length, heads, shared, size)
    key = _rows(k + of_keys, columns, length, shared * size, size, D)
    value = _rows(v + of_keys, columns, length, shared * size, size, D)
    sum_k = tl.zeros([KEYS, D], tl.float32)
    sum_v = tl.zeros([KEYS, D], tl.float32)
    last = _last_queries(columns, ends, batch, length, window, PACKED)
    blocks = tl.cdiv(tl.max(last, 0) + 1 - first, ROWS)
    for i in range(group * blocks):
        head = tl.program_id(1) * group + i // blocks
        rows = first + i % blocks * ROWS + tl.arange(0, ROWS)
        of_queries, _ = _begin(batch, head, length, heads, shared, size)
        of_rows = (batch * heads + head) * length + rows
        query = _rows(q + of_queries, rows, length, heads * size, size, D)
        to_out = _rows(grad + of_queries, rows, length, heads * size, size, D)
        whole = tl.load(lse + of_rows, mask=rows < length, other=0.0) * _LOG2E
        below = tl.load(delta + of_rows, mask=rows < length, other=0.0)
        seen = (rows[None, :] >= columns[:, None]) & (rows[None, :] <= last[:, None])
        score = tl.where(seen, tl.dot(key, tl.trans(query)) * scale2, float("-inf"))
        share = tl.exp2(score - whole[None, :])
        sum_v = tl.dot(share.to(to_out.dtype), to_out, sum_v)
        to_score = share * (tl.dot(value, tl.trans(to_out)) - below[None, :])
        sum_k = tl.dot(to_score.to(query.dtype), query, sum_k)
    _put(to_k + of_keys, columns, length, shared * size, size, sum_k * scale, D)
    _put(to_v + of_keys, columns, length, shared * size, size, sum_v, D)


_KERNELS = {"forward": _forward, "to_queries": _to_queries, "to_keys": _to_keys}


@functools.lru_cache(KEPT)
def _launch(
    kernel: str,
    batch: int,
    length: int,
    heads: int,
    shared: int,
    size: int,
    window: int,
    scale: float,
    packed: bool,
    sinks: bool | None = None,
) -> Callable[..., None]:
    """``kernel`` over its grid; to be called with tensors."""
    rows, keys, warps, stages = _TILES[next(n for n in _TILES if size <= n)][kernel]
    block = max(16, triton.next_power_of_2(size))
    constants = {"PACKED": packed, "ROWS": rows, "KEYS": keys, "D": block, "num_warps": warps, "num_stages": stages}
    numbers: list[int | float] = [length, heads, shared, size, window, scale * _LOG2E.value]
    if sinks is None:
        numbers.append(scale)
    else:
        constants["SINKS"] = sinks
    grid = (cdiv(length, keys), shared, batch) if kernel == "to_keys" else (cdiv(length, rows), heads, batch)
    return functools.partial(Launch(_KERNELS[kernel], *numbers, **constants), grid)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, S, A, D], and lse [B, A, S]: the logarithm of each query's sum of exponentials, its sink's included."""
    batch, length, heads, size = q.shape
    out, lse = torch.empty_like(q), q.new_empty(batch, heads, length, dtype=torch.float32)
    if out.numel():
        run = _launch("forward", *q.shape[:3], k.shape[2], size, window, scale, starts is not None, sinks is not None)
        run(q, k, v, q if sinks is None else sinks.contiguous(), q if starts is None else starts.contiguous(), out, lse)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of out, and sum(grad * out) of each query [B, A, S]."""
    to_q, to_k, to_v, delta = (torch.empty_like(t) for t in (q, k, v, lse))
    if out.numel():
        begin, end = q, q
        if starts is not None:
            begin = starts.contiguous()
            end = torch.searchsorted(begin, begin, right=True, out_int32=True) - 1
        sizes = (*q.shape[:3], k.shape[2], q.shape[3], window, scale, starts is not None)
        _launch("to_queries", *sizes)(grad, q, k, v, out, lse, begin, delta, to_q)
        _launch("to_keys", *sizes)(grad, q, k, v, lse, delta, end, to_k, to_v)
    return to_q, to_k, to_v, delta
