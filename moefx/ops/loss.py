"""Losses: the language modelling head with its cross entropy, and the load balancing loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops.registry import op
from moefx.ops.spec import schema, takes_spec


@dataclass(frozen=True)
class CrossEntropySpec:
    """Which labels count, and what happens to the logits before the softmax."""

    #: A label that does not count.
    ignore_index: int = -100
    #: "mean" divides by the labels that count (NaN if there are none, as torch), "sum" does not divide.
    reduction: str = "mean"
    #: What logits are multiplied by.
    scale: float = 1.0
    #: c: logits then become ``c * tanh(logits / c)`` (Gemma 2, arXiv 2408.00118, section 2); 0: they stay.
    softcap: float = 0.0


@op("load_balancing_loss(Tensor logits, int top_k) -> Tensor")
def load_balancing_loss(logits: Tensor, top_k: int) -> Tensor:
    """``E * sum_e(rows of e / T * mean probability of e)`` of a softmax router's logits [T, E] (arXiv 2101.03961, eq. 4 to 6).

    fp32 scalar; the probabilities are computed in fp32, the rows are those of their ``top_k`` greatest.
    """
    probability = torch.softmax(logits.to(torch.float32), dim=-1)
    chosen = torch.zeros_like(probability).scatter(1, torch.topk(probability, top_k, dim=-1).indices, 1.0)
    return (chosen.mean(0) * probability.mean(0)).sum() * logits.shape[1]


@op(f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, *, {schema(CrossEntropySpec)}) -> Tensor")
@takes_spec
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, spec: CrossEntropySpec
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against labels: hidden [T, H], weight [V, H], labels [T]; fp32 scalar.

    The labels are already shifted. Options: :class:`CrossEntropySpec`.
    """
    logits = F.linear(hidden, weight, bias).to(torch.float32)
    logits = logits * spec.scale if spec.scale != 1.0 else logits
    logits = torch.tanh(logits / spec.softcap) * spec.softcap if spec.softcap else logits
    return F.cross_entropy(logits, labels, ignore_index=spec.ignore_index, reduction=spec.reduction)
