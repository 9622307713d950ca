"""Routers: logits to weights and expert indices, and what is computed beside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops.registry import op


def route_body(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    score: str = "softmax",
    topk_first: bool = False,
    fp32: bool = True,
    groups: int = 0,
    topk_groups: int = 0,
    group_score: str = "top2",
    zero_fill: bool = False,
    sorted: bool = True,
    gather: bool = False,
    renormalize: bool = False,
    eps: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
    expert_scale: Tensor | None = None,
    cast: bool = False,
    fill: float = float("-inf"),
) -> tuple[Tensor, Tensor]:
    """See :func:`route`; here ``groups`` of 1 still writes the group selection out, as the models do."""
    scores = logits if topk_first else _scores(logits, score, fp32)
    choice = scores if bias is None else scores + bias
    if groups:
        experts = choice.shape[-1]
        grouped = choice.view(-1, groups, experts // groups)
        best = grouped.topk(2, dim=-1)[0].sum(dim=-1) if group_score == "top2" else grouped.max(dim=-1).values
        chosen = torch.topk(best, k=topk_groups, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(best).scatter(1, chosen, 1)
        mask = mask.unsqueeze(-1).expand(-1, groups, experts // groups).reshape(-1, experts)
        choice = choice.masked_fill(~mask.bool(), 0.0 if zero_fill else fill)
    weights, index = torch.topk(choice, top_k, dim=-1, sorted=sorted)
    if gather:
        weights = scores.gather(1, index)
    if topk_first:
        weights = _scores(weights, score, fp32)
    weights = _weights(weights, index, renormalize, eps, least, scale, expert_scale)
    return weights.to(logits.dtype) if cast else weights, index


def _scores(logits: Tensor, score: str, fp32: bool) -> Tensor:
    if score == "sigmoid":
        return torch.sigmoid(logits)
    if score == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return torch.softmax(logits.to(torch.float32) if fp32 else logits, dim=-1)


def _weights(
    weights: Tensor, index: Tensor, renormalize: bool, eps: float, least: float, scale: float, expert_scale: Tensor | None
) -> Tensor:
    """What a router does with the scores of the experts that it chose."""
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total.clamp(min=least) if least else total + eps if eps else total)
    if scale != 1.0:
        weights = weights * scale
    return weights if expert_scale is None else weights * expert_scale[index]


@op(
    "route(Tensor logits, Tensor? bias, int top_k, *, str score='softmax', bool topk_first=False, bool fp32=True, "
    "int groups=0, int topk_groups=0, str group_score='top2', bool zero_fill=False, bool sorted=True, bool gather=False, "
    "bool renormalize=False, float eps=0.0, float least=0.0, float scale=1.0, Tensor? expert_scale=None, bool cast=False) "
    "-> (Tensor, Tensor)"
)
def route(logits: Tensor, bias: Tensor | None, top_k: int, **options) -> tuple[Tensor, Tensor]:
    """What a router does with its logits [T, E]: returns weights [T, K] and expert index [T, K] (int64).

    ``score``: softmax (in fp32 if ``fp32``), sigmoid or sqrtsoftplus (the root of softplus, DeepSeek-V4), of all logits, or
    of the K chosen ones if ``topk_first``. ``bias`` [E] is added for the choice only (auxiliary-loss-free balancing, arXiv
    2408.15664); with ``gather`` the weights are the unbiased scores at the chosen experts. ``groups``/``topk_groups``: the
    choice is limited to the best groups of experts by the sum of their two best scores ("top2", DeepSeek-V3, arXiv
    2412.19437) or their best ("max", DeepSeek-V2); the scores of the others become -inf, or 0 if ``zero_fill``.
    ``renormalize`` divides by the sum, plus ``eps`` or not below ``least`` (Ernie 4.5), then ``scale`` multiplies, then each
    expert's entry of ``expert_scale`` [E] (Gemma 4), then ``cast`` returns to the logits' dtype. ``sorted`` is top-k's own:
    it decides the order of the K, hence rounding.
    """
    if options.get("groups", 0) == options.get("topk_groups", 0):
        options = {**options, "groups": 0, "topk_groups": 0}  # all groups are allowed: nothing to select
    return route_body(logits, bias, top_k, **options)


@op(
    "route_at(Tensor logits, Tensor? bias, Tensor index, *, str score='softmax', bool topk_first=False, bool fp32=True, "
    "bool gather=False, bool renormalize=False, float eps=0.0, float least=0.0, float scale=1.0, Tensor? expert_scale=None, "
    "bool cast=False) -> Tensor"
)
def route_at(
    logits: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *,
    score: str = "softmax",
    topk_first: bool = False,
    fp32: bool = True,
    gather: bool = False,
    renormalize: bool = False,
    eps: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
    expert_scale: Tensor | None = None,
    cast: bool = False,
) -> Tensor:
    """The weights [T, K] that :func:`route` would give to the experts index [T, K], chosen by somebody else."""
    scores = logits if topk_first else _scores(logits, score, fp32)
    weights = (scores if gather or bias is None else scores + bias).gather(1, index)
    if topk_first:
        weights = _scores(weights, score, fp32)
    weights = _weights(weights, index, renormalize, eps, least, scale, expert_scale)
    return weights.to(logits.dtype) if cast else weights


@op("balanced_index(Tensor logits, int top_k) -> Tensor")
def balanced_index(logits: Tensor, top_k: int) -> Tensor:
    """An index [T, K] that gives every expert of logits [T, E] the same number of rows (but one), whatever the logits say."""
    rows = torch.arange(logits.shape[0] * top_k, device=logits.device)
    return rows.remainder(logits.shape[1]).view(logits.shape[0], top_k)


@op("nonfinite(Tensor x) -> Tensor")
def nonfinite(x: Tensor) -> Tensor:
    """How many numbers of x are NaN or infinite; int64 scalar."""
    return (~torch.isfinite(x)).sum()
