"""Linear layers with a dtype or a layout of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops.grouped_mm import grouped_mm
from moefx.ops.registry import op


@op("linear_to_fp32(Tensor x, Tensor weight) -> Tensor")
def linear_to_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., H] in 16 bits times weight [E, H], in 16 bits or fp32 -> [..., E] in fp32."""
    return F.linear(x.float(), weight.float())


@op("grouped_linear(Tensor permuted_tokens, Tensor weight, Tensor tokens_per_expert) -> Tensor")
def grouped_linear(permuted_tokens: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """permuted_tokens [R, a], sorted by expert, times their expert's weight [E, b, a] -> [R, b] in the weight's dtype."""
    return grouped_mm(permuted_tokens.to(weight.dtype), weight.transpose(1, 2), tokens_per_expert.cumsum(0).to(torch.int32))
