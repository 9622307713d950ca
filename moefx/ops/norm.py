"""Root mean square norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefx.ops.registry import op
from moefx.ops.spec import schema, takes_spec


@dataclass(frozen=True)
class NormSpec:
    """How a root mean square norm casts and weights what it normalised."""

    #: The normalised value returns to x's dtype before the product with the weight (Llama, Qwen, Mixtral, DeepSeek);
    #: otherwise the product is taken in fp32 and then cast (GPT-OSS, Nemotron-H).
    cast_first: bool = True
    #: Added to the weight in fp32 (1.0: the zero-centred weights of Gemma and Qwen3-Next).
    offset: float = 0.0


def _normalize(x: Tensor, weight: Tensor | None, eps: float, spec: NormSpec) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype)
    if spec.offset:
        return (h * (spec.offset + weight.to(torch.float32))).to(x.dtype)
    return weight * h.to(x.dtype) if spec.cast_first else (weight * h).to(x.dtype)


@op(f"rms_norm(Tensor x, Tensor? weight, float eps, *, {schema(NormSpec)}) -> Tensor")
@takes_spec
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, spec: NormSpec) -> Tensor:
    """Root mean square norm over the last dimension (arXiv 1910.07467), computed in fp32.

    x [..., H], weight [H] or None; options: :class:`NormSpec`.
    """
    return _normalize(x, weight, eps, spec)


@op(f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, *, {schema(NormSpec)}) -> (Tensor, Tensor)")
@takes_spec
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """The residual addition and the norm that reads it: ``(rms_norm(x + residual), x + residual)``."""
    total = x + residual
    return _normalize(total, weight, eps, spec), total
