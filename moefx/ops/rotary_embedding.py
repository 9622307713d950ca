"""Rotary position embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefx.ops.norm import NormSpec, rms_norm
from moefx.ops.registry import op
from moefx.ops.spec import schema, takes_spec


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """x [..., D'] rotated by tables that broadcast to it, in one of :data:`ROTARY_LAYOUTS` (see :func:`rotary`)."""
    if layout == "half":
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
    if layout == "half_table":  # the table holds each angle once
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    if layout == "pairs":
        h = x.to(torch.float32)
        turned = torch.stack((-h[..., 1::2], h[..., 0::2]), dim=-1).flatten(-2)
        return (h * cos + turned * sin).to(x.dtype)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


ROTARY_LAYOUTS = ("half", "half_table", "pairs", "interleaved")


@op("rotary_table(Tensor angles, str part) -> Tensor")
def rotary_table(angles: Tensor, part: str) -> Tensor:
    """The "cos" or the "sin" table [B or 1, S, D'] for the layout "pairs", of complex angles [B or 1, S, D'/2]."""
    return torch.view_as_real(angles)[..., 0 if part == "cos" else 1].repeat_interleave(2, dim=-1)


@op("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, *, str layout='half', int unsqueeze_dim=1) -> (Tensor, Tensor)")
def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "half", unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of q and k [B, heads, S, D'] by tables cos, sin [B or 1, S, D' or D'/2].

    ``layout``: "half" pairs dimension i with i + D'/2 and reads a table of D' angles (Llama), "half_table" the same with a
    table of D'/2 (GPT-OSS). "pairs" pairs 2i with 2i + 1, reads D' angles, each twice in a row, and computes in fp32 (Ernie,
    Cohere); "interleaved" pairs them too, reads D'/2 angles and writes halves (DeepSeek).
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return apply_rotary(q, cos, sin, layout), apply_rotary(k, cos, sin, layout)


@dataclass(frozen=True)
class NormRotarySpec(NormSpec):
    """The norm's options, and the layout of the rotation: one of :data:`ROTARY_LAYOUTS`."""

    layout: str = "half"


@op(f"norm_rotary(Tensor x, Tensor? weight, Tensor cos, Tensor sin, float eps, *, {schema(NormRotarySpec)}) -> Tensor")
@takes_spec
def norm_rotary(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *, spec: NormRotarySpec) -> Tensor:
    """The norm of each head and its rotation (QK-norm, arXiv 2302.05442): x [B, S, A, D] -> [B, A, S, D].

    weight [D] or None and ``eps`` as in :func:`rms_norm`; cos, sin [B or 1, S, D or D/2] and ``layout`` as in :func:`rotary`.
    The tables have no gradient. Options: :class:`NormRotarySpec`.
    """
    heads = rms_norm(x, weight, eps, cast_first=spec.cast_first, offset=spec.offset).transpose(1, 2)
    return apply_rotary(heads, cos.unsqueeze(1), sin.unsqueeze(1), spec.layout)
