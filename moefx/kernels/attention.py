"""Causal flash attention with a sliding window, sinks and packed sequences.

By FlashAttention 4 (``flash_attention_4.py``), or by whoever is there without it: a short window and packed sequences have
kernels of moefx's own (``window_attention.py``); else torch's run: cuDNN's without a window, where SDPA would take them too,
otherwise flash attention's. An implementation that was registered with ``torch.nn.attention.activate_flash_attention_impl``
(FA3, FA4) gets all but packed sequences.

A sink is one more logit of the softmax, without a value. So the output is flash attention's times the share of the probability
that the keys have, sigmoid(lse - sink). And flash attention's backward, given that output and the log of the whole sum instead
of its own, computes exactly the gradients with sinks: it makes the probabilities from the scores and that sum, and needs
nothing else of the forward but ``sum(grad * out)``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from moefx.ops.custom_op import FIRST_INPUT, opaque

aten = torch.ops.aten

#: By head size, up to how many keys in a window moefx's kernels are faster than FlashAttention 2: on an H200 2.3 times with 128
#: keys of 64 numbers, 1.1 to 1.4 with the longest here.
SHORT = {64: 2048, 128: 1024, 256: 512}
#: Tokens of a call from which on FlashAttention 4 runs it. Its functions take 0.16 ms more of the host's time, forward and
#: backward, than torch's do: with 4,096 tokens the device waits for the host (H200, Qwen3-30B-A3B), with 16,384 it does not.
MANY_TOKENS = 8192
_recorded = False  #: a module's, not a context's: autograd's threads ask too


@contextmanager
def recorded() -> Iterator[None]:
    """Within, the host's time counts for nothing: what is called is recorded, or is what a recording will call."""
    global _recorded
    before, _recorded = _recorded, True
    try:
        yield
    finally:
        _recorded = before


@functools.cache
def _is_hopper_or_newer(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def another_is_registered() -> bool:
    """Has the user registered flash attention of his own with torch?"""
    return getattr(torch_attention, "current_flash_attention_impl", lambda: None)() is not None


def is_short(window: int | None, size: int) -> bool:
    """Are moefx's kernels the fastest for a window of so many keys, with heads of ``size`` numbers?"""
    longest = next((keys for most, keys in SHORT.items() if size <= most), 0)
    return window is not None and window <= longest


def _by_fa4(q: Tensor, v: Tensor, by: str) -> bool:
    """Whether FlashAttention 4 runs these [B, A, S, D], where a graph names ``by``.

    If it does, always where values have another head size than keys.
    """
    return by == "fa4" and (_recorded or q.shape[0] * q.shape[2] >= MANY_TOKENS or q.shape[3] != v.shape[3])


def _by_window(q: Tensor, k: Tensor, window: int | None, starts: Tensor | None) -> bool:
    """Whether moefx's own kernels run these [B, A, S, D]: they are faster, or the only ones that support packed sequences.

    All kernels here save the same log-sum-exp, so that a backward may run on another one than its forward.
    """
    if starts is not None:
        return True
    short = is_short(window, q.shape[3]) and window < q.shape[2] == k.shape[2]  # type: ignore[operator]
    return short and _is_hopper_or_newer(q.device) and not another_is_registered()


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> bool:
    """Whether cuDNN takes these [B, A, S, D]. torch's binding has no window, and its backward no fixed order of sums."""
    if (window is not None and window < q.shape[2]) or not _is_hopper_or_newer(q.device):
        return False
    if another_is_registered() or torch.are_deterministic_algorithms_enabled():
        return False
    given = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_cudnn_attention(given)


def _window(window: int | None) -> dict[str, int | None]:
    """``window`` counts the query itself; flash attention's left size does not."""
    return {"window_size_left": None if window is None else window - 1, "window_size_right": None if window is None else 0}


@opaque("flash_attention")
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    starts: Tensor | None,
    by: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention: the output [B, S, A, D], and the log-sum-exp [B, A, S] (fp32) of each query, the sink's logit included.

    q [B, A, S, D], k and v [B, A/n, S, D] in 16 bits, sinks [A], starts [B, S] (int32): the first key that each query attends
    to. ``by`` "fa4": by FlashAttention 4 where that is faster; it takes no starts, and its v may be [B, A/n, S, Dv].
    """
    if _by_fa4(q, v, by):
        from moefx.kernels import flash_attention_4

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, lse = flash_attention_4.forward(q, k, v, scale, window)
    elif _by_window(q, k, window, starts):
        from moefx.kernels import window_attention

        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        return window_attention.forward(q, k, v, sinks, scale, window or q.shape[1], starts)
    elif _by_cudnn(q, k, v, window):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
        out, lse = out.transpose(1, 2), lse.view(q.shape[:3])
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scale, **_window(window)
        )
    out, lse = out.contiguous(), lse.contiguous()
    if sinks is not None:
        from moefx.kernels.sinks import join_

        join_(out, lse, sinks)
    return out, lse


@flash_attention.register_fake
def _(q, k, v, sinks, scale, window, starts, by):
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]), q.new_empty(batch, heads, length, dtype=torch.float32)


@opaque("flash_attention_backward", once=True)
def flash_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    starts: Tensor | None,
    by: str,
    of_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out like them, and of sinks, empty if not asked."""
    by_q, by_k, by_v = (t.transpose(1, 2) for t in (q, k, v))
    delta = None
    if _by_fa4(q, v, by):
        from moefx.kernels import flash_attention_4

        found = flash_attention_4.backward(grad, by_q, by_k, by_v, out, lse, scale, window)
    elif _by_window(q, k, window, starts):
        from moefx.kernels import window_attention

        by_q, by_k, by_v = (t.contiguous() for t in (by_q, by_k, by_v))
        *found, delta = window_attention.backward(grad, by_q, by_k, by_v, out, lse, scale, window or q.shape[2], starts)
    else:
        found = _torchs_backward(grad, q, k, v, out, lse, scale, window)
    to_sinks = q.new_empty(0)
    if sinks is not None and of_sinks:
        from moefx.kernels import sinks as sinks_

        to_sinks = sinks_.gradient(sinks, lse, sinks_.delta(grad, out) if delta is None else delta)
    like_q, like_k, like_v = (_laid_out_like(t.transpose(1, 2), like) for t, like in zip(found, (q, k, v)))
    return like_q, like_k, like_v, to_sinks


def _torchs_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None
) -> list[Tensor]:
    """Gradients of q, k and v [B, A, S, D]: [B, S, A, D]."""
    lengths = q.shape[2], k.shape[2]
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    if _by_cudnn(q, k, v, window):
        # torch keeps the plans that cuDNN makes by the layouts of q, k and v alone, SDPA's too: a plan for an output that lies
        # otherwise than q would be used, silently, for the next one that lies as q does
        to_out, out = (_laid_out_like(t.transpose(1, 2), q) for t in (grad, out))
        found = aten._scaled_dot_product_cudnn_attention_backward(
            to_out, q, k, v, out, lse.unsqueeze(-1), *state, None, None, None, *lengths, 0.0, True, scale=scale
        )
        return [t.transpose(1, 2) for t in found]
    by_length = (t.transpose(1, 2) for t in (q, k, v))
    return aten._flash_attention_backward(
        grad, *by_length, out, lse, None, None, *lengths, 0.0, True, state, state[0], scale=scale, **_window(window)
    )


def _laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the strides that ``torch.empty_like(like)`` has."""
    promised = torch.empty_like(like)
    return t if t.stride() == promised.stride() else promised.copy_(t)


@flash_attention_backward.register_fake
def _(grad, q, k, v, out, lse, sinks, scale, window, starts, by, of_sinks):
    to_sinks = torch.empty_like(sinks) if of_sinks else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), to_sinks


def _save(ctx, inputs, _, output) -> None:
    q, k, v, sinks, ctx.scale, ctx.window, starts, ctx.by = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, starts)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor):
    q, k, v, sinks, out, lse, starts = ctx.saved_tensors
    of_sinks = ctx.needs_input_grad[FIRST_INPUT + 3]
    options = ctx.scale, ctx.window, starts, ctx.by, of_sinks
    *found, to_sinks = flash_attention_backward(grad.contiguous(), q, k, v, out, lse, sinks, *options)
    return *found, to_sinks if of_sinks else None, None, None, None, None


flash_attention.register_autograd(_backward, setup_context=_save)
