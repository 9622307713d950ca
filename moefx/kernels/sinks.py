"""An attention sink joins a softmax that is done already: one more logit, without a value."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from .launch import KEPT, Launch, cdiv

#: Positions of a sequence that a program takes.
ROWS = 64


@triton.jit
def _join(out, lse, sinks, length, heads, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1)
    batch = tl.program_id(2)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = position < length
    at = lse + (batch * heads + head).to(tl.int64) * length + position
    keys = tl.load(at, mask=there, other=0.0)
    sink = tl.load(sinks + head).to(tl.float32)
    share = tl.sigmoid(keys - sink)
    row = (batch.to(tl.int64) * length + position) * heads + head
    mask = there[:, None] & (column < size)[None, :]
    value = tl.load(out + row[:, None] * size + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * size + column[None, :], (value * share[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(at, tl.maximum(keys, sink) + tl.log(1 + tl.exp(-tl.abs(keys - sink))), mask=there)


@functools.lru_cache(KEPT)
def _launch(length: int, heads: int, size: int) -> Launch:
    return Launch(_join, length, heads, size, ROWS=ROWS, BLOCK=triton.next_power_of_2(size), num_warps=4)


def join_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """In place: out [B, S, A, D] becomes what attention with the sinks [A] gives, lse [B, A, S] (fp32) the logarithm of the
    whole sum of exponentials. Both contiguous; rounded once."""
    batch, length, heads, size = out.shape
    if out.numel():
        _launch(length, heads, size)((cdiv(length, ROWS), heads, batch), out, lse, sinks.contiguous())
