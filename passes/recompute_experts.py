"""Opt-in: experts keep no pre-activations for the backward, which recomputes them with one extra GEMM. Numerics are the same.

pipeline = moefx.passes.default().after("lower", moefx.passes.RecomputeExperts())
model = moefx.optimize(model, pipeline=pipeline)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moefx import backends, ops
from moefx.ir.graph import is_call, op_name, origin
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.ops.grouped_mlp import grouped_mlp
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class RecomputeExperts:
    """Less memory for one product in seven.

    Of T tokens with K experts a layer keeps T x K x 2I numbers less (with a ``dispatch_capacity`` as many as its buffers have
    room for), and its backward has five products instead of four. Between this and gradient checkpointing, which runs the whole
    block again, attention and the exchange of tokens included. The kernels are the variant "recompute" of the backend that runs
    the experts.
    """

    name: ClassVar[str] = "recompute_experts"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Replaces the kernels of ``function``'s experts, where their backend has the variant."""
        changes = Changes()
        for node in function.graph.nodes:
            op = node.meta.get("semantic", node.target)
            if not is_call(node) or op not in (ops.experts, grouped_mlp):
                continue
            found, by = backends.variant_of(node, "recompute"), origin(node).kernel
            if isinstance(found, str):
                changes.miss(node, found)
                continue
            found.apply(node, self.name, why=f"{origin(node).why}; pre-activations recomputed")
            changes.did(node, f"{op_name(op)} by {by}: the backward recomputes pre-activations")
        return changes
