"""Raises lm_head and cross entropy to one ``moefx.linear_cross_entropy``, whose kernels never store all logits."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moefx import ops
from moefx.ir.graph import aten, emit, value
from moefx.rewriting.pattern import Match, f64
from moefx.rewriting.raise_ops import Raise


def _written(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    form: str,
    scale: float,
    divisor: float,
    softcap: float,
    bias: Tensor | None = None,
) -> Tensor:
    """The head as Transformers writes it: logits [B, S, V], scaled or capped, then in fp32, then [B * S, V]."""
    logits = F.linear(hidden, weight, bias)
    if form == "scaled":
        logits = logits * scale
    if form == "divided":
        logits = logits / divisor
    if form == "fp32 capped":  # Beam: in 16 bits a tanh is coarse where it saturates
        logits = logits.to(torch.float32)
    if form.endswith("capped"):
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.to(torch.float32)
    return F.cross_entropy(logits.view(-1, weight.shape[0]), labels, ignore_index=ignore_index, reduction=reduction)


def _build(graph: fx.Graph, before: fx.Node, match: Match) -> dict[str, Any]:
    hidden = match.bound["hidden"]
    flat = emit(before, aten.reshape.default, hidden, [-1, value(hidden).shape[-1]])
    divisor = match.bound.get("divisor")
    return {"hidden": flat} if divisor is None else {"hidden": flat, "scale": 1.0 / divisor}


def _needs(variant: Mapping[str, Any]) -> set[Any]:
    used = {"scaled": {aten.mul.Tensor}, "divided": {aten.div.Tensor}, "plain": set()}
    return used.get(variant["form"], {aten.tanh.default})


class LinearCrossEntropy(Raise):
    """Logits may be scaled, divided or capped; the loss is the mean or the sum over tokens."""

    def __init__(self) -> None:
        example = {
            "hidden": f64(2, 3, 8), "weight": f64(5, 8), "bias": f64(5),
            "labels": torch.zeros(6, dtype=torch.int64), "ignore_index": -7919,
            "scale": 0.0625, "divisor": 7.5, "softcap": 29.5,
        }  # fmt: skip
        forms = product((f64(5), None), ("mean", "sum"), ("plain", "scaled", "divided", "capped", "fp32 capped"))
        variants = [{"bias": bias, "reduction": reduction, "form": form} for bias, reduction, form in forms]
        super().__init__("linear_cross_entropy", ops.linear_cross_entropy, example, variants, _written, _build, _needs)
