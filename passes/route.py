"""Raises what a router does with its logits to one ``moefx.route``, for the whole family of top-k routers."""

from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

from torch import Tensor, fx

from moefx import ops
from moefx.ir.graph import arguments, aten, is_call
from moefx.rewriting.pattern import Match, f64
from moefx.rewriting.raise_ops import Raise

Variant = dict[str, Any]

# Unusual numbers: what the match reads off the graph. 323 = 17 * 19 experts in 17 groups.
_NUMBERS = {
    "top_k": 13,
    "groups": 17,
    "topk_groups": 11,
    "mask_value": -7.5,
    "eps": 0.0123,
    "min_sum": 0.0321,
    "routed_scaling_factor": 1.75,
}
_SCORES = {
    "softmax": {aten.softmax.int},
    "sigmoid": {aten.sigmoid.default},
    "sqrtsoftplus": {aten.softplus.default, aten.sqrt.default},
}


def _needs(variant: Mapping[str, Any]) -> set[Any]:
    """The operations that a router of this kind cannot do without."""
    found: set[Any] = {aten.topk.default} | _SCORES[variant["score"]]
    found |= {aten.scatter.value} if variant["groups"] else set()
    found |= {aten.gather.default} if variant.get("gather") else set()
    found |= {aten.div.Tensor, aten.sum.dim_IntList} if variant["renormalize"] else set()
    found |= {aten.clamp.default} if variant["min_sum"] else set()
    found |= {aten.index.Tensor} if variant["expert_scale"] is not None else set()
    found |= {aten._to_copy.default} if variant["cast"] else set()
    return found | ({aten.max.dim} if variant.get("group_score") == "max" else set())


def _written(
    logits: Tensor, top_k: int, bias: Tensor | None, expert_scale: Tensor | None, mask_value: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """As models write it: ``mask_value`` is what the scores of other groups become."""
    return ops.route_body(logits, bias, top_k, expert_scale, ops.RouterSpec(**options), mask_value)


def _flags(graph: fx.Graph, before: fx.Node, match: Match) -> dict[str, Any]:
    """Top-k's own flag, of the last top-k, the one that chooses experts; and what the scores of other groups become."""
    order = [arguments(n)["sorted"] for n in match.nodes if is_call(n, aten.topk.default)][-1]
    return {"sorted": order, "zero_fill": match.bound.get("mask_value") == 0.0}


def _choices() -> list[Variant]:
    """How models of Transformers choose experts: by which scores, with what bias, among which groups."""
    biased: Variant = {"bias": f64(323), "gather": True}
    limited: Variant = {n: _NUMBERS[n] for n in ("groups", "topk_groups", "mask_value")}
    grouped: list[Variant] = [{**limited, **biased}, {**limited, "gather": True}, {**limited, "group_score": "max"}]
    made: list[Variant] = [{"score": s, "fp32": True, **c} for s in ("softmax", "sigmoid") for c in ({}, biased, *grouped)]
    made += [{"score": "softmax", "fp32": False, **c} for c in ({}, biased, *grouped)]
    made += [{"score": "sqrtsoftplus", **c} for c in ({}, biased)]
    first: tuple[Variant, ...] = (
        {"score": "softmax", "fp32": True},
        {"score": "softmax", "fp32": False},
        {"score": "sigmoid"},
    )
    return made + [{"topk_first": True, **s, **c} for s in first for c in ({}, biased)]


@cache
def _variants() -> list[Variant]:
    """Each way to choose with each way to weight what was chosen: renormalization, scales, cast."""
    off: Variant = {"groups": 0, "topk_groups": 0, "mask_value": 0.0, "eps": 0.0, "min_sum": 0.0, "routed_scaling_factor": 1.0}
    off |= {"bias": None, "expert_scale": None, "renormalize": False}
    sums: tuple[Variant, ...] = (
        {},
        *({"renormalize": True, **n} for n in ({}, {"eps": _NUMBERS["eps"]}, {"min_sum": _NUMBERS["min_sum"]})),
    )
    scales: tuple[Variant, ...] = ({}, {"routed_scaling_factor": _NUMBERS["routed_scaling_factor"]}, {"expert_scale": f64(323)})
    parts = product(_choices(), sums, scales, (False, True))
    return [{**off, **choice, **normed, **scaled, "cast": cast} for choice, normed, scaled, cast in parts]


class Route(Raise):
    """The whole router after its linear layer: scores, choice of experts, weights."""

    def __init__(self) -> None:
        example = {"logits": f64(3, 323), "bias": f64(323), "expert_scale": f64(323), **_NUMBERS}
        super().__init__("route", ops.route, example, _variants(), _written, _flags, _needs)
