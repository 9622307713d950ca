"""An attention sink joins a softmax that is done already: one more logit, without a value. And what its gradient needs."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv

#: Positions of a sequence that a program takes.
ROWS = 64


@triton.jit
def _places(length, heads, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's head, and for its positions: offsets in [B, S, A, D] and their mask, offsets in [B, A, S] and theirs."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = position < length
    numbers = ((batch * length + position) * heads + head)[:, None] * size + column[None, :]
    return head, numbers, there[:, None] & (column < size)[None, :], (batch * heads + head) * length + position, there


@triton.jit
def _join(out, lse, sinks, length, heads, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    head, numbers, mask, single, there = _places(length, heads, size, ROWS, BLOCK)
    keys = tl.load(lse + single, mask=there, other=0.0)
    sink = tl.load(sinks + head).to(tl.float32)
    share = tl.sigmoid(keys - sink)
    value = tl.load(out + numbers, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + numbers, (value * share[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(lse + single, tl.maximum(keys, sink) + tl.log(1 + tl.exp(-tl.abs(keys - sink))), mask=there)


@triton.jit
def _dots(a, b, dots, length, heads, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    _, numbers, mask, single, there = _places(length, heads, size, ROWS, BLOCK)
    of_a = tl.load(a + numbers, mask=mask, other=0.0).to(tl.float32)
    of_b = tl.load(b + numbers, mask=mask, other=0.0).to(tl.float32)
    tl.store(dots + single, tl.sum(of_a * of_b, axis=1), mask=there)


@functools.lru_cache(KEPT)
def _launch(kernel: Any, length: int, heads: int, size: int) -> Launch:
    return Launch(kernel, length, heads, size, ROWS=ROWS, BLOCK=triton.next_power_of_2(size), num_warps=4)


def join_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Adds sinks [A] to attention without them, in place: to out [B, S, A, D] and to lse [B, A, S] (fp32), the log-sum-exp.

    Both are contiguous, and rounded once.
    """
    batch, length, heads, size = out.shape
    if out.numel():
        _launch(_join, length, heads, size)((cdiv(length, ROWS), heads, batch), out, lse, sinks.contiguous())


def delta(grad: Tensor, out: Tensor) -> Tensor:
    """sum(grad * out) of each query and head [B, A, S] (fp32), of two contiguous [B, S, A, D]."""
    batch, length, heads, size = out.shape
    dots = out.new_empty(batch, heads, length, dtype=torch.float32)
    if out.numel():
        _launch(_dots, length, heads, size)((cdiv(length, ROWS), heads, batch), grad, out, dots)
    return dots


@triton.jit
def _gradient(lse, delta, sinks, to_sinks, batch, length, heads, BLOCK: tl.constexpr):
    head = tl.program_id(0)
    sink = tl.load(sinks + head).to(tl.float32)
    taken = tl.zeros([BLOCK], tl.float32)
    for row in range(batch):
        start = (row * heads + head).to(tl.int64) * length
        for first in range(0, length, BLOCK):
            position = first + tl.arange(0, BLOCK)
            whole = tl.load(lse + start + position, mask=position < length, other=float("inf"))
            taken += tl.exp(sink - whole) * tl.load(delta + start + position, mask=position < length, other=0.0)
    tl.store(to_sinks + head, (-tl.sum(taken, axis=0)).to(to_sinks.dtype.element_ty))


@functools.lru_cache(KEPT)
def _launch_gradient(batch: int, length: int, heads: int) -> Launch:
    return Launch(_gradient, batch, length, heads, BLOCK=1024, num_warps=4)


def gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of sinks [A].

    ``delta`` [B, A, S] is sum(grad * out) of each query, lse what :func:`join_` gives. A sink has no value: its gradient is
    minus the sum of its probability times delta, in one fixed order.
    """
    to_sinks = torch.empty_like(sinks)
    batch, heads, length = lse.shape
    _launch_gradient(batch, length, heads)((heads, 1, 1), lse, delta, sinks.contiguous(), to_sinks)
    return to_sinks
