"""Raises the rotary embedding of a query and its key, which read the same tables, to one ``moefx.rotary``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from moefx import ops
from moefx.ir.graph import VIEWS, aten, describe, emit, inherit, insert, is_call, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.certify import certify
from moefx.rewriting.pattern import Match, Pattern, f64
from moefx.rewriting.pipeline import Changes
from moefx.rewriting.raise_ops import replace_outputs


@cache
def _patterns() -> tuple[tuple[str, Pattern], ...]:
    def one(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
        return ops.apply_rotary(x, cos, sin, layout)

    def pattern(layout: str) -> Pattern:
        table = (2, 1, 3, 8 if layout in ("half", "pairs") else 4)
        return Pattern(one, {"x": f64(2, 5, 3, 8), "cos": f64(*table), "sin": f64(*table)}, {"layout": layout}, {4: "half"})

    def as_complex(
        x: Tensor, angles: Tensor, flattened: bool
    ) -> Tensor:  # DeepSeek-V2; Llama 4, whose flatten is traced as a view
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * angles)
        return (turned.flatten(3) if flattened else turned.reshape(x.shape)).to(x.dtype)

    example = {"x": f64(2, 5, 3, 8), "angles": torch.ones(2, 1, 3, 4, dtype=torch.complex64)}
    complex_numbers = [Pattern(as_complex, example, {"flattened": f}, {4: "half"}) for f in (True, False)]
    return (*((layout, pattern(layout)) for layout in ops.ROTARY_LAYOUTS), *(("complex", p) for p in complex_numbers))


def _tables(match: Match) -> tuple[fx.Node, ...]:
    return tuple(n for name, n in match.bound.items() if name in ("cos", "sin", "angles"))


def _origin(table: fx.Node) -> tuple[Any, ...]:
    """Equal for the tables of a query and its key, even if each unsqueezes the table by itself (Llama 4)."""
    return table.args if is_call(table, aten.unsqueeze.default) else (table,)


def _heads_dim(table: fx.Node) -> int | None:
    """The dimension that a table [B, 1, S, D'] or [B, S, 1, D'] broadcasts over heads."""
    if is_call(table, aten.unsqueeze.default):
        return table.args[1]  # type: ignore[return-value]
    ones = [d for d in (1, 2) if value(table).dim() == 4 and value(table).shape[d] == 1]
    return ones[0] if len(ones) == 1 else None


@dataclass(frozen=True)
class Rotary:
    """Matches the rotation of each tensor, then pairs those that read the same tables: the query comes first in the graph."""

    name: ClassVar[str] = "rotary"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Raises each pair of rotations, after certification."""
        changes = Changes()
        groups: dict[tuple[Any, ...], list[Match]] = {}
        for node in function.graph.nodes:
            for layout, pattern in _patterns():
                if node.target is not pattern.anchor and not is_call(node, aten._to_copy.default):
                    continue
                found = pattern.match(node)
                if isinstance(found, Match):
                    groups.setdefault((layout, *map(_origin, _tables(found))), []).append(found)
                elif found.depth > 3:
                    changes.miss(node, str(found))
        for (layout, *_), matches in groups.items():
            problem = self._pair(function, layout, matches, changes)
            if problem:
                changes.miss(matches[0].node, problem)
        return changes

    @staticmethod
    def _table(table: fx.Node, dim: int) -> fx.Node:
        """The table without the dimension that broadcasts over heads."""
        if is_call(table, aten.unsqueeze.default):
            return table.args[0]  # type: ignore[return-value]
        new = emit(table.next, aten.squeeze.dim, table, dim)
        inherit(new, [table])
        return new

    def _plain(self, layout: str, tables: tuple[fx.Node, ...], dim: int) -> tuple[fx.Node, ...]:
        plain = tuple(self._table(t, dim) for t in tables)
        if layout != "complex":
            return plain
        before = plain[0].next
        parts = tuple(emit(before, ops.rotary_table, plain[0], part) for part in ("cos", "sin"))
        for part in parts:
            inherit(part, [tables[0]])
        return parts

    def _pair(self, function: Function, layout: str, found: list[Match], changes: Changes) -> str | None:
        tables = _tables(found[0])
        if len(found) != 2:
            names = " and ".join(t.name for t in tables)
            return f"{len(found)} tensors are rotated by {names}: expected a query and its key"
        unsqueeze_dim, *others = {_heads_dim(t) for t in tables}
        if others or unsqueeze_dim is None:
            return f"the tables {' and '.join(map(describe, tables))} differ in which dimension they broadcast over heads"
        q, k = (m.bound["x"] for m in found)
        args = (q, k, *self._plain(layout, tables, unsqueeze_dim))
        layout = "pairs" if layout == "complex" else layout
        kwargs = {"layout": layout, "unsqueeze_dim": unsqueeze_dim}
        graph, outputs = function.graph, tuple(m.node for m in found)
        order = {n: i for i, n in enumerate(graph.nodes)}
        before, early = outputs[0], list[fx.Node]()
        if order[k] > order[outputs[0]]:
            early = [u for u in outputs[0].users if order[u] < order[k]]
            # views of the query may move behind the key (Gemma 4)
            if any(u.target not in VIEWS or any(order[r] < order[k] for r in u.users) for u in early):
                return f"the rotated query is read before the key {describe(k)} is computed"
            before = k.next
        nodes = [n for m in found for n in m.nodes]
        near = [t for m in found for t in _tables(m) if is_call(t, aten.unsqueeze.default)]
        region = tuple(n for n in graph.nodes if n in {*nodes, *near})
        agrees, how = certify(region, outputs, ops.rotary, args, kwargs)
        if not agrees:
            return f"it resembles moefx.rotary, but {how}"
        new = insert(before, ops.rotary, args, kwargs, val=tuple(value(o) for o in outputs))
        inherit(new, region)
        replace_outputs(outputs, new)
        for view in early:
            view.all_input_nodes[0].append(view)
        changes.did(new, f"moefx.rotary ({layout}) for {len(region)} nodes, {how}")
        return None
