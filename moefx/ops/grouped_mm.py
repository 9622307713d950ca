"""Grouped matrix products: rows that lie expert by expert, each group times its own matrix.

On CUDA in bf16 they run torch's grouped GEMM, with the offsets on the device; elsewhere, and for sizes that are no multiples
of 8, a loop over the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.ops.custom_op import refuse_second_derivatives


def _by_torch(x: Tensor, *sizes: int) -> bool:
    """Whether torch's grouped GEMM takes the rows x and matrices of these sizes: it wants whole 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0] > 0 and all(n % 8 == 0 for n in sizes)


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [R, a] times weight [E, a, b] group by group; group e is rows offsets[e-1] to offsets[e]. -> [R, b]."""
    if _by_torch(x, *weight.shape[1:]):
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
    if _by_torch(x, x.shape[1], y.shape[1]):
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


@torch.library.custom_op("moefx::grouped_mm_outer", mutates_args=())
def grouped_mm_outer(x: Tensor, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of weight [E, a, b], in weight's own memory order; x [R, a], grad [R, b]."""
    if _is_transposed(weight):
        return grouped_outer(grad, x, offsets).transpose(1, 2)
    return grouped_outer(x, grad, offsets)


def _is_transposed(weight: Tensor) -> bool:
    """Whether it is a transposed view of [E, b, a]."""
    return weight.stride(1) < weight.stride(2)


@grouped_mm_outer.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    e, a, b = weight.shape
    return x.new_empty(e, b, a).transpose(1, 2) if _is_transposed(weight) else x.new_empty(e, a, b)


def _save_mm(ctx, inputs, output) -> None:
    x, weight, offsets = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offsets)  # frozen: x is not kept


def _backward_mm(ctx, grad: Tensor):
    refuse_second_derivatives("grouped_mm")
    x, weight, offsets = ctx.saved_tensors
    grad, (of_x, of_weight) = grad.contiguous(), ctx.needs_input_grad[:2]
    to_x = torch.ops.moefx.grouped_mm(grad, weight.transpose(1, 2), offsets) if of_x else None
    to_weight = torch.ops.moefx.grouped_mm_outer(x, grad, weight, offsets) if of_weight else None
    return to_x, to_weight, None


grouped_mm.register_autograd(_backward_mm, setup_context=_save_mm)
