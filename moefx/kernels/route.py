"""``moefx.route`` as one opaque operation around :mod:`moefx.kernels.router`, which is imported when it first runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moefx.ops import RouterSpec, route_body
from moefx.ops.custom_op import opaque


@opaque("fused_route")
def fused_route(logits: Tensor, bias: Tensor | None, top_k: int, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Arguments and results of ``moefx.route``. A bias is for the choice only (``gather``), and has no gradient."""
    from moefx.kernels import router

    dtype = torch.float32 if spec.score == "softmax" and spec.fp32 and not spec.cast else logits.dtype
    return router.forward(logits, bias, top_k, dtype, spec)


@fused_route.register_fake
def _(logits, bias, top_k, spec):
    return route_body(logits, bias, top_k, None, replace(spec, groups=0, topk_groups=0))


@opaque("fused_route_backward", once=True)
def fused_route_backward(grad: Tensor, logits: Tensor, topk_ids: Tensor, spec: RouterSpec) -> Tensor:
    """The gradient of the logits."""
    from moefx.kernels import router

    return router.backward(grad, logits, topk_ids, spec)


@fused_route_backward.register_fake
def _(grad, logits, topk_ids, spec):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, _, output) -> None:
    logits, _, _, ctx.spec = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor):
    return fused_route_backward(grad, *ctx.saved_tensors, ctx.spec), None, None, None


fused_route.register_autograd(_backward, setup_context=_save)
