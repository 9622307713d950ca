"""Grouped matrix products: rows that lie expert by expert, each group times its own matrix.

On CUDA in bf16 they run torch's grouped GEMM, with the offsets on the device; elsewhere a loop over the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.ops.custom_op import refuse_second_derivatives


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [R, a] times weight [E, a, b] group by group; group e is rows offsets[e-1] to offsets[e]. -> [R, b]."""
    if x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0]:
        return torch._grouped_mm(x, weight, offs=offsets)
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[e], out=out[start:end])
        start = end
    out[start:].zero_()
    return out


def grouped_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x [R, a], y [R, b] -> [E, a, b]: x.T @ y of each group; zeros for an empty one."""
    if x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0]:
        return torch._grouped_mm(x.transpose(0, 1), y, offs=offsets)
    out = x.new_empty(offsets.shape[0], x.shape[1], y.shape[1])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end].T, y[start:end], out=out[e])
        else:
            out[e].zero_()
        start = end
    return out


@torch.library.custom_op("moefx::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [R, a], rows expert by expert, times weight [E, a, b]; offsets [E] int32, the end of each group. -> [R, b].

    x and weight have one dtype. Rows after the last offset give zeros (CPU) or are undefined (CUDA, bf16).
    """
    return grouped_gemm(x, weight, offsets)


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("moefx::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [R, a] and weight [E, a, b], the latter in weight's own memory order."""
    to_x = grouped_gemm(grad, weight.transpose(1, 2), offsets)
    if weight.stride(1) < weight.stride(2):  # a transposed view of [E, b, a]: so its gradient lies the same way
        return to_x, grouped_outer(grad, x, offsets).transpose(1, 2)
    return to_x, grouped_outer(x, grad, offsets)


@grouped_mm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    e, a, b = weight.shape
    if weight.stride(1) < weight.stride(2):
        return torch.empty_like(x), x.new_empty(e, b, a).transpose(1, 2)
    return torch.empty_like(x), x.new_empty(e, a, b)


def _save_mm(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward_mm(ctx, grad: Tensor):
    refuse_second_derivatives("grouped_mm")
    x, weight, offsets = ctx.saved_tensors
    return (*torch.ops.moefx.grouped_mm_backward(grad.contiguous(), x, weight, offsets), None)


grouped_mm.register_autograd(_backward_mm, setup_context=_save_mm)
