"""Raises lm_head + cross entropy to one ``moefx.linear_cross_entropy``, whose kernels never hold all logits."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import fx

from moefx import ops
from moefx.graph import aten, insert, value
from moefx.match import Match, f64
from moefx.raising import Raise


def _written(hidden, weight, labels, ignore_index, reduction, bias=None):
    """The head as Transformers writes it: logits [B, S, V], then fp32, then one row a token."""
    logits = F.linear(hidden, weight, bias).to(torch.float32)
    return F.cross_entropy(logits.view(-1, weight.shape[0]), labels, ignore_index=ignore_index, reduction=reduction)


def _flatten(graph: fx.Graph, before: fx.Node, match: Match) -> dict:
    hidden = match.bound["hidden"]
    val = value(hidden)
    flat = insert(graph, before, aten.reshape.default, (hidden, [-1, val.shape[-1]]), val=val.reshape(-1, val.shape[-1]))
    return {"hidden": flat}


@cache
def RaiseLinearCrossEntropy() -> Raise:
    example = {
        "hidden": f64(2, 3, 8), "weight": f64(5, 8), "bias": f64(5),
        "labels": torch.zeros(6, dtype=torch.int64), "ignore_index": -7919,
    }  # fmt: skip
    variants = [{"bias": bias, "reduction": r} for bias in (f64(5), None) for r in ("mean", "sum")]
    return Raise("linear_cross_entropy", ops.linear_cross_entropy, example, variants, _written, _flatten)
