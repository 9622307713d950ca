"""Opt-in: experts keep no pre-activations for the backward, which makes them again by one more product. Numerics are the same.

pipeline = moefx.passes.default().after("lower", moefx.passes.RecomputeExperts())
model = moefx.optimize(model, pipeline=pipeline)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from moefx import ops
from moefx.backends import triton
from moefx.ir.graph import is_call, op_name, origin
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.ops.grouped_mlp import grouped_mlp
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class RecomputeExperts:
    """Less memory for one product in seven: of T tokens with K experts a layer keeps T x K x 2I numbers less (with a
    ``dispatch_capacity`` as many as its buffers have room for), and its backward has five products instead of four. Between
    this and gradient checkpointing, which runs the whole block again, attention and the exchange of tokens included.
    """

    name: ClassVar[str] = "recompute_experts"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        changes = Changes()
        for node in function.graph.nodes:
            op = node.meta.get("semantic")
            if not is_call(node) or op not in (ops.experts, grouped_mlp):
                continue
            kernel, by = triton.recomputing(node.target), origin(node).kernel
            if kernel is None:
                changes.miss(node, f"{op_name(op)} by {by} keeps what it keeps: kernels of triton and quack can do without")
                continue
            node.target = kernel
            node.meta["moefx"] = replace(origin(node).touched(self.name), why=f"{origin(node).why}; pre-activations made again")
            changes.did(node, f"{op_name(op)} by {by}: pre-activations are made again in the backward")
        return changes
