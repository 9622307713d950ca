"""A norm and the other readers of its input: their gradients are added where the norm's backward writes its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moefx import ops
from moefx.backends import triton
from moefx.ir.graph import insert, is_call, origin, replace, unpack, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class NormStreams:
    """A block's first norm reads the residual stream that a later addition reads too. Their gradients were added in a pass of
    its own over memory; rounded once instead of twice. Runs after ``lower``: only the triton backend's norm can.
    """

    name: ClassVar[str] = "norm_streams"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        changes = Changes()
        order = {node: i for i, node in enumerate(function.graph.nodes)}
        for norm in order:
            if not is_call(norm, triton.rms_norm):
                continue
            x, *rest = norm.args
            later = [user for user in x.users if is_call(user) and order[user] > order[norm]]
            if not later:
                continue
            new = insert(norm, triton.normed_stream, (x, *rest), norm.kwargs, val=(value(norm), value(x)))
            new.meta |= {"semantic": ops.rms_norm, "moefx": origin(norm).touched(self.name)}
            y, stream = unpack(new)
            for user in later:
                user.replace_input_with(x, stream)
            replace(norm, y)
            changes.did(new, f"its backward adds the gradients of {len(later)} later readers of what it normalises")
        return changes
