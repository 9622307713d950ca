"""Raises what a router does with its logits to one ``moefx.route``, for the whole family of top-k routers."""

from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

from torch import fx

from moefx import ops
from moefx.graph import arguments, aten, is_call
from moefx.match import Match, f64
from moefx.raising import Raise

# Unusual numbers: what the match reads off the graph. 323 = 17 * 19 experts in 17 groups.
_NUMBERS = {"top_k": 13, "groups": 17, "topk_groups": 11, "eps": 0.0123, "scale": 1.75}


def _needs(variant: Mapping[str, Any]) -> set:
    """The operations that a router of this kind cannot do without."""
    found: set = {aten.topk.default, aten.sigmoid.default if variant["score"] == "sigmoid" else aten.softmax.int}
    found |= {aten.scatter.value} if variant["groups"] else set()
    found |= {aten.gather.default} if variant.get("gather") else set()
    found |= {aten.div.Tensor, aten.sum.dim_IntList} if variant["renormalize"] else set()
    return found | ({aten.max.dim} if variant.get("group_score") == "max" else set())


def _order(graph: fx.Graph, before: fx.Node, match: Match) -> dict[str, Any]:
    """Top-k's own flag, of the last top-k: the one that chooses experts."""
    return {"sorted": [arguments(n)["sorted"] for n in match.nodes if is_call(n, aten.topk.default)][-1]}


def _variants() -> list[dict[str, Any]]:
    """Score, selection, renormalization, scale and cast in the combinations that models of Transformers write."""
    off: dict[str, Any] = {"groups": 0, "topk_groups": 0, "eps": 0.0, "scale": 1.0}
    made = []
    for score, order in (("softmax", "scores"), ("softmax", "logits"), ("sigmoid", "scores"), ("sigmoid", "logits")):
        for scaled, normed, cast in product((False, True), ("no", "sum", "sum+eps"), (False, True)):
            base = {**off, "bias": None, "score": score, "renormalize": normed != "no", "cast": cast}
            base |= {"scale": _NUMBERS["scale"]} if scaled else {}
            base |= {"eps": _NUMBERS["eps"]} if normed == "sum+eps" else {}
            if order == "logits":
                made += [{**base, "topk_first": True, "fp32": fp32} for fp32 in (True, False)]
                continue
            limited = {"groups": _NUMBERS["groups"], "topk_groups": _NUMBERS["topk_groups"]}
            made.append(base)
            made.append({**base, "bias": f64(323), "gather": True})
            made.append({**base, **limited, "bias": f64(323), "gather": True})
            made.append({**base, **limited, "gather": True})
            made.append({**base, **limited, "group_score": "max"})
    return made


@cache
def RaiseRoute() -> Raise:
    example = {"logits": f64(3, 323), "bias": f64(323), **_NUMBERS}
    return Raise("route", ops.route, example, _variants(), ops.route_body, _order, _needs)
