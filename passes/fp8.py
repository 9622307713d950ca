"""Opt-in: runs linear layers in FP8 by a recipe of Transformer Engine. Numerics change; weights stay the model's parameters.

    pipeline = moefx.passes.default().before("lower", moefx.passes.FP8("current"))
    model = moefx.optimize(model, pipeline=pipeline)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from moefx import ops
from moefx.errors import MoefxError
from moefx.graph import VIEWS, arguments, aten, dtype_of, is_call, origin, value
from moefx.grouped import grouped_mlp
from moefx.kernels import te
from moefx.kernels.te import linear
from moefx.pipeline import Changes

#: Who reads a router's logits, raised or as the model writes it.
_ROUTERS = (ops.route, ops.route_at, aten.topk.default, aten.softmax.int, aten.sigmoid.default)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FP8:
    """``recipe``: "current" (Float8CurrentScaling: a scale a tensor) or "block" (Float8BlockScaling: a scale a block).

    Inputs, weights and gradients of the products are rounded to 8 bits (a relative 2**-4 for E4M3, 2**-3 for E5M2); what is
    between the products stays as it is. Routers' logits keep their precision. Experts' grouped products are reported as
    missed: in FP8, Transformer Engine 2.20 runs them one cuBLAS call an expert below cuBLASLt 13.5.
    """

    recipe: str = "current"
    name: ClassVar[str] = "fp8"

    def __post_init__(self) -> None:
        if self.recipe not in linear.RECIPES:
            raise MoefxError(f"there is no fp8 recipe {self.recipe!r}; there are: {', '.join(linear.RECIPES)}")

    def run(self, function, plan=None) -> Changes:
        problem = te.available() or linear.why_not(self.recipe)
        if problem:
            raise MoefxError(f"the pass fp8 was asked for, and cannot run: {problem}")
        changes, recipe = Changes(), linear.RECIPES[self.recipe]
        for node in function.graph.nodes:
            if is_call(node, ops.experts, grouped_mlp):
                changes.miss(node, "experts stay as they are: Transformer Engine's grouped FP8 needs cuBLASLt 13.5")
            if not is_call(node, aten.linear.default):
                continue
            why = "the head keeps its precision" if function.name == "head" else self._refuses(node)
            if why:
                changes.miss(node, why)
                continue
            given = arguments(node)
            node.target = torch.ops.moefx.te_fp8_linear.default
            node.args, node.kwargs = (given["input"], given["weight"], given["bias"], self.recipe), {}
            node.meta["moefx"] = replace(origin(node).touched(self.name), kernel="te", why=f"{recipe.title}: {recipe.meaning}")
            changes.did(node, f"aten.linear -> {recipe.title}, numerics change: {recipe.meaning}")
        return changes

    def _refuses(self, node: fx.Node) -> str | None:
        given, recipe = arguments(node), linear.RECIPES[self.recipe]
        x, weight = dtype_of(given["input"]), dtype_of(given["weight"])
        if x not in _HALVES or weight != x:
            return f"an FP8 product wants input and weight in one 16-bit dtype, they are {x} and {weight}"
        wide = [n for n in value(given["weight"]).shape if n % recipe.features]
        if wide:
            shape = tuple(value(given["weight"]).shape)
            return f"{recipe.title} wants features in multiples of {recipe.features}, the weight is {shape}"
        if _reads(node, _ROUTERS):
            return "these are a router's logits: in FP8 tokens would go to other experts"
        return None


def _reads(node: fx.Node, targets: tuple) -> bool:
    """Does one of ``targets`` read the node, directly or through views and casts?"""
    return any(u.target in targets or (u.target in VIEWS and _reads(u, targets)) for u in node.users)


