"""Cross entropy of rows of logits, whose gradient takes the logits' place: two passes over memory, the second mostly in L2."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns that one step reads. On an H200 with 151,936 columns: 8,192 with 16 warps is the fastest of 2,048 to 32,768.
BLOCK = 8192
#: Columns side by side that a thread reads at once, 16 bytes of 16-bit logits, and that share a running maximum: to correct a
#: sum for a new maximum takes an exponential of its own.
TOGETHER = 8

#: Where running maxima begin, a number: from -inf a thread that has seen nothing else would compute -inf - -inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _loss_logits(pointer, mask, scale, softcap, CAPPED: tl.constexpr):
    """The logits that the loss is of (-inf outside of ``mask``) and their derivative by those in memory."""
    x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32) * scale
    slope = tl.where(mask, scale, 0.0)
    if CAPPED:
        bent = 2 / (1 + tl.exp(-2 * x / softcap)) - 1  # tanh
        x = softcap * bent
        slope = scale * (1 - bent * bent)
    return tl.where(mask, x, float("-inf")), slope


@triton.jit
def _row(
    logits,
    at,
    share,
    losses,
    columns,
    stride,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """One program a row: running maximum and sum of exponentials (online softmax, arXiv 1805.02867), then the gradient."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    factor = tl.load(share + row)
    target = tl.load(at + row)
    here = tl.arange(0, BLOCK // TOGETHER)[:, None] * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    top = tl.full((BLOCK // TOGETHER,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK // TOGETHER,), tl.float32)
    for first in range(0, columns, BLOCK):
        x, _ = _loss_logits(start + first + here, first + here < columns, scale, softcap, CAPPED)
        new = tl.maximum(top, tl.max(x, axis=1))  # whether or not it passes NaN on, the sum does
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), axis=1)
        top = new
    highest = tl.max(top, axis=0)
    norm = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    chosen, _ = _loss_logits(start + target, target >= 0, scale, softcap, CAPPED)
    tl.store(losses + row, norm - chosen)
    tl.debug_barrier()  # all threads have read the target's logit before one of them overwrites it
    for first in range(0, columns, BLOCK):
        mask = first + here < columns
        x, slope = _loss_logits(start + first + here, mask, scale, softcap, CAPPED)
        gradient = (tl.exp(x - norm) - tl.where(first + here == target, 1.0, 0.0)) * slope * factor
        tl.store(start + first + here, gradient.to(logits.dtype.element_ty), mask=mask)


def cross_entropy_(logits: Tensor, at: Tensor, share: Tensor, scale: float = 1.0, softcap: float = 0.0) -> Tensor:
    """The losses [r] (fp32) of logits [r, V] at columns ``at`` [r] (int64); the logits become the gradient times ``share`` [r].

    The loss is of the logits times ``scale``, capped by ``softcap`` unless it is 0, as ``moefx.linear_cross_entropy`` says.

    Rows are contiguous. Deterministic: one program a row, no atomics.
    """
    if logits.stride(1) != 1:
        raise ValueError(f"logits have stride {logits.stride(1)} along a row, cross_entropy_ needs 1: make them contiguous")
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
            _row[(logits.shape[0],)](
                logits,
                at,
                share,
                losses,
                logits.shape[1],
                logits.stride(0),
                scale,
                softcap,
                CAPPED=softcap != 0,
                BLOCK=BLOCK,
                TOGETHER=TOGETHER,
                num_warps=16,
            )
    return losses
