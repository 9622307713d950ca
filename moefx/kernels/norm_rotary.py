"""``moefx.norm_rotary`` as one opaque operation around :mod:`moefx.kernels.heads`, which is imported when it first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.ops.custom_op import FIRST_INPUT, opaque


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
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    layout: str,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty if not asked) from that of the result [B, A, S, D]."""
    from moefx.kernels import heads

    to_x, to_weight = heads.backward(grad.transpose(1, 2), x, weight, cos, sin, eps, offset, layout, of_weight)
    return to_x, x.new_empty(0) if to_weight is None else to_weight


@fused_norm_rotary_backward.register_fake
def _(grad, x, weight, cos, sin, eps, offset, layout, of_weight):
    return x.new_empty(x.shape), torch.empty_like(weight) if of_weight else x.new_empty(0)


def _save(ctx, inputs, _, output) -> None:
    *saved, ctx.eps, ctx.offset, ctx.layout = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx, grad: Tensor):
    of_weight = ctx.needs_input_grad[FIRST_INPUT + 1]
    to_x, to_weight = fused_norm_rotary_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.offset, ctx.layout, of_weight)
    return to_x, to_weight if of_weight else None, *[None] * 5


fused_norm_rotary.register_autograd(_backward, setup_context=_save)
