"""The pass 'route': each router that models write becomes ops.route, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moefx import ops
from moefx.passes import (
    Route,
)
from tests.support.passes import calls, run


def route_mixtral(logits):
    p = torch.softmax(logits.float(), dim=-1)
    value, index = torch.topk(p, 2, dim=-1)
    value /= value.sum(dim=-1, keepdim=True)
    return value, index


def route_gpt_oss(logits):
    value, index = torch.topk(logits, 2, dim=-1)
    return F.softmax(value, dim=1, dtype=value.dtype), index


def _limited(scores, fill):
    """Scores of the two best of four groups of experts; the others' become ``fill``."""
    groups = scores.view(-1, 4, 2).topk(2, dim=-1)[0].sum(dim=-1)
    chosen = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups)
    mask.scatter_(1, chosen, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    return scores.masked_fill(~mask.bool(), fill)


def route_deepseek(logits):
    scores = logits.sigmoid()
    index = torch.topk(_limited(scores, float("-inf")), k=2, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5, index


def route_mistral4(logits):
    scores = logits.softmax(-1)
    index = torch.topk(_limited(scores, 0.0), k=2, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, index


def route_deepseek_v2(logits):
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    groups = scores.view(-1, 4, 2).max(dim=-1).values
    chosen = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups)
    mask.scatter_(1, chosen, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    weights, index = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=2, dim=-1, sorted=False)
    return weights * 2.5, index


def route_deepseek_v4(bias, logits):
    scores = F.softplus(logits).sqrt()
    index = torch.topk(scores + bias, 2, dim=-1, sorted=False).indices
    weights = scores.gather(1, index)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * 1.5, index


def route_ernie(bias, logits):
    scores = F.softmax(logits, dim=1, dtype=torch.float)
    _, index = torch.topk(scores + bias, 2, dim=-1)
    weights = torch.gather(scores, dim=-1, index=index)
    return weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-12), index


def route_gemma4(scale, logits):
    scores = F.softmax(logits, dim=-1, dtype=torch.float32)
    weights, index = torch.topk(scores, k=2, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights * scale[index], index


def route_kolibri(bias, logits):
    index = torch.topk(logits + bias, 2, dim=-1).indices
    weights = logits.gather(1, index).sigmoid()
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20), index


def route_cohere2(logits):
    value, index = torch.topk(logits, 2, dim=-1)
    value = F.sigmoid(value)
    return (value / torch.sum(value, dim=-1, keepdims=True)).to(logits.dtype), index


ROUTERS = [
    (route_mixtral, {"renormalize": True}),
    (route_gpt_oss, {"topk_first": True}),
    (
        route_deepseek,
        {"score": "sigmoid", "groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5, "eps": 1e-20, "sorted": False},
    ),
    (
        route_mistral4,
        {"groups": 4, "topk_groups": 2, "zero_fill": True, "renormalize": True, "eps": 1e-20, "routed_scaling_factor": 2.5},
    ),
    (route_deepseek_v2, {"groups": 4, "topk_groups": 2, "group_score": "max", "zero_fill": True, "routed_scaling_factor": 2.5}),
    (
        route_deepseek_v4,
        {"score": "sqrtsoftplus", "gather": True, "renormalize": True, "eps": 1e-20, "routed_scaling_factor": 1.5},
    ),
    (route_ernie, {"gather": True, "renormalize": True, "min_sum": 1e-12}),
    (route_gemma4, {"renormalize": True}),
    (route_kolibri, {"score": "sigmoid", "topk_first": True, "gather": True, "renormalize": True, "eps": 1e-20}),
    (route_cohere2, {"score": "sigmoid", "topk_first": True, "renormalize": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("function", "options"), ROUTERS)
def test_route(function, options, dtype):
    """Logits as a router has them: bf16 ones are neither tied nor near a tie."""
    given = [n for n in inspect.signature(function).parameters if n != "logits"]
    parameters = [nn.Parameter(torch.rand(8).to(torch.float32 if n == "bias" else dtype)) for n in given]
    logits = torch.stack([torch.randperm(8) / 4 - 1 for _ in range(17)]).to(dtype)
    f, changes = run([Route()], function, [logits], parameters)
    (node,) = calls(f, ops.route)
    assert node.args[2] == 2 and options.items() <= node.kwargs.items() and len(changes.made) == 1
    assert (node.args[1] is not None) == ("bias" in given) and (node.kwargs.get("expert_scale") is not None) == (
        "scale" in given
    )


@pytest.mark.parametrize("function", [f for f, _ in ROUTERS])
def test_routes_weights_are_the_same_at_the_experts_it_chose(function):
    """``route_at``, given what ``route`` chose."""
    given = [n for n in inspect.signature(function).parameters if n != "logits"]
    f, _ = run([Route()], function, [torch.randn(17, 8)], [nn.Parameter(torch.rand(8)) for _ in given])
    (node,) = calls(f, ops.route)
    logits, bias = torch.randn(17, 8), torch.rand(8) if node.args[1] is not None else None
    kwargs = {k: torch.rand(8) if k == "expert_scale" else v for k, v in node.kwargs.items()}
    weights, index = ops.route(logits, bias, 2, **kwargs)
    at = {k: v for k, v in kwargs.items() if k in {a.name for a in ops.route_at._schema.arguments}}
    torch.testing.assert_close(ops.route_at(logits, bias, index, **at), weights)


def test_route_refuses_another_score():
    def wrong(logits):
        value, index = torch.topk(torch.softmax(logits, -1).sqrt(), 2, dim=-1)
        return value / value.sum(dim=-1, keepdim=True), index

    f, changes = run([Route()], wrong, [torch.randn(17, 8)])
    assert calls(f, ops.route) == [] and any("found sqrt = aten.sqrt" in c.what for c in changes.missed), changes.missed


def test_a_router_whose_scores_are_returned():
    def route(logits):
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        weights, index = torch.topk(scores, k=2, dim=-1)
        return scores, weights / weights.sum(dim=-1, keepdim=True), index

    f, changes = run([Route()], route, [torch.randn(17, 8)])
    assert len(calls(f, ops.route)) == 1 and changes.missed == []
