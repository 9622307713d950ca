"""``moefx.norm_rotary`` as one opaque operation around :mod:`moefx.kernels.heads`, which is imported when it first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.ops.custom_op import opaque


@opaque("fused_norm_rotary")
def fused_norm_rotary(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float, layout: str
) -> Tensor:
    """x [B, S, A, D] -> [B, A, S, D], in memory still [B, S, A, D]."""
    from moefx.kernels import heads

    return heads.forward(x, weight, cos, sin, eps, offset, layout).transpose(1, 2)


@fused_norm_rotary.register_fake
def _(x, weight, cos, sin, eps, offset, layout):
    return x.new_empty(x.shape).transpose(1, 2)


@opaque("fused_norm_rotary_backward", once=True)
def fused_norm_rotary_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, offset: float, layout: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty if there is none) from that of the result [B, A, S, D]."""
    from moefx.kernels import heads

    to_x, to_weight = heads.backward(grad.transpose(1, 2), x, weight, cos, sin, eps, offset, layout)
    return to_x, x.new_empty(0) if to_weight is None else to_weight


@fused_norm_rotary_backward.register_fake
def _(grad, x, weight, cos, sin, eps, offset, layout):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx, inputs, _, output) -> None:
    *saved, ctx.eps, ctx.offset, ctx.layout = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx, grad: Tensor):
    x, weight, cos, sin = ctx.saved_tensors
    to_x, to_weight = fused_norm_rotary_backward(grad, x, weight, cos, sin, ctx.eps, ctx.offset, ctx.layout)
    return to_x, None if weight is None else to_weight, *[None] * 5


fused_norm_rotary.register_autograd(_backward, setup_context=_save)
