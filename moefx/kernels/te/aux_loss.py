"""Transformers' auxiliary load-balancing loss in three kernels: scores with choice, counts, and the sum over both."""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.kernels.te import extension


@torch.library.custom_op("moefx::te_load_balancing_loss", mutates_args=())
def te_load_balancing_loss(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``E * sum_e(rows of e / T * mean probability of e)``, fp32 scalar, of logits [T, E] fp32 (arXiv 2101.03961, eq. 4 to 6).

    Also, for the backward: the probabilities [T, E], rows of each expert [E] int64, and the kernel's factor [2].
    """
    tokens, experts = logits.shape
    te = extension()
    scores, chosen, probabilities = te.fused_score_for_moe_aux_loss_fwd(logits.contiguous(), top_k, "softmax", 0)
    rows = chosen.sum(0)
    # the kernel's factor is E * coeff / top_k / T / T, Transformers' has no top_k
    loss, factor = te.fused_moe_aux_loss_fwd(scores, rows, tokens, experts, tokens, experts, top_k, float(top_k))
    return loss, probabilities, rows, factor


@te_load_balancing_loss.register_fake
def _(logits, top_k):
    rows = logits.new_empty(logits.shape[1], dtype=torch.int64)
    return logits.new_empty(()), logits.new_empty(logits.shape), rows, logits.new_empty(2)


@torch.library.custom_op("moefx::te_load_balancing_loss_backward", mutates_args=())
def te_load_balancing_loss_backward(grad: Tensor, probabilities: Tensor, rows: Tensor, factor: Tensor, top_k: int) -> Tensor:
    """The gradient of the logits [T, E]."""
    te = extension()
    to_scores = te.fused_moe_aux_loss_bwd(factor, rows, *probabilities.shape, grad)
    to_logits = torch.empty_like(probabilities)
    te.fused_score_for_moe_aux_loss_bwd(probabilities, to_scores, to_logits, top_k, "softmax")
    return to_logits


@te_load_balancing_loss_backward.register_fake
def _(grad, probabilities, rows, factor, top_k):
    return torch.empty_like(probabilities)


def _save(ctx, inputs, output) -> None:
    ctx.top_k = inputs[1]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor, *_):
    return torch.ops.moefx.te_load_balancing_loss_backward(grad, *ctx.saved_tensors, ctx.top_k), None


te_load_balancing_loss.register_autograd(_backward, setup_context=_save)
