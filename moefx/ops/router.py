"""Routers: logits to topk_weights and topk_ids, and what is computed beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops.registry import op
from moefx.ops.spec import schema, takes_spec


@dataclass(frozen=True)
class TopkWeightsSpec:
    """How a router computes the weights of the chosen experts from their logits."""

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
    min_sum: float = 0.0
    #: Weights are multiplied by this then.
    routed_scaling_factor: float = 1.0
    #: Weights return to the logits' dtype at last.
    cast: bool = False


@dataclass(frozen=True)
class RouterSpec(TopkWeightsSpec):
    """How a top-k router chooses experts, and weights them."""

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
    mask_value: float = float("-inf"),
) -> tuple[Tensor, Tensor]:
    """See :func:`route`; here ``groups`` of 1 still writes the group selection out, as the models do.

    ``mask_value``: the scores of the other groups without ``zero_fill``.
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
        choice = choice.masked_fill(~mask.bool(), 0.0 if spec.zero_fill else mask_value)
    topk_weights, topk_ids = torch.topk(choice, top_k, dim=-1, sorted=spec.sorted)
    if spec.gather:
        topk_weights = scores.gather(1, topk_ids)
    return _weights(topk_weights, topk_ids, expert_scale, spec, logits.dtype), topk_ids


def _scores(logits: Tensor, spec: TopkWeightsSpec) -> Tensor:
    if spec.score == "sigmoid":
        return torch.sigmoid(logits)
    if spec.score == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return torch.softmax(logits.to(torch.float32) if spec.fp32 else logits, dim=-1)


def _weights(
    chosen: Tensor, topk_ids: Tensor, expert_scale: Tensor | None, spec: TopkWeightsSpec, dtype: torch.dtype
) -> Tensor:
    """topk_weights [T, K] from ``chosen`` [T, K], scores, or logits if ``topk_first``; ``dtype``: that of the logits."""
    topk_weights = _scores(chosen, spec) if spec.topk_first else chosen
    if spec.renormalize:
        total = topk_weights.sum(dim=-1, keepdim=True)
        topk_weights = topk_weights / (
            total.clamp(min=spec.min_sum) if spec.min_sum else total + spec.eps if spec.eps else total
        )
    if spec.routed_scaling_factor != 1.0:
        topk_weights = topk_weights * spec.routed_scaling_factor
    topk_weights = topk_weights if expert_scale is None else topk_weights * expert_scale[topk_ids]
    return topk_weights.to(dtype) if spec.cast else topk_weights


@op(f"route(Tensor logits, Tensor? bias, int top_k, *, Tensor? expert_scale=None, {schema(RouterSpec)}) -> (Tensor, Tensor)")
@takes_spec
def route(
    logits: Tensor, bias: Tensor | None, top_k: int, *, expert_scale: Tensor | None = None, spec: RouterSpec
) -> tuple[Tensor, Tensor]:
    """A top-k router after its linear layer: logits [T, E] -> topk_weights [T, K] and topk_ids [T, K] (int64).

    ``bias`` [E] is added to the scores for the choice (auxiliary-loss-free balancing, arXiv 2408.15664). ``expert_scale`` [E]:
    each weight is multiplied by its expert's entry, after ``routed_scaling_factor`` (Gemma 4). Options: :class:`RouterSpec`.
    """
    if spec.groups == spec.topk_groups:
        spec = replace(spec, groups=0, topk_groups=0)  # all groups are allowed: nothing to select
    return route_body(logits, bias, top_k, expert_scale, spec)


@op(
    f"route_at(Tensor logits, Tensor? bias, Tensor topk_ids, *, Tensor? expert_scale=None, {schema(TopkWeightsSpec)}) -> Tensor"
)
@takes_spec
def route_at(
    logits: Tensor, bias: Tensor | None, topk_ids: Tensor, *, expert_scale: Tensor | None = None, spec: TopkWeightsSpec
) -> Tensor:
    """The topk_weights [T, K] that :func:`route` would give to the experts topk_ids [T, K], chosen elsewhere."""
    scores = logits if spec.topk_first else _scores(logits, spec)
    chosen = (scores if spec.gather or bias is None else scores + bias).gather(1, topk_ids)
    return _weights(chosen, topk_ids, expert_scale, spec, logits.dtype)


@op("balanced_index(Tensor logits, int top_k) -> Tensor")
def balanced_index(logits: Tensor, top_k: int) -> Tensor:
    """topk_ids [T, K] that give every expert of logits [T, E] the same number of tokens (but one), whatever the logits are."""
    rows = torch.arange(logits.shape[0] * top_k, device=logits.device)
    return rows.remainder(logits.shape[1]).view(logits.shape[0], top_k)


@op("nonfinite(Tensor x) -> Tensor")
def nonfinite(x: Tensor) -> Tensor:
    """How many numbers of x are NaN or infinite; int64 scalar."""
    return (~torch.isfinite(x)).sum()
