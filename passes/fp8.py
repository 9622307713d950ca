"""Opt-in: runs linear layers in FP8 by a recipe of Transformer Engine, experts in FP8 by QuACK. Numerics change; weights stay
the model's parameters.

    pipeline = moefx.passes.default().before("lower", moefx.passes.FP8("current"))
    model = moefx.optimize(model, pipeline=pipeline)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from moefx import ops
from moefx.backends import quack
from moefx.errors import MoefxError
from moefx.ir.graph import VIEWS, arguments, aten, dtype_of, is_call, op_name, origin, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.kernels import te
from moefx.kernels.te import linear
from moefx.ops.grouped_mlp import grouped_mlp
from moefx.rewriting.pipeline import Changes

#: Who reads a router's logits, raised or as the model writes it.
_ROUTERS = (ops.route, ops.route_at, aten.topk.default, aten.softmax.int, aten.sigmoid.default)
_HALVES = (torch.bfloat16, torch.float16)
_NOT_ASKED = "not asked for"
#: What FP8 means for experts.
_OF_ROWS = "a scale a row and a column of a matrix, E4M3; the weights' gradients by products in bf16"


@dataclass(frozen=True)
class FP8:
    """``recipe`` of linear layers: "current" (Float8CurrentScaling: a scale a tensor) or "block" (Float8BlockScaling: a scale a
    block); ``linear`` and ``experts``: which products.

    Inputs, weights and gradients of the products are rounded to 8 bits (a relative 2**-4 for E4M3, 2**-3 for E5M2); what is
    between the products stays as it is. Routers' logits and the head keep their precision. Experts have no recipe: theirs are
    rounded with a scale for each row and for each column of a matrix, and their weights' gradients are products in bf16, as
    torchao's ``rowwise_with_gw_hp`` has it. Transformer Engine 2.20 runs grouped FP8 one cuBLAS call an expert.
    """

    recipe: str = "current"
    linear: bool = True
    experts: bool = True
    name: ClassVar[str] = "fp8"

    def __post_init__(self) -> None:
        if self.recipe not in linear.RECIPES:
            raise MoefxError(f"there is no fp8 recipe {self.recipe!r}; there are: {', '.join(linear.RECIPES)}")

    def _problems(self) -> tuple[str | None, str | None]:
        """Why linear layers stay as they are, and why experts do; raises MoefxError if all that were asked for do."""
        linears = te.available() or linear.why_not(self.recipe) if self.linear else _NOT_ASKED
        experts = quack.BACKEND.available() if self.experts else _NOT_ASKED
        if linears and experts:
            said = [why for why in dict.fromkeys((linears, experts)) if why != _NOT_ASKED]
            why = "; ".join(said) or "linear and experts are False"
            raise MoefxError(f"the pass fp8 was asked for, and cannot run: {why}")
        return linears, experts

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        changes = Changes()
        no_linears, no_experts = self._problems()
        for node in function.graph.nodes:
            if is_call(node, ops.experts, grouped_mlp):
                why = no_experts or quack.FP8[node.target].refuses(node)
                if why:
                    changes.miss(node, f"{op_name(node.target)} keeps its precision: {why}")
                else:
                    self._of_experts(node, changes)
            elif is_call(node, aten.linear.default):
                why = no_linears or self._refuses(node, function.name)
                if why:
                    changes.miss(node, why)
                else:
                    self._of_linear(node, changes)
        return changes

    def _of_experts(self, node: fx.Node, changes: Changes) -> None:
        op: Any = node.target
        kernel, what = quack.FP8[op], op_name(op)
        node.meta["moefx"] = replace(origin(node).touched(self.name), kernel="fp8", why=f"{kernel.why}: {_OF_ROWS}")
        node.meta["semantic"] = node.target
        node.target = kernel.fn
        changes.did(node, f"{what} -> QuACK in FP8, numerics change: {_OF_ROWS}")

    def _of_linear(self, node: fx.Node, changes: Changes) -> None:
        given, recipe = arguments(node), linear.RECIPES[self.recipe]
        node.target = torch.ops.moefx.te_fp8_linear.default
        node.args, node.kwargs = (given["input"], given["weight"], given["bias"], self.recipe), {}
        node.meta["moefx"] = replace(origin(node).touched(self.name), kernel="te", why=f"{recipe.title}: {recipe.meaning}")
        changes.did(node, f"aten.linear -> {recipe.title}, numerics change: {recipe.meaning}")

    def _refuses(self, node: fx.Node, function: str) -> str | None:
        given, recipe = arguments(node), linear.RECIPES[self.recipe]
        if function == "head":
            return "the head keeps its precision"
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


def _reads(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    """Does one of ``targets`` read the node, directly or through views and casts?"""
    return any(u.target in targets or (u.target in VIEWS and _reads(u, targets)) for u in node.users)
