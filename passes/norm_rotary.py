"""Fuses the norm of query and key heads with their rotary embedding to ``moefx.norm_rotary``: one pass over memory, not two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from moefx import ops
from moefx.ir.graph import arguments, aten, describe, emit, getitems, inherit, is_call, replace, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class NormRotary:
    """``rotary(norm(q).transpose(1, 2), norm(k).transpose(1, 2), cos, sin)`` becomes ``norm_rotary`` of q and of k.

    So does ``rotary(norm(q), norm(k), cos, sin, unsqueeze_dim=2)`` (Gemma 4), whose results are transposed. Bitwise: the body
    of the operation is the same norm and rotation.
    """

    name: ClassVar[str] = "norm_rotary"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Fuses each rotation whose query and key are normalized."""
        changes = Changes()
        for rotary in [n for n in function.graph.nodes if is_call(n, ops.rotary)]:
            given = arguments(rotary)
            found = [self._norm(given[name], given["unsqueeze_dim"]) for name in ("q", "k")]
            norms = [n for n in found if n is not None]
            if len(norms) < 2:
                continue  # no norms before this rotation
            late = [n for n in norms if arguments(n)["weight"] is not None and arguments(n)["weight"].op != "placeholder"]
            if late:
                changes.miss(rotary, f"the weight of {describe(late[0])} is computed")
                continue
            for i, norm in enumerate(norms):
                self._fuse(rotary, i, norm, given)
            function.graph.erase_node(rotary)
            changes.did(norms[0], "moefx.norm_rotary for the norms of query and key and their rotation")
        return changes

    @staticmethod
    def _norm(x: fx.Node, heads: int) -> fx.Node | None:
        """The norm [B, S, A, D] that ``x`` is, or whose transpose [B, A, S, D] it is."""
        if heads == 1 and (not is_call(x, aten.transpose.int) or {*x.args[1:]} != {1, 2}):
            return None
        norm = x.args[0] if heads == 1 else x
        return norm if is_call(norm, ops.rms_norm) and value(norm).dim() == 4 else None  # type: ignore[return-value]

    @staticmethod
    def _fuse(rotary: fx.Node, i: int, norm: fx.Node, tables: dict[str, Any]) -> None:
        given = arguments(norm)
        options = {"cast_first": given["cast_first"], "offset": given["offset"], "layout": tables["layout"]}
        old = getitems(rotary).get(i)
        if old is None:
            return
        args = (given["x"], given["weight"], tables["cos"], tables["sin"], given["eps"])
        new = emit(rotary, ops.norm_rotary, *args, **options)
        inherit(new, [norm, rotary])
        if tables["unsqueeze_dim"] != 1:
            new = emit(rotary, aten.transpose.int, new, 1, 2)
        replace(old, new)
