"""Attention by cuDNN through Transformer Engine, and the question whether it would run fused."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moefx.errors import MoefxError


def _options(causal: bool, window: int | None, sinks: bool) -> dict[str, Any]:
    """How Transformer Engine names this attention."""
    return {
        "attn_mask_type": "causal" if causal else "no_mask",
        "window_size": (-1 if window is None else window - 1, 0) if causal else (-1, -1),
        "softmax_type": "learnable" if sinks else "vanilla",
        "bottom_right_diagonal": False,
    }


@functools.cache
def why_not_fused(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    groups: int,
    length: int,
    head_size: int,
    value_size: int,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: bool,
    deterministic: bool = False,
) -> str | None:
    """What Transformer Engine says against its fused attention for these sizes (its own backend selection), or None."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    asked = utils.AttentionParams(
        qkv_dtype=dtype,
        qkv_layout="bshd_bshd_bshd",
        batch_size=batch,
        num_heads=heads,
        num_gqa_groups=groups,
        max_seqlen_q=length,
        max_seqlen_kv=length,
        head_dim_qk=head_size,
        head_dim_v=value_size,
        softmax_scale=scale,
        core_attention_bias_requires_grad=False,
        deterministic=deterministic,
        is_training=True,
        **_options(causal, window, sinks),
    )
    with _listening(utils) as said:
        *_, (_, fused, _) = utils.get_attention_backend(asked)
    if fused:
        return None
    version = ".".join(map(str, utils.get_cudnn_version()))
    reasons = "; ".join(line for line in said if "FusedAttention" in line) or "it does not say why"
    return f"with cuDNN {version} Transformer Engine has no fused attention for this: {reasons}"


@contextlib.contextmanager
def _listening(utils: Any) -> Iterator[list[str]]:
    """Collects what the backend selection logs, which it does at debug level only."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler, level = logging.getLogger("DotProductAttention"), Collect(), utils.AttentionLogging._log_level
    propagate, others = logger.propagate, logger.handlers
    utils.AttentionLogging._log_level = logging.DEBUG
    logger.handlers, logger.propagate = [handler], False
    try:
        yield said
    finally:
        utils.AttentionLogging._log_level = level
        logger.handlers, logger.propagate = others, propagate
        logger.setLevel(level)


def _call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, causal: bool, window: int | None) -> Any:
    """The arguments that forward and backward share: positional, and by name."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    batch, length, heads, size = q.shape
    problem = why_not_fused(
        q.dtype,
        batch,
        heads,
        k.shape[2],
        length,
        size,
        v.shape[3],
        scale,
        causal,
        window,
        sinks is not None,
        torch.are_deterministic_algorithms_enabled(),
    )
    if problem:
        raise MoefxError(
            f"te attention was chosen for another length, for q {list(q.shape)} it cannot run: {problem}. Leave 'te' out of "
            "backends, or put a backend before it that has attention"
        )
    lengths = utils.get_full_cu_seqlens(batch, length, q.device)
    named = {"attn_scale": scale, "qkv_layout": "bshd_bshd_bshd", "o_format": "bshd"}
    named |= _options(causal, window, sinks is not None)
    return (length, length, lengths, lengths), FusedAttnBackend["F16_arbitrary_seqlen"], named


def _offset(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else sinks.detach().float().reshape(1, -1, 1, 1).contiguous()


@torch.library.custom_op("moefx::te_attention", mutates_args=())
def te_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, A, Dv]; for the backward log-sum-exp [B, A, S, 1] fp32 and a random state [2] int64 (unused: no dropout).

    q [B, S, A, D], k [B, S, A/n, D], v [B, S, A/n, Dv], contiguous, bf16 or fp16; sinks [A].
    """
    from transformer_engine.pytorch.cpp_extensions.fused_attn import fused_attn_fwd

    if not q.numel():
        return q.new_empty(*q.shape[:3], v.shape[3]), *_state(q)
    lengths, backend, named = _call(q, k, v, sinks, scale, causal, window)
    out, (statistics, random, *_) = fused_attn_fwd(
        True, *lengths, q, k, v, q.dtype, backend, softmax_offset=_offset(sinks), **named
    )
    return out, statistics, random


def _state(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(batch, heads, length, 1, dtype=torch.float32), q.new_empty(2, dtype=torch.int64)


@te_attention.register_fake
def _(q, k, v, sinks, scale, causal, window):
    return q.new_empty(*q.shape[:3], v.shape[3]), *_state(q)


@torch.library.custom_op("moefx::te_attention_backward", mutates_args=())
def te_attention_backward(
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    random: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of sinks (empty without)."""
    from transformer_engine.pytorch.cpp_extensions.fused_attn import fused_attn_bwd

    if not q.numel():
        nothing = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), nothing
    lengths, backend, named = _call(q, k, v, sinks, scale, causal, window)
    kept = [statistics, random] if sinks is None else [statistics, random, _offset(sinks)]
    to_q, to_k, to_v, *rest = fused_attn_bwd(
        *lengths,
        q,
        k,
        v,
        out,
        grad.contiguous(),
        q.dtype,
        kept,
        backend,
        do_format="bshd",
        dqkv_layout="bshd_bshd_bshd",
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **named,
    )
    to_sinks = q.new_empty(0) if sinks is None else rest[1].reshape(-1).to(sinks.dtype)
    return to_q, to_k, to_v, to_sinks


@te_attention_backward.register_fake
def _(grad, out, statistics, random, q, k, v, sinks, scale, causal, window):
    to_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), to_sinks


def _save(ctx, inputs, output) -> None:
    q, k, v, sinks, *ctx.options = inputs
    ctx.save_for_backward(*output, q, k, v, sinks)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor, *_):
    *kept, sinks = ctx.saved_tensors
    to_q, to_k, to_v, to_sinks = torch.ops.moefx.te_attention_backward(grad, *kept, sinks, *ctx.options)
    return to_q, to_k, to_v, None if sinks is None else to_sinks, None, None, None


te_attention.register_autograd(_backward, setup_context=_save)
