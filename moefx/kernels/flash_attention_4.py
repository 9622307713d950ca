"""FlashAttention 4 (flash-attn-4, CuTe DSL): its causal forward and backward.

These two functions are what ``torch.nn.attention.activate_flash_attention_impl("FA4")`` calls too. torch 2.11 takes two results
of the forward, which has five by now.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _library() -> Any:
    # kernels are compiled once on a machine, and not in each process: 3 to 8 s for a head size
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    from flash_attn.cute import interface

    return interface


def _options(scale: float, window: int | None) -> dict[str, Any]:
    return {"softmax_scale": scale, "causal": True, "window_size_left": None if window is None else window - 1}


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """The output [B, S, A, Dv], and the log-sum-exp [B, A, S] (fp32) of each query.

    q [B, S, A, D], k [B, S, A/n, D], v [B, S, A/n, Dv] in 16 bits. ``window`` counts the query itself.
    """
    out, lse, *_ = _library()._flash_attn_fwd(q, k, v, return_lse=True, **_options(scale, window))
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None
) -> list[Tensor]:
    """Gradients of q, k and v. Their sums have a fixed order where torch is asked for deterministic algorithms."""
    fixed = torch.are_deterministic_algorithms_enabled()
    return _library()._flash_attn_bwd(q, k, v, out, grad, lse, deterministic=fixed, **_options(scale, window))[:3]
