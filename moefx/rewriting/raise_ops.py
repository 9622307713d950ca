"""The pass that replaces a subgraph by one semantic operation: match a pattern, certify it on numbers, emit the operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moefx.errors import MoefxError
from moefx.ir.graph import aten, describe, emit, inherit, insert, is_call, op_name, replace, unpack, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.ops import BODIES
from moefx.rewriting.certify import certify
from moefx.rewriting.pattern import Match, Miss, Pattern
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class Raise:
    """Replaces every occurrence of an operation's body by the operation.

    Args:
        name: the pass's name.
        op: an operation made by ``moefx.op``.
        example: an input for each tensor parameter (``moefx.f64``), and an unusual number for each number parameter that is
            read from the graph.
        variants: options with which the body is traced, one set for each form that models write. The largest match wins, then
            the one that lacks the fewest casts. A set may replace entries of ``example`` (None: no such input).
        body: the function to trace, if not the operation's own body: the same computation as models write it.
        build: ``(graph, before, match) -> arguments by name``, if the operation takes other arguments than were bound.
        needs: ``variant -> operations`` without which the variant cannot match, so that it need not be traced.

    Raises:
        MoefxError: ``op`` is no operation, or has no body that can be traced.
    """

    name: str
    op: Any
    example: Mapping[str, Any]
    variants: Sequence[Mapping[str, Any]] = ({},)
    body: Callable[..., Any] | None = None
    build: Callable[[fx.Graph, fx.Node, Match], dict[str, Any]] | None = None
    needs: Callable[[Mapping[str, Any]], set[Any]] | None = None
    _cache: dict[int, Pattern] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.op, torch._ops.OpOverload):
            raise MoefxError(f"Raise({self.name!r}) got {self.op!r} as op: make one with moefx.op(schema)")
        if self.body is None and self.op not in BODIES:
            raise MoefxError(f"Raise({self.name!r}): {op_name(self.op)} has no traceable body; pass body=")

    def pattern(self, at: int) -> Pattern:
        """The pattern of the variant with this index."""
        if at not in self._cache:
            given = {**self.example, **self.variants[at]}
            example = {k: v for k, v in given.items() if k in self.example and type(v) not in (bool, str, type(None))}
            fixed = {k: v for k, v in given.items() if k not in example}
            self._cache[at] = _traced(self.body or BODIES[self.op], example, fixed)
        return self._cache[at]

    def patterns(self, graph: fx.Graph) -> list[Pattern]:
        """The patterns that could match in ``graph``, largest first."""
        there = {n.target for n in graph.nodes}
        possible = [i for i, v in enumerate(self.variants) if self.needs is None or self.needs(v) <= there]
        return sorted(map(self.pattern, possible), key=lambda p: -p.size)

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Replaces all matches in the function's graph; near misses are recorded with the node that differs."""
        changes, near_misses = Changes(), []
        covered: set[fx.Node] = set()
        patterns = self.patterns(function.graph)
        # from the end, since the larger of two overlapping matches ends later
        for node in reversed(list(function.graph.nodes)):
            if node.op != "call_function" or node in covered:
                continue
            found, near = self._find(node, covered, patterns)
            if found:
                problem = self.rewrite(function, found, changes)
                if problem:
                    changes.miss(node, problem)
                covered.update(found.nodes)
            elif near is not None:
                near_misses.append((node, near))
        for node, near in near_misses:
            if node not in covered:
                changes.miss(node, str(near))
        changes.made.reverse()
        return changes

    def _find(self, node: fx.Node, covered: set[fx.Node], patterns: list[Pattern]) -> tuple[Match | None, Miss | None]:
        best: Match | None = None
        near: Miss | None = None
        for pattern in patterns:
            if node.target is not pattern.anchor and not is_call(node, aten._to_copy.default):
                continue
            if best is not None and pattern.size < len(best.nodes):
                break
            result = pattern.match(node)
            if isinstance(result, Miss):
                if result.depth and (near is None or (result.depth, result.matched) > (near.depth, near.matched)):
                    near = result
            elif not covered.intersection(result.nodes) and (
                best is None or (len(result.nodes), -result.loose) > (len(best.nodes), -best.loose)
            ):
                best = result
        return best, near

    def call(self, graph: fx.Graph, before: fx.Node, match: Match) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the operation for this match, without those that equal their defaults."""
        bound = {**match.pattern.fixed, **match.bound}
        if self.build is not None:
            bound |= self.build(graph, before, match)
        args, kwargs = [], {}
        for a in self.op._schema.arguments:
            if not a.kwarg_only:
                args.append(bound.get(a.name))
            elif a.name in bound and not (a.has_default_value() and bound[a.name] == a.default_value):
                kwargs[a.name] = bound[a.name]
        return tuple(args), kwargs

    def rewrite(self, function: Function, match: Match, changes: Changes) -> str | None:
        """Replaces a match by the operation. Returns None, or a sentence that says why it cannot."""
        graph, outputs = function.graph, match.outputs
        order = {n: i for i, n in enumerate(graph.nodes)}
        before = min((o for o in outputs if o is not None), key=order.__getitem__)
        late = [v for v in match.bound.values() if isinstance(v, fx.Node) and order[v] > order[before]]
        if late:
            return f"its input {describe(late[0])} is computed after its output {describe(before)}"
        args, kwargs = self.call(graph, before, match)
        agrees, how = certify(match.nodes, outputs, self.op, args, kwargs)
        if not agrees:
            return f"it resembles {op_name(self.op)}, but {how}"
        if len(outputs) == 1:
            node = insert(before, self.op, args, kwargs, val=value(before))
        elif None in outputs:  # an output that the graph does not have
            node = emit(before, self.op, *args, **kwargs)
        else:
            node = insert(before, self.op, args, kwargs, val=tuple(map(value, outputs)))
        inherit(node, match.nodes)
        replace_outputs(outputs, node)
        changes.did(node, f"{op_name(self.op)} for {len(match.nodes)} nodes, {how}")
        return None


#: Traced patterns by body and arguments, for all pipelines of the process: tracing is slow.
_PATTERNS: dict[tuple[Callable[..., Any], str], Pattern] = {}


def _traced(body: Callable[..., Any], example: dict[str, Any], fixed: dict[str, Any]) -> Pattern:
    seen = {k: (tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v for k, v in (example | fixed).items()}
    key = body, repr((seen, list(fixed)))
    if key not in _PATTERNS:
        _PATTERNS[key] = Pattern(body, example, fixed)
    return _PATTERNS[key]


def replace_outputs(outputs: Sequence[fx.Node | None], node: fx.Node) -> None:
    """Replaces ``outputs`` by those of ``node``; None: the graph does not have this output."""
    for old, new in zip(outputs, unpack(node) if len(outputs) > 1 else [node], strict=True):
        if old is not None:
            replace(old, new)
