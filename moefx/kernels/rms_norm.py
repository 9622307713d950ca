"""``moefx.rms_norm`` and ``moefx.add_rms_norm`` as an opaque operation around :mod:`moefx.kernels.norm`.

A residual stream is read by a norm and by the next addition, and its gradient is the sum of theirs: one kernel makes both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.ops import NormSpec
from moefx.ops.custom_op import FIRST_INPUT, opaque, refuse_second_derivatives


def dtypes(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: NormSpec) -> tuple[torch.dtype, torch.dtype]:
    """Of the norm and of the sum, as the operation's body promotes them: under autocast a stream in float32 meets 16 bits."""
    total = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    multiplies_last = spec.cast_first and not spec.offset and weight is not None
    return torch.promote_types(total, weight.dtype) if multiplies_last else total, total  # type: ignore[union-attr]


@opaque("fused_rms_norm")
def fused_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, spec: NormSpec
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual [..., H], and the sum; without ``residual`` that of x, and nothing."""
    from moefx.kernels import norm

    return norm.forward(x, residual, weight, eps, spec, *dtypes(x, residual, weight, spec))


@fused_rms_norm.register_fake
def _(x, residual, weight, eps, spec):
    of_y, of_total = dtypes(x, residual, weight, spec)
    return x.new_empty(x.shape, dtype=of_y), x.new_empty(0 if residual is None else x.shape, dtype=of_total)


@opaque("fused_rms_norm_backward", once=True)
def fused_rms_norm_backward(
    grad: Tensor, to_total: Tensor | None, total: Tensor, weight: Tensor | None, eps: float, spec: NormSpec, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of ``total`` from that of its norm and its own (None: there is none); the weight's, empty if not asked."""
    from moefx.kernels import norm

    to_x, to_weight = norm.backward(grad, to_total, total, weight, eps, spec, of_weight)
    return to_x, total.new_empty(0) if to_weight is None else to_weight


@fused_rms_norm_backward.register_fake
def _(grad, to_total, total, weight, eps, spec, of_weight):
    return total.new_empty(total.shape), torch.empty_like(weight) if of_weight else total.new_empty(0)


def _save(ctx, inputs, _, output) -> None:
    x, residual, weight, ctx.eps, ctx.spec = inputs
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else output[1], weight)


def _backward(ctx, grad: Tensor | None, to_total: Tensor | None):
    total, weight = ctx.saved_tensors
    of_x, of_residual = ctx.dtypes
    of_weight, to_weight = ctx.needs_input_grad[FIRST_INPUT + 2], None
    if grad is None:
        to_total = to_total if of_residual else None
    else:
        to_total = to_total if of_residual else None
        to_total, to_weight = fused_rms_norm_backward(grad, to_total, total, weight, ctx.eps, ctx.spec, of_weight)
    if to_total is None:
        return (None,) * 5
    to_residual = None if of_residual is None else to_total.to(of_residual)
    return to_total.to(of_x), to_residual, to_weight if of_weight else None, None, None


fused_rms_norm.register_autograd(_backward, setup_context=_save)


class _Stream(torch.autograd.Function):
    """The norm of x, and x: whoever reads the second leaves its gradient to the norm's backward."""

    @staticmethod
    def forward(ctx, x, weight, eps, cast_first, offset):  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.cast_first, ctx.offset = eps, cast_first, offset
        return fused_rms_norm(x, None, weight, eps, NormSpec(cast_first, offset))[0], x.view_as(x)

    @staticmethod
    def backward(ctx, grad, to_x):  # type: ignore[override]
        refuse_second_derivatives("rms_norm")
        x, weight = ctx.saved_tensors
        spec, of_weight = NormSpec(ctx.cast_first, ctx.offset), ctx.needs_input_grad[1]
        to_x, to_weight = fused_rms_norm_backward(grad, to_x, x, weight, ctx.eps, spec, of_weight)
        return to_x, to_weight if of_weight else None, None, None, None


def normed_stream(x: Tensor, weight: Tensor | None, eps: float, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """x [..., H] -> its norm, and x itself."""
    return _Stream.apply(x, weight, eps, spec.cast_first, spec.offset)
