"""Routers: logits to weights and expert indices, and what is computed beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops.registry import op
from moefx.ops.spec import schema, takes_spec


@dataclass(frozen=True)
class TopkWeightsSpec:
    """How a router makes weights of the logits of the experts that it chose."""

    #: "softmax", "sigmoid" or "sqrtsoftplus" (the root of softplus, DeepSeek-V4) of the logits.
    score: str = "softmax"
    #: Scores of the K chosen logits only, instead of all E.
    topk_first: bool = False
    #: The softmax is computed in fp32.
    fp32: bool = True
    #: Weights are the unbiased scores of the chosen experts; otherwise the bias is part of them.
    gather: bool = False
    #: Weights are divided by their sum over the K.
    renormalize: bool = False
    #: Added to that sum.
    eps: float = 0.0
    #: That sum is not taken below this (Ernie 4.5).
    least: float = 0.0
    #: What weights are multiplied by then.
    scale: float = 1.0
    #: Weights return to the logits' dtype at last.
    cast: bool = False


@dataclass(frozen=True)
class RouterSpec(TopkWeightsSpec):
    """How a top-k router chooses experts, and what weights it gives them."""

    #: The experts stand in so many groups, of which the best ``topk_groups`` may be chosen from; equal numbers: no limit.
    groups: int = 0
    topk_groups: int = 0
    #: What a group is chosen by: the sum of its two best scores ("top2", DeepSeek-V3, arXiv 2412.19437) or its best ("max",
    #: DeepSeek-V2).
    group_score: str = "top2"
    #: The scores of other groups become 0, instead of -inf.
    zero_fill: bool = False
    #: Top-k's own: decides the order of the K, hence rounding.
    sorted: bool = True


def route_body(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    expert_scale: Tensor | None,
    spec: RouterSpec,
    fill: float = float("-inf"),
) -> tuple[Tensor, Tensor]:
    """See :func:`route`; here ``groups`` of 1 still writes the group selection out, as the models do.

    ``fill``: the scores of the other groups without ``zero_fill``.
    """
    scores = logits if spec.topk_first else _scores(logits, spec)
    choice = scores if bias is None else scores + bias
    if spec.groups:
        experts = choice.shape[-1]
        grouped = choice.view(-1, spec.groups, experts // spec.groups)
        best = grouped.topk(2, dim=-1)[0].sum(dim=-1) if spec.group_score == "top2" else grouped.max(dim=-1).values
        chosen = torch.topk(best, k=spec.topk_groups, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(best).scatter(1, chosen, 1)
        mask = mask.unsqueeze(-1).expand(-1, spec.groups, experts // spec.groups).reshape(-1, experts)
        choice = choice.masked_fill(~mask.bool(), 0.0 if spec.zero_fill else fill)
    weights, index = torch.topk(choice, top_k, dim=-1, sorted=spec.sorted)
    if spec.gather:
        weights = scores.gather(1, index)
    return _weights(weights, index, expert_scale, spec, logits.dtype), index


def _scores(logits: Tensor, spec: TopkWeightsSpec) -> Tensor:
    if spec.score == "sigmoid":
        return torch.sigmoid(logits)
    if spec.score == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return torch.softmax(logits.to(torch.float32) if spec.fp32 else logits, dim=-1)


def _weights(chosen: Tensor, index: Tensor, expert_scale: Tensor | None, spec: TopkWeightsSpec, dtype: torch.dtype) -> Tensor:
    """The weights [T, K] of what was ``chosen`` [T, K]: scores, or logits if ``topk_first``; ``dtype``: the logits'."""
    weights = _scores(chosen, spec) if spec.topk_first else chosen
    if spec.renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total.clamp(min=spec.least) if spec.least else total + spec.eps if spec.eps else total)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    weights = weights if expert_scale is None else weights * expert_scale[index]
    return weights.to(dtype) if spec.cast else weights


@op(f"route(Tensor logits, Tensor? bias, int top_k, *, Tensor? expert_scale=None, {schema(RouterSpec)}) -> (Tensor, Tensor)")
@takes_spec
def route(
    logits: Tensor, bias: Tensor | None, top_k: int, *, expert_scale: Tensor | None = None, spec: RouterSpec
) -> tuple[Tensor, Tensor]:
    """What a router does with its logits [T, E]: returns weights [T, K] and expert index [T, K] (int64).

    ``bias`` [E] is added to the scores for the choice (auxiliary-loss-free balancing, arXiv 2408.15664). ``expert_scale`` [E]:
    each weight is multiplied by its expert's entry, after ``scale`` (Gemma 4). Options: :class:`RouterSpec`.
    """
    if spec.groups == spec.topk_groups:
        spec = replace(spec, groups=0, topk_groups=0)  # all groups are allowed: nothing to select
    return route_body(logits, bias, top_k, expert_scale, spec)


@op(f"route_at(Tensor logits, Tensor? bias, Tensor index, *, Tensor? expert_scale=None, {schema(TopkWeightsSpec)}) -> Tensor")
@takes_spec
def route_at(
    logits: Tensor, bias: Tensor | None, index: Tensor, *, expert_scale: Tensor | None = None, spec: TopkWeightsSpec
) -> Tensor:
    """The weights [T, K] that :func:`route` would give to the experts index [T, K], chosen by somebody else."""
    scores = logits if spec.topk_first else _scores(logits, spec)
    chosen = (scores if spec.gather or bias is None else scores + bias).gather(1, index)
    return _weights(chosen, index, expert_scale, spec, logits.dtype)


@op("balanced_index(Tensor logits, int top_k) -> Tensor")
def balanced_index(logits: Tensor, top_k: int) -> Tensor:
    """An index [T, K] that gives every expert of logits [T, E] the same number of rows (but one), whatever the logits say."""
    rows = torch.arange(logits.shape[0] * top_k, device=logits.device)
    return rows.remainder(logits.shape[1]).view(logits.shape[0], top_k)


@op("nonfinite(Tensor x) -> Tensor")
def nonfinite(x: Tensor) -> Tensor:
    """How many numbers of x are NaN or infinite; int64 scalar."""
    return (~torch.isfinite(x)).sum()
