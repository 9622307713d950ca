"""Products with 16-bit inputs that a model computes in float32, routers' above all, on tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx import ops
from moefx.ir.graph import arguments, aten, dtype_of, emit, inherit, is_call, replace
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.certify import certify
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class LinearToFP32:
    """``linear(x.float(), weight)`` of bfloat16 x, and a weight that is float32 or ``weight.float()`` of bfloat16, becomes
    ``linear_to_fp32(x, weight)``.

    DeepSeek-V3 (arXiv 2412.19437), GLM and Nemotron-H route by such logits: on a GPU they are the slowest kind of product, and
    the input has bfloat16 numbers only. Numerics: sums are those of float32 in another order; a gradient that is rounded to
    bfloat16 lacks 2**-16 of itself before that. And the input is rounded to bfloat16, as in the model, where Inductor would
    keep the float32 numbers of a norm before it: tokens go where the model sends them.
    """

    name: ClassVar[str] = "linear_to_fp32"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        changes = Changes()
        for node in list(function.graph.nodes):
            if not is_call(node, aten.linear.default):
                continue
            given = arguments(node)
            x, weight = given["input"], given["weight"]
            if given["bias"] is not None or not self._widens(x) or dtype_of(weight) != torch.float32:
                continue
            casts = [n for n in (x, weight) if self._widens(n)]
            args = tuple(n.args[0] if n in casts else n for n in (x, weight))
            agrees, how = certify((*casts, node), (node,), ops.linear_to_fp32, args, {})
            if not agrees:
                changes.miss(node, f"it looks like moefx.linear_to_fp32 but {how}")
                continue
            new = emit(node, ops.linear_to_fp32, *args)
            inherit(new, [*casts, node])
            replace(node, new)
            changes.did(new, f"moefx.linear_to_fp32, {how}")
        return changes

    @staticmethod
    def _widens(x: fx.Node) -> bool:
        """Is ``x`` a float32 copy of bfloat16 numbers?"""
        cast = is_call(x, aten._to_copy.default) and dtype_of(x) == torch.float32
        return cast and dtype_of(x.args[0]) == torch.bfloat16
