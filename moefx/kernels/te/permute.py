"""Rows of tokens sorted by expert, and back: Transformer Engine's permutation with an index map."""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.kernels.te import extension, te_dtype


@torch.library.custom_op("moefx::te_permute", mutates_args=())
def te_permute(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T*K, H], expert by expert, tokens in order within one, and where each (k, token) went [T*K] int32.

    x [T, H] whose rows are whole 16 bytes, index [T, K] int32.
    """
    if not x.shape[0]:
        return x.new_empty(0, x.shape[1]), index.new_empty(0)
    import transformer_engine.pytorch.permutation  # noqa: F401 - defines te_moe::permute_index_map, which keeps the workspace

    return torch.ops.te_moe.permute_index_map(x.contiguous(), index.contiguous(), index.numel(), x.shape[0])


@te_permute.register_fake
def _(x, index):
    rows = index.shape[0] * index.shape[1]
    return x.new_empty(rows, x.shape[1]), index.new_empty(rows)


@torch.library.custom_op("moefx::te_unpermute", mutates_args=())
def te_unpermute(rows: Tensor, where: Tensor, weights: Tensor) -> Tensor:
    """The reverse of :func:`te_permute`: each token's rows times its weights [T, K] fp32, added in fp32 -> [T, H]."""
    tokens, top_k = weights.shape
    if not tokens:
        return rows.new_empty(0, rows.shape[1])
    return extension().moe_unpermute_fwd(rows.contiguous(), te_dtype(rows.dtype), where, weights.contiguous(), tokens, top_k)


@te_unpermute.register_fake
def _(rows, where, weights):
    return rows.new_empty(weights.shape[0], rows.shape[1])


@torch.library.custom_op("moefx::te_sum_rows", mutates_args=())
def te_sum_rows(rows: Tensor, where: Tensor, top_k: int) -> Tensor:
    """The sum of each token's rows [T, H], added in fp32: the gradient of :func:`te_permute`."""
    tokens = where.shape[0] // top_k
    if not tokens:
        return rows.new_empty(0, rows.shape[1])
    return extension().moe_permute_bwd(rows.contiguous(), te_dtype(rows.dtype), where, torch.empty(0), tokens, top_k)


@te_sum_rows.register_fake
def _(rows, where, top_k):
    return rows.new_empty(where.shape[0] // top_k, rows.shape[1])


@torch.library.custom_op("moefx::te_unpermute_backward", mutates_args=())
def te_unpermute_backward(grad: Tensor, rows: Tensor, where: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [T*K, H] and of the weights [T, K]."""
    if not weights.shape[0]:
        return torch.zeros_like(rows), torch.zeros_like(weights)
    te = extension()
    return te.moe_unpermute_bwd(grad.contiguous(), rows.contiguous(), te_dtype(grad.dtype), where, weights.contiguous())


@te_unpermute_backward.register_fake
def _(grad, rows, where, weights):
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _save(ctx, inputs, output) -> None:
    ctx.top_k = inputs[1].shape[1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor):
    (where,) = ctx.saved_tensors
    return torch.ops.moefx.te_sum_rows(grad, where, ctx.top_k), None


te_permute.register_autograd(_backward, setup_context=_save)


def _save_unpermute(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward_unpermute(ctx, grad: Tensor):
    to_rows, to_weights = torch.ops.moefx.te_unpermute_backward(grad, *ctx.saved_tensors)
    return to_rows, None, to_weights


te_unpermute.register_autograd(_backward_unpermute, setup_context=_save_unpermute)
