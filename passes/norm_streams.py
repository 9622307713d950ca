"""A norm and the other readers of its input: their gradients are added where the norm's backward writes its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moefx import backends, ops
from moefx.ir.graph import insert, is_call, origin, replace, unpack, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class NormStreams:
    """A block's first norm reads the residual stream that a later addition reads too.

    Their gradients were added by a kernel of its own; now they are rounded once instead of twice. Runs after ``lower``, where
    the backend that runs the norm has the variant "stream" of it.
    """

    name: ClassVar[str] = "norm_streams"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Replaces the norms of ``function`` whose input has later readers."""
        changes = Changes()
        order = {node: i for i, node in enumerate(function.graph.nodes)}
        for norm in order:
            if not is_call(norm) or norm.meta.get("semantic") is not ops.rms_norm:
                continue
            found = backends.variant_of(norm, "stream")
            if isinstance(found, str):
                continue
            x, *rest = norm.args
            later = [user for user in x.users if is_call(user) and order[user] > order[norm]]
            if not later:
                continue
            new = insert(norm, ops.rms_norm, (x, *rest), norm.kwargs, val=(value(norm), value(x)))
            new.meta["moefx"] = origin(norm)
            found.apply(new, self.name, why=origin(norm).why)
            y, stream = unpack(new)
            for user in later:
                user.replace_input_with(x, stream)
            replace(norm, y)
            changes.did(new, f"its backward adds the gradients of {len(later)} later readers of what it normalises")
        return changes
