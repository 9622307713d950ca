"""Root mean square norms."""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.ops.registry import op


@op("rms_norm(Tensor x, Tensor? weight, float eps, *, bool cast_first=True, float offset=0.0) -> Tensor")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, cast_first: bool = True, offset: float = 0.0) -> Tensor:
    """Root mean square norm over the last dimension (arXiv 1910.07467), computed in fp32.

    x [..., H], weight [H] or None. ``cast_first``: the normalised value returns to x's dtype before the product with the
    weight (Llama, Qwen, Mixtral, DeepSeek); otherwise the product is taken in fp32 and then cast (GPT-OSS, Nemotron-H).
    ``offset`` is added to the weight in fp32 (1.0: the zero-centred weights of Gemma and Qwen3-Next).
    """
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype)
    if offset:
        return (h * (offset + weight.to(torch.float32))).to(x.dtype)
    return weight * h.to(x.dtype) if cast_first else (weight * h).to(x.dtype)


@op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, *, bool cast_first=True, float offset=0.0) "
    "-> (Tensor, Tensor)"
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, cast_first: bool = True, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The residual addition and the norm that reads it: ``(rms_norm(x + residual), x + residual)``."""
    total = x + residual
    return rms_norm(total, weight, eps, cast_first=cast_first, offset=offset), total
