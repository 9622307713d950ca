"""Gives each semantic operation the first backend's kernel that accepts it, or the fastest, and keeps choice and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moefx import backends
from moefx.backends import tuning
from moefx.ir.graph import op_name
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class Lower:
    """Numerics stay within the rounding that each kernel states; with ``backends=("reference",)`` they are the bodies'."""

    name: ClassVar[str] = "lower"

    def run(self, function: Function, plan: Plan) -> Changes:
        """Lowers every operation of ``function`` that a backend of the plan has a kernel for."""
        changes = Changes()
        for node in function.graph.nodes:
            if not isinstance(node.target, torch._ops.OpOverload) or not backends.known(node.target, plan.backends):
                continue
            choice = backends.choose(node, plan.backends)
            if plan.tune is not None:
                contenders = [c for c in backends.candidates(node, plan.backends) if c.backend.name != "reference"]
                choice = tuning.choose(node, function, contenders or [choice], plan.tune, plan.compile)
            refusals = "; ".join(f"{name} refused: {sentence}" for name, sentence in choice.refusals)
            why = "; ".join(filter(None, (choice.why, refusals)))
            what = f"{op_name(node.target)} -> {choice.backend.name}"
            choice.apply(node, self.name, why=why)
            changes.did(node, what + (f" ({why})" if why else ""))
        return changes
