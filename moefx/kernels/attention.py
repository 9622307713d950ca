"""Causal flash attention with a sliding window and sinks, on the flash kernels that torch brings (or that an implementation
registered with ``torch.nn.attention.activate_flash_attention_impl`` gives instead: FA3, FA4).

A sink is one more logit of the softmax, without a value. So the output is flash attention's times the share of the probability
that the keys have, sigmoid(lse - sink). And flash attention's backward, given that output and the log of the whole sum instead
of its own, computes exactly the gradients with sinks: it makes the probabilities from the scores and that sum, and needs
nothing else of the forward but ``sum(grad * out)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..opaque import opaque

aten = torch.ops.aten


def _window(window: int | None) -> dict[str, int | None]:
    """``window`` counts the query itself; flash attention's left size does not."""
    return {"window_size_left": None if window is None else window - 1, "window_size_right": None if window is None else 0}


@opaque("flash_attention")
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """q [B, A, S, D], k and v [B, A/n, S, D] in 16 bits, sinks [A] -> out [B, S, A, D] and the logarithm [B, A, S] (fp32) of
    each query's sum of exponentials, the sink's included."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scale, **_window(window)
    )
    if sinks is not None:
        sink = sinks.float()[:, None]
        out *= torch.sigmoid(lse - sink).transpose(1, 2).unsqueeze(-1)
        lse = torch.logaddexp(lse, sink)
    return out.contiguous(), lse.contiguous()


@flash_attention.register_fake
def _(q, k, v, sinks, scale, window):
    batch, heads, length, size = q.shape
    return q.new_empty(batch, length, heads, size), q.new_empty(batch, heads, length, dtype=torch.float32)


@opaque("flash_attention_backward", once=True)
def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out like them."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    found = aten._flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, True, state, state[0], scale=scale, **_window(window)
    )
    like_q, like_k, like_v = (_laid_out_like(t.transpose(1, 2), like.transpose(1, 2)) for t, like in zip(found, (q, k, v)))
    return like_q, like_k, like_v


def _laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the strides that ``torch.empty_like`` gives: what the fake promised."""
    promised = torch.empty_like(like)
    return t if t.stride() == promised.stride() else promised.copy_(t)


@flash_attention_backward.register_fake
def _(grad, q, k, v, out, lse, scale, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, _, output) -> None:
    q, k, v, sinks, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor):
    q, k, v, sinks, out, lse = ctx.saved_tensors
    grad = grad.contiguous()
    found = flash_attention_backward(grad, q, k, v, out, lse, ctx.scale, ctx.window)
    if sinks is None:
        return *found, None, None, None
    # a sink has no value, so what it takes it takes from sum(grad * out)
    taken = torch.exp(sinks.float()[:, None] - lse) * (grad.float() * out.float()).sum(-1).transpose(1, 2)
    return *found, -taken.sum((0, 2)).to(sinks.dtype), None, None


flash_attention.register_autograd(_backward, setup_context=_save)
