"""Norm and rotation of query and key heads: a head is read once and written once, forward and backward."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv
from moefx.kernels.partial_sums import partial_sums

BLOCK_HEADS = 16  #: of one token that a program holds at a time
#: Numbers and warps of the backward's tile: 0.17 ms where half as many and four warps take 0.27 (H200, 16,384 tokens, 32 heads
#: of 128).
BACKWARD_TILE, BACKWARD_WARPS = 4096, 2
#: Programs of the backward: each adds up its share of the weight's gradient, in order, before all are added.
PROGRAMS = 1024


@triton.jit
def _columns(HALF: tl.constexpr, LAYOUT: tl.constexpr):
    """Where the two numbers of each rotated pair are read and written, and the columns of the tables that they meet."""
    i = tl.arange(0, HALF)
    if LAYOUT == "interleaved":
        return 2 * i, 2 * i + 1, i, i
    elif LAYOUT == "half":
        return i, i + HALF, i, i + HALF
    else:
        tl.static_assert(LAYOUT == "half_table")
        return i, i + HALF, i, i


@triton.jit
def _weights(weight, first, second, offset, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        a = tl.load(weight + first).to(tl.float32) + offset
        b = tl.load(weight + second).to(tl.float32) + offset
    else:
        a = tl.full(first.shape, 1.0, tl.float32)
        b = tl.full(second.shape, 1.0, tl.float32)
    return a, b


@triton.jit
def _tables(cos, sin, row, width, at_first, at_second):
    start = row.to(tl.int64) * width
    return (
        tl.load(cos + start + at_first).to(tl.float32),
        tl.load(cos + start + at_second).to(tl.float32),
        tl.load(sin + start + at_first).to(tl.float32),
        tl.load(sin + start + at_second).to(tl.float32),
    )


@triton.jit
def _forward(
    x,
    weight,
    cos,
    sin,
    out,
    x_batch,
    x_token,
    x_head,
    length,
    table_length,
    heads,
    eps,
    offset,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    LAYOUT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    first, second, at_first, at_second = _columns(HALF, LAYOUT)
    start = x + (token // length).to(tl.int64) * x_batch + (token % length).to(tl.int64) * x_token
    start += head.to(tl.int64)[:, None] * x_head
    there = (head < heads)[:, None]
    a = tl.load(start + first[None, :], mask=there, other=0.0).to(tl.float32)
    b = tl.load(start + second[None, :], mask=there, other=0.0).to(tl.float32)
    norm = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
    weight_a, weight_b = _weights(weight, first, second, offset, WEIGHTED)
    a, b = a * norm * weight_a[None, :], b * norm * weight_b[None, :]
    cos_a, cos_b, sin_a, sin_b = _tables(cos, sin, token % table_length, WIDTH, at_first, at_second)
    to = out + (token.to(tl.int64) * heads + head)[:, None] * (2 * HALF)
    i = tl.arange(0, HALF)[None, :]  # interleaved pairs are written as halves
    tl.store(to + i, (a * cos_a[None, :] - b * sin_a[None, :]).to(out.dtype.element_ty), mask=there)
    tl.store(to + i + HALF, (b * cos_b[None, :] + a * sin_b[None, :]).to(out.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    grad,
    x,
    weight,
    cos,
    sin,
    to_x,
    to_weight,
    g_batch,
    g_token,
    g_head,
    x_batch,
    x_token,
    x_head,
    tokens,
    length,
    table_length,
    heads,
    eps,
    offset,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    LAYOUT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HEADS: tl.constexpr,
    SUMS: tl.constexpr,
):
    first, second, at_first, at_second = _columns(HALF, LAYOUT)
    weight_a, weight_b = _weights(weight, first, second, offset, WEIGHTED)
    total_a, total_b = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    i = tl.arange(0, HALF)[None, :]
    for each in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.zeros((), tl.int64) + each
        cos_a, cos_b, sin_a, sin_b = _tables(cos, sin, token % table_length, WIDTH, at_first, at_second)
        batch, place = token // length, token % length
        for block in range(0, heads, HEADS):
            head = block + tl.arange(0, HEADS)
            there = (head < heads)[:, None]
            from_x = x + batch * x_batch + place * x_token + head.to(tl.int64)[:, None] * x_head
            from_grad = grad + batch * g_batch + place * g_token + head.to(tl.int64)[:, None] * g_head
            a = tl.load(from_x + first[None, :], mask=there, other=0.0).to(tl.float32)
            b = tl.load(from_x + second[None, :], mask=there, other=0.0).to(tl.float32)
            grad_a = tl.load(from_grad + i, mask=there, other=0.0).to(tl.float32)
            grad_b = tl.load(from_grad + i + HALF, mask=there, other=0.0).to(tl.float32)
            back_a = grad_a * cos_a[None, :] + grad_b * sin_b[None, :]
            back_b = grad_b * cos_b[None, :] - grad_a * sin_a[None, :]
            norm = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
            a, b = a * norm, b * norm
            if SUMS:
                total_a += tl.sum(back_a * a, axis=0)
                total_b += tl.sum(back_b * b, axis=0)
            back_a, back_b = back_a * weight_a[None, :], back_b * weight_b[None, :]
            mean = ((tl.sum(back_a * a, axis=1) + tl.sum(back_b * b, axis=1)) / (2 * HALF))[:, None]
            to = to_x + (token * heads + head)[:, None] * (2 * HALF)
            tl.store(to + first[None, :], ((back_a - a * mean) * norm).to(to_x.dtype.element_ty), mask=there)
            tl.store(to + second[None, :], ((back_b - b * mean) * norm).to(to_x.dtype.element_ty), mask=there)
    if SUMS:
        row = to_weight + tl.program_id(0) * (2 * HALF)
        tl.store(row + first, total_a)
        tl.store(row + second, total_b)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(
    size: int, heads: int, width: int, layout: str, weighted: bool, block: int = BLOCK_HEADS, warps: int = 4
) -> dict[str, object]:
    return {
        "WIDTH": width,
        "HALF": size // 2,
        "LAYOUT": layout,
        "WEIGHTED": weighted,
        "HEADS": min(block, triton.next_power_of_2(heads)),
        "num_warps": warps,
    }


def _table_length(table: torch.Size, tokens: int) -> int:
    """Rows of the tables as one list [B * S or S]: token t meets row t modulo this."""
    rows = table[0] * table[1]
    assert rows and tokens % rows == 0, f"tables of {rows} positions for {tokens} tokens"
    return rows


@functools.lru_cache(KEPT)
def _launch_forward(
    shape: torch.Size, strides: tuple[int, ...], table: torch.Size, eps: float, offset: float, layout: str, weighted: bool
) -> Launch:
    batch, length, heads, size = shape
    return Launch(
        _forward,
        *strides[:3],
        length,
        _table_length(table, batch * length),
        heads,
        eps,
        offset,
        **_constants(size, heads, table[2], layout, weighted),
    )


@functools.lru_cache(KEPT)
def _launch_backward(
    shape: torch.Size,
    grad_strides: tuple[int, ...],
    strides: tuple[int, ...],
    table: torch.Size,
    eps: float,
    offset: float,
    layout: str,
    weighted: bool,
    sums: bool,
) -> Launch:
    batch, length, heads, size = shape
    tokens = batch * length
    return Launch(
        _backward,
        *grad_strides[:3],
        *strides[:3],
        tokens,
        length,
        _table_length(table, tokens),
        heads,
        eps,
        offset,
        **_constants(size, heads, table[2], layout, weighted, min(32, BACKWARD_TILE // size), BACKWARD_WARPS),
        SUMS=sums,
    )


def forward(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float, layout: str) -> Tensor:
    """x [B, S, A, D] (any strides) -> [B, S, A, D], contiguous."""
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    x, cos, sin = _dense(x), cos.contiguous(), sin.contiguous()
    launch = _launch_forward(x.shape, x.stride(), cos.shape, eps, offset, layout, weight is not None)
    batch, length, heads, _ = x.shape
    grid = (batch * length, cdiv(heads, launch.constants["HEADS"]), 1)
    launch(grid, x, x if weight is None else weight, cos, sin, out)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    layout: str,
    of_weight: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, contiguous, and, if asked, of the weight, from grad [B, S, A, D] (any strides)."""
    to_x, sums = x.new_empty(x.shape), weight is not None and of_weight
    if not to_x.numel():
        return to_x, torch.zeros_like(weight) if weight is not None and sums else None
    grad, x, cos, sin = _dense(grad), _dense(x), cos.contiguous(), sin.contiguous()
    programs, weighted = min(x.shape[0] * x.shape[1], PROGRAMS), weight is not None
    parts = x.new_empty((programs, x.shape[3]) if sums else 0, dtype=torch.float32)
    launch = _launch_backward(x.shape, grad.stride(), x.stride(), cos.shape, eps, offset, layout, weighted, sums)
    launch((programs, 1, 1), grad, x, x if weight is None else weight, cos, sin, to_x, parts)
    return to_x, partial_sums(parts, weight.dtype) if weight is not None and sums else None
