"""Fuses a residual addition with the norm of the sum to ``moefx.add_rms_norm``: one pass over memory, not two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moefx import ops
from moefx.ir.graph import aten, describe, emit, inherit, is_call, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.pipeline import Changes
from moefx.rewriting.raise_ops import replace_outputs


@dataclass(frozen=True)
class ResidualRMSNorm:
    """Bitwise: the body of the operation is the same addition and norm."""

    name: ClassVar[str] = "residual_rms_norm"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Fuses each norm of a sum of two equal shapes."""
        changes = Changes()
        for norm in list(function.graph.nodes):
            if not is_call(norm, ops.rms_norm):
                continue
            total = norm.args[0]
            if not is_call(total, aten.add.Tensor):
                continue  # the norm of no sum
            if total.kwargs.get("alpha", 1) != 1 or not all(
                isinstance(value(a), torch.Tensor) and value(a).shape == value(total).shape for a in total.args
            ):
                changes.miss(norm, f"its input {describe(total)} is not a plain sum of two equal shapes")
                continue
            late = [a for a in norm.args[1:] if isinstance(a, torch.fx.Node) and a.op != "placeholder"]
            if late:
                changes.miss(norm, f"its weight is computed: {describe(late[0])}")
                continue
            new = emit(total, ops.add_rms_norm, *total.args, *norm.args[1:], **norm.kwargs)
            inherit(new, [total, norm])
            replace_outputs((norm, total), new)
            changes.did(new, "moefx.add_rms_norm for a sum and its norm")
        return changes
