"""``moefx.route`` as one opaque operation around :mod:`moefx.kernels.router`, which is imported when it first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.ops import route_body
from moefx.ops.custom_op import opaque


@opaque("fused_route")
def fused_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    topk_first: bool,
    fp32: bool,
    groups: int,
    topk_groups: int,
    group_score: str,
    zero_fill: bool,
    sorted: bool,
    gather: bool,
    renormalize: bool,
    eps: float,
    scale: float,
    cast: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of ``moefx.route``. A bias is for the choice only (``gather``), and has no gradient."""
    from moefx.kernels import router

    dtype = torch.float32 if score == "softmax" and fp32 and not cast else logits.dtype
    if groups == topk_groups:
        groups = topk_groups = 0
    return router.forward(
        logits,
        bias,
        top_k,
        dtype,
        score=score,
        topk_first=topk_first,
        groups=groups,
        topk_groups=topk_groups,
        group_score=group_score,
        zero_fill=zero_fill,
        renormalize=renormalize,
        eps=eps,
        scale=scale,
    )


@fused_route.register_fake
def _(
    logits,
    bias,
    top_k,
    score,
    topk_first,
    fp32,
    groups,
    topk_groups,
    group_score,
    zero_fill,
    sorted,
    gather,
    renormalize,
    eps,
    scale,
    cast,
):
    return route_body(
        logits,
        bias,
        top_k,
        score=score,
        topk_first=topk_first,
        fp32=fp32,
        sorted=sorted,
        gather=gather,
        renormalize=renormalize,
        eps=eps,
        scale=scale,
        cast=cast,
    )


@opaque("fused_route_backward", once=True)
def fused_route_backward(
    grad: Tensor, logits: Tensor, index: Tensor, score: str, topk_first: bool, renormalize: bool, eps: float, scale: float
) -> Tensor:
    """The gradient of the logits."""
    from moefx.kernels import router

    return router.backward(
        grad, logits, index, score=score, topk_first=topk_first, renormalize=renormalize, eps=eps, scale=scale
    )


@fused_route_backward.register_fake
def _(grad, logits, index, score, topk_first, renormalize, eps, scale):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, _, output) -> None:
    logits, _, _, score, topk_first, *_, renormalize, eps, scale, _ = inputs
    ctx.options = score, topk_first, renormalize, eps, scale
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor):
    return fused_route_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 15


fused_route.register_autograd(_backward, setup_context=_save)
