"""Opt-in: linear layers and experts in FP8, by backends' variants "fp8_<recipe>" and "fp8". Numerics change.

Weights stay the model's parameters.

    pipeline = moefx.passes.default().before("lower", moefx.passes.FP8("current"))
    model = moefx.optimize(model, pipeline=pipeline)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from moefx import backends, ops
from moefx.backends import Backend
from moefx.errors import MoefxError
from moefx.ir.graph import VIEWS, aten, is_call, op_name
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.ops.grouped_mlp import grouped_mlp
from moefx.rewriting.pipeline import Changes

#: Who reads a router's logits, raised or as the model writes it.
_ROUTERS = (ops.route, ops.route_at, aten.topk.default, aten.softmax.int, aten.sigmoid.default)
_LINEAR = aten.linear.default
_EXPERTS = (ops.experts, grouped_mlp)
_NOT_ASKED = "not asked for"


def _recipes() -> list[str]:
    return [v.removeprefix("fp8_") for v in backends.variants_of(_LINEAR) if v.startswith("fp8_")]


@dataclass(frozen=True)
class FP8:
    """Runs the products of linear layers and experts in 8 bits.

    ``recipe`` of linear layers: "current" (Float8CurrentScaling: a scale per tensor) or "block" (Float8BlockScaling: a scale
    per block); ``linear`` and ``experts``: which products.

    Inputs, weights and gradients of the products are rounded to 8 bits (a relative ``2**-4`` for E4M3, ``2**-3`` for E5M2);
    what is between the products stays as it is. Routers' logits and the head keep their precision. Experts have no recipe:
    theirs are rounded with a scale for each row and for each column of a matrix, and their weights' gradients are products in
    bf16, as torchao's ``rowwise_with_gw_hp`` has it. Transformer Engine 2.20 runs grouped FP8 one cuBLAS call an expert.
    """

    recipe: str = "current"
    linear: bool = True
    experts: bool = True
    name: ClassVar[str] = "fp8"

    def __post_init__(self) -> None:
        if self.recipe not in _recipes():
            raise MoefxError(f"there is no fp8 recipe {self.recipe!r}; there are: {', '.join(_recipes())}")

    def _usable(self, plan: Plan | None) -> dict[Any, tuple[tuple[Backend, ...], str]]:
        """By operation: the backends that can run it in FP8, or why none can; raises MoefxError if there are none at all."""
        first = () if plan is None else plan.backends
        asked = {_LINEAR: self.linear, **dict.fromkeys(_EXPERTS, self.experts)}
        found = {}
        for op, wanted in asked.items():
            found[op] = backends.with_variant(op, self._variant(op), first) if wanted else ((), _NOT_ASKED)
        if not any(usable for usable, _ in found.values()):
            reasons = [why for why in dict.fromkeys(why for _, why in found.values()) if why != _NOT_ASKED]
            why = "; ".join(reasons) or "linear and experts are False"
            raise MoefxError(f"the pass fp8 was asked for, and cannot run: {why}")
        return found

    def _variant(self, op: Any) -> str:
        return f"fp8_{self.recipe}" if op is _LINEAR else "fp8"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Gives the linear layers and experts of ``function`` the FP8 variants of their kernels.

        Raises:
            MoefxError: no backend has any of those that were asked for on this machine.
        """
        changes, found = Changes(), self._usable(plan)
        for node in function.graph.nodes:
            if not is_call(node, *found):
                continue
            usable, reason = found[node.target]
            prefix = "" if node.target is _LINEAR else f"{op_name(node.target)} keeps its precision: "
            why = reason or self._keeps_precision(node, function.name) or self._lower(node, usable, changes)
            if why:
                changes.miss(node, prefix + why)
        return changes

    def _lower(self, node: fx.Node, usable: tuple[Backend, ...], changes: Changes) -> str | None:
        """Gives ``node`` the first kernel that accepts it; or says why none does."""
        op: Any = node.target
        choices, refusals = backends.accepting(node, usable, self._variant(op))
        if not choices:
            return "; ".join(sentence for _, sentence in refusals)
        choices[0].apply(node, self.name)
        changes.did(node, f"{op_name(op)} -> {choices[0].backend.name} in FP8, numerics change: {choices[0].why}")
        return None

    @staticmethod
    def _keeps_precision(node: fx.Node, function: str) -> str | None:
        if node.target is not _LINEAR:
            return None
        if function == "head":
            return "the head keeps its precision"
        if _reads(node, _ROUTERS):
            return "these are a router's logits: in FP8 tokens would go to other experts"
        return None


def _reads(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    """Does one of ``targets`` read the node, directly or through views and casts?"""
    return any(u.target in targets or (u.target in VIEWS and _reads(u, targets)) for u in node.users)
