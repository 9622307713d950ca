"""Linear layers of bfloat16 inputs that a model computes in float32, such as routers, on tensor cores."""

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
    """``linear(x.float(), weight)`` with bfloat16 x becomes ``linear_to_fp32(x, weight)``.

    The weight is float32, or a bfloat16 weight cast to float32. DeepSeek-V3 (arXiv 2412.19437), GLM and Nemotron-H compute
    router logits so; on a GPU, GEMMs in float32 are the slowest, though the input has bfloat16 precision only. Numerics: sums
    are those of float32 in another order; gradients are within 2**-16 before they are rounded to bfloat16. The input is rounded
    to bfloat16, as in the model, where Inductor would keep the float32 result of a preceding norm: tokens are routed as in the
    model.
    """

    name: ClassVar[str] = "linear_to_fp32"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Replaces the linear layers that match, each after certification."""
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
                changes.miss(node, f"it resembles moefx.linear_to_fp32, but {how}")
                continue
            new = emit(node, ops.linear_to_fp32, *args)
            inherit(new, [*casts, node])
            replace(node, new)
            changes.did(new, f"moefx.linear_to_fp32, {how}")
        return changes

    @staticmethod
    def _widens(x: fx.Node) -> bool:
        """Whether ``x`` is a cast from bfloat16 to float32."""
        cast = is_call(x, aten._to_copy.default) and dtype_of(x) == torch.float32
        return cast and dtype_of(x.args[0]) == torch.bfloat16
