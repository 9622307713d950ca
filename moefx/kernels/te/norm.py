"""RMSNorm, and residual addition + RMSNorm whose backward adds the residual's gradient in the same kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moefx.kernels.te import extension, te_dtype


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


@torch.library.custom_op("moefx::te_rms_norm", mutates_args=())
def te_rms_norm(x: Tensor, weight: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """y [..., H], and 1 / rms [rows] fp32 for the backward; x [..., H], weight [H] of one dtype. ``centered``: 1 + weight."""
    if not x.numel():
        return x.new_empty(x.shape), x.new_empty(0, dtype=torch.float32)
    y, _, scale = extension().rmsnorm_fwd(_rows(x), weight.contiguous(), eps, None, None, te_dtype(x.dtype), 0, centered)
    return y.view(x.shape), scale


@te_rms_norm.register_fake
def _(x, weight, eps, centered):
    return x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


@torch.library.custom_op("moefx::te_rms_norm_backward", mutates_args=())
def te_rms_norm_backward(
    grad: Tensor, to_total: Tensor | None, x: Tensor, scale: Tensor, weight: Tensor, centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; ``to_total``, where given, is a second gradient of x and is added to the first."""
    if not x.numel():
        return x.new_empty(x.shape), torch.zeros_like(weight)
    te, w = extension(), weight.contiguous()
    if to_total is None:
        to_x, to_weight = te.rmsnorm_bwd(_rows(grad), _rows(x), scale, w, 0, centered)
    else:
        to_x, to_weight = te.rmsnorm_bwd_add(_rows(grad), _rows(x), _rows(to_total), scale, w, 0, centered)
    return to_x.view(x.shape), to_weight


@te_rms_norm_backward.register_fake
def _(grad, to_total, x, scale, weight, centered):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    x, weight, _, ctx.centered = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor):
    x, scale, weight = ctx.saved_tensors
    to_x, to_weight = torch.ops.moefx.te_rms_norm_backward(grad, None, x, scale, weight, ctx.centered)
    return to_x, to_weight, None, None


te_rms_norm.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("moefx::te_add_rms_norm", mutates_args=())
def te_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual, and 1 / rms [rows] fp32 for the backward; see :func:`te_rms_norm`."""
    total = (x + residual).contiguous()
    y, scale = torch.ops.moefx.te_rms_norm(total, weight, eps, centered)
    return y, total, scale


@te_add_rms_norm.register_fake
def _(x, residual, weight, eps, centered):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _save_add(ctx, inputs, output) -> None:
    ctx.centered = inputs[4]
    ctx.save_for_backward(output[1], output[2], inputs[2])
    ctx.mark_non_differentiable(output[2])


def _backward_add(ctx, grad: Tensor, to_total: Tensor, _: Tensor):
    total, scale, weight = ctx.saved_tensors
    to_x, to_weight = torch.ops.moefx.te_rms_norm_backward(grad, to_total, total, scale, weight, ctx.centered)
    return to_x, to_x, to_weight, None, None


te_add_rms_norm.register_autograd(_backward_add, setup_context=_save_add)
