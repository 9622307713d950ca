"""Raises the rotary embedding of a query and its key, which share their tables, to one ``moefx.rotary``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import fx

from moefx import ops
from moefx.certify import certify
from moefx.graph import aten, describe, inherit, insert, is_call, value
from moefx.match import Match, Pattern, f64
from moefx.pipeline import Changes
from moefx.raising import replace_outputs


@cache
def _patterns() -> tuple[tuple[str, Pattern], ...]:
    def one(x, cos, sin, layout):
        return ops._rotate(x, cos, sin, layout)

    def pattern(layout: str) -> Pattern:
        table = (2, 1, 3, 8 if layout == "half" else 4)
        return Pattern(one, {"x": f64(2, 5, 3, 8), "cos": f64(*table), "sin": f64(*table)}, {"layout": layout}, {4: "half"})

    return tuple((layout, pattern(layout)) for layout in ops.ROTARY_LAYOUTS)


@dataclass(frozen=True)
class RaiseRotary:
    """Finds the rotation of each tensor, then pairs those that read the same tables: query first, as in the graph."""

    name: ClassVar[str] = "rotary"

    def run(self, function, plan=None) -> Changes:
        changes = Changes()
        groups: dict[tuple, list[Match]] = {}
        for node in function.graph.nodes:
            for layout, pattern in _patterns():
                if node.target is not pattern.anchor:
                    continue
                found = pattern.match(node)
                if isinstance(found, Match):
                    groups.setdefault((layout, found.bound["cos"], found.bound["sin"]), []).append(found)
                elif found.depth > 3:
                    changes.miss(node, str(found))
        for (layout, cos, sin), found in groups.items():
            problem = self._pair(function, layout, cos, sin, found, changes)
            if problem:
                changes.miss(found[0].outputs[0], problem)
        return changes

    def _pair(self, function, layout: str, cos: fx.Node, sin: fx.Node, found: list[Match], changes) -> str | None:
        if len(found) != 2:
            return f"{len(found)} tensors are rotated by {cos.name} and {sin.name}: expected a query and its key"
        dims = {t.args[1] if is_call(t, aten.unsqueeze.default) else None for t in (cos, sin)}
        if len(dims) != 1 or None in dims:
            return f"the tables {describe(cos)} and {describe(sin)} are not unsqueezed alike"
        (unsqueeze_dim,) = dims
        q, k = (m.bound["x"] for m in found)
        args = (q, k, cos.args[0], sin.args[0])
        kwargs = {"layout": layout, "unsqueeze_dim": unsqueeze_dim}
        graph, outputs = function.graph, tuple(m.outputs[0] for m in found)
        order = {n: i for i, n in enumerate(graph.nodes)}
        if order[k] > order[outputs[0]]:
            if any(order[u] < order[k] for u in outputs[0].users):
                return f"the rotated query is read before the key {describe(k)} is computed"
            before = k.next
        else:
            before = outputs[0]
        nodes = [n for m in found for n in m.nodes]
        tables = [t for t in (cos, sin) if t not in nodes]
        region = tuple(n for n in graph.nodes if n in {*nodes, *tables})
        agrees, how = certify(region, outputs, ops.rotary, args, kwargs)
        if not agrees:
            return f"it looks like moefx.rotary but {how}"
        new = insert(graph, before, ops.rotary, args, kwargs, val=tuple(value(o) for o in outputs))
        inherit(new, region, self.name)
        replace_outputs(graph, new, outputs, self.name)
        changes.did(new, f"moefx.rotary ({layout}) for {len(region)} nodes, {how}")
        return None
