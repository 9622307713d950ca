"""The router in one kernel: scores, choice (with bias and groups), normalization and scale, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.kernels.te import extension

#: From this many experts a token on, Transformer Engine selects by radix, in no order (NVTE_RADIX_TOPK_THRESHOLD).
UNSORTED_FROM = 16


@torch.library.custom_op("moefx::te_route", mutates_args=())
def te_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    softmax_first: bool,
    groups: int,
    topk_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [T, K] fp32, index [T, K] int64, and the scores [T, E] fp32 for the backward; logits [T, E] fp32, bias [E] fp32.

    ``score`` softmax: of all logits, not renormalized, if ``softmax_first``, else of the chosen ones. sigmoid: of all logits,
    divided by their sum + 1e-20 if ``top_k`` > 1. ``groups``: 0, or the choice is limited to the ``topk_groups`` groups with
    the largest sums of their ``top_k // topk_groups`` best.
    """
    tokens, experts = logits.shape
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    if not tokens:
        return logits.new_empty(0, top_k), index, logits.new_empty(0, experts)
    probabilities, _, scores = extension().fused_topk_with_score_function_fwd(
        logits.contiguous(), top_k, softmax_first, groups or None, topk_groups or None, scale, score, bias, 0, index
    )
    return probabilities.gather(1, index), index, scores


@te_route.register_fake
def _(logits, bias, top_k, score, softmax_first, groups, topk_groups, scale):
    tokens, experts = logits.shape
    index = logits.new_empty(tokens, top_k, dtype=torch.int64)
    return logits.new_empty(tokens, top_k), index, logits.new_empty(tokens, experts)


@torch.library.custom_op("moefx::te_route_backward", mutates_args=())
def te_route_backward(grad: Tensor, index: Tensor, scores: Tensor, score: str, softmax_first: bool, scale: float) -> Tensor:
    """The gradient of the logits [T, E] from that of the weights [T, K]."""
    to_logits = torch.empty_like(scores)
    if scores.shape[0]:
        everywhere = torch.zeros_like(scores).scatter_(1, index, grad)
        extension().fused_topk_with_score_function_bwd(
            index, scores, everywhere, to_logits, index.shape[1], softmax_first, scale, score, True, 0
        )
    return to_logits


@te_route_backward.register_fake
def _(grad, index, scores, score, softmax_first, scale):
    return torch.empty_like(scores)


def _save(ctx, inputs, output) -> None:
    _, _, _, *ctx.options, _, _, scale = inputs
    ctx.options.append(scale)
    ctx.save_for_backward(output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, grad: Tensor, *_):
    index, scores = ctx.saved_tensors
    return torch.ops.moefx.te_route_backward(grad, index, scores, *ctx.options), *[None] * 7


te_route.register_autograd(_backward, setup_context=_save)
