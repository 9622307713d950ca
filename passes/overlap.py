"""Overlaps the exchange of tokens with computation: with other nodes, and with other chunks of the same tokens."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from torch import fx

from moefx.analysis.cost import Sizes, node_cost
from moefx.analysis.rates import Rates
from moefx.ir.graph import VIEWS, arguments, aten, describe, emit, getitems, inherit, is_call, origin, replace, unpack, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class Overlap:
    """Splits ``dispatch`` into ``dispatch_start`` and ``dispatch_wait``, ``combine`` likewise, with other nodes in between.

    Those are nodes that need neither the rows nor the result (mostly a shared expert), as many as the exchange takes time. With
    ``chunks`` = 2 the tokens are split too:

        start 1, start 2, wait 1, experts 1, combine-start 1, wait 2, experts 2, combine-start 2, combine-wait 1, combine-wait 2

    so that one chunk is exchanged while the other computes; the backward runs in the mirrored order. 0: as many chunks as the
    cost model finds best at ``tokens`` tokens a rank. Numerics: the forward is unchanged; the experts' gradients are sums over
    the chunks.
    """

    name: ClassVar[str] = "overlap"
    chunks: int = 0
    tokens: int = 4096

    def run(self, function: Function, plan: Plan) -> Changes:
        """Rewrites every dispatch of a function, with its experts and its combine."""
        changes = Changes()
        if plan.ep_size == 1:
            return changes
        for node in list(function.graph.nodes):
            if is_call(node) and node.meta.get("semantic", node.target) is dispatch_combine.dispatch:
                problem = self._rewrite(function, node, plan, changes)
                if problem:
                    changes.miss(node, problem)
        return changes

    def _rewrite(self, function: Function, dispatch: fx.Node, plan: Plan, changes: Changes) -> str | None:
        items = getitems(dispatch)
        experts = next((u for u in items[0].users), None) if 0 in items else None
        if experts is None or experts.meta.get("semantic", experts.target) is not grouped.grouped_mlp:
            return f"{items[0].name if items else 'nothing'} of its rows is used by another operation than grouped_mlp"
        weights = arguments(experts)["permuted_probs"]
        if weights is not None and weights is not items.get(1):
            return f"its experts' rows are weighted by {describe(weights)}, not by the weights that it dispatches"
        combine = next(iter(experts.users))
        if combine.meta.get("semantic", combine.target) is not dispatch_combine.combine:
            return f"its experts' rows go to {combine.name}, not to a combine"
        clock = _Clock(function, plan, self.tokens)
        many = self.chunks or clock.best_chunks(dispatch, experts, combine)
        parts = _Chunks(dispatch, experts, combine)
        starts, waits, ends = parts.write(many)
        between = self._independent(function.graph, starts, waits + ends)
        first, second = self._divide(between, clock, clock.exchange(starts[0]), parts.inputs)
        for window, at in ((first, waits[0]), (second, ends[0])):
            for node in window:
                at.prepend(node)
        work, seconds = sum(clock.compute(n) for n in between), clock.exchange(starts[0])
        there, back = (sum(n.target not in VIEWS for n in window) for window in (first, second))
        changes.did(
            starts[0],
            f"chunks={many}: {there} nodes run during dispatch, {back} during combine (about {work * 1e6:.0f} us of work; each "
            f"exchange takes about {seconds * 1e6:.0f} us)",
        )
        return None

    @staticmethod
    def _independent(graph: fx.Graph, starts: list[fx.Node], rest: list[fx.Node]) -> list[fx.Node]:
        """The calls that the exchange does not depend on and that do not depend on it."""
        before, after = _reach(starts, lambda n: n.all_input_nodes), _reach(starts + rest, lambda n: n.users)
        return [n for n in graph.nodes if n.op == "call_function" and n not in before and n not in after]

    @staticmethod
    def _divide(
        nodes: list[fx.Node], clock: _Clock, seconds: float, needed: set[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        """Nodes that run during dispatch, until its ``seconds`` are filled, and nodes that run during combine."""
        first, second, spent = [], [], 0.0
        wanted = _reach(needed, lambda n: n.all_input_nodes)
        for node in nodes:
            if node in wanted or (spent < seconds and not any(n in second for n in node.all_input_nodes)):
                first.append(node)
                spent += clock.compute(node)
            else:
                second.append(node)
        return first, second


def _reach(nodes: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """``nodes`` and all nodes that ``step`` reaches from them."""
    found, todo = set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += list(step(node))
    return found


class _Clock:
    """Seconds of a function's nodes at one sequence of ``tokens`` tokens, on the device that :class:`Rates` knows."""

    def __init__(self, function: Function, plan: Plan, tokens: int):
        self.sizes, self.rates, self.plan = Sizes(function), Rates.of(plan.ep_size), plan
        self.numbers = {**self.sizes.roles, "B": 1, "S": tokens, "ep": plan.ep_size}

    def _seconds(self, node: fx.Node) -> tuple[float, float]:
        return self.rates.seconds(node_cost(node, self.sizes).evaluate(self.numbers))

    def compute(self, node: fx.Node) -> float:
        return self._seconds(node)[0]

    def exchange(self, node: fx.Node) -> float:
        return self._seconds(node)[1]

    def best_chunks(self, dispatch: fx.Node, experts: fx.Node, combine: fx.Node, most: int = 4) -> int:
        """The fastest number of chunks. Each chunk reads all of the rank's weights and waits for two exchanges."""
        if value(dispatch.args[0]).device.type != "cuda":
            return 1  # the CPU that would compute also copies the rows
        there, back, latency = self.exchange(dispatch), self.exchange(combine), self.rates.latency
        flops, read, written, _ = node_cost(experts, self.sizes).evaluate(self.numbers)
        weights = sum(value(w).nbytes for w in experts.args[2:] if w is not None)

        def seconds(n: int) -> float:
            work: float = max(flops / n / self.rates.flops, (weights + (read + written - weights) / n) / self.rates.memory)
            trip = (max(there, back) - latency) / n + latency
            return max(2 * trip + n * work, 2 * n * trip) + n * self.rates.launch

        return min(range(1, most + 1), key=seconds)


class _Chunks:
    """Rewrites a dispatch, its experts and its combine chunk by chunk."""

    def __init__(self, dispatch: fx.Node, experts: fx.Node, combine: fx.Node):
        self.dispatch, self.experts, self.combine = dispatch, experts, combine
        self.inputs = {n for n in experts.all_input_nodes if n not in getitems(dispatch).values()}

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        new = emit(self.combine, target, *args, **kwargs)
        inherit(new, [like])
        return new

    def _cut(self, nodes: tuple[fx.Node, ...], many: int) -> list[list[fx.Node]]:
        """Each of ``nodes`` [T, ...] in ``many`` parts of equal length, but one: from ``i * T // many`` on."""
        if many == 1:
            return [[n] for n in nodes]
        # not tensor_split: that asks for T % many, and a graph would serve one remainder only
        tokens = self._call(aten.sym_size.int, (nodes[0], 0), {}, self.dispatch)
        ends: list[Any] = [0]
        for i in range(1, many):
            times = self._call(operator.mul, (tokens, i), {}, self.dispatch)
            ends.append(self._call(operator.floordiv, (times, many), {}, self.dispatch))
        ends.append(tokens)
        return [
            [self._call(aten.slice.Tensor, (n, 0, a, b), {}, self.dispatch) for a, b in itertools.pairwise(ends)] for n in nodes
        ]

    def write(self, many: int) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
        """The starts of dispatches, their waits, and the waits of combines."""
        where: dict[str, Any] = dict(self.dispatch.kwargs)
        if where.get("capacity"):  # the most tokens that a part of a rank's has
            where["capacity"] = -(-where["capacity"] // many)
        wait_where, group = {n: w for n, w in where.items() if n != "dispatch_dtype"}, {"group": where["group"]}
        x, topk_ids, topk_weights = self._cut(self.dispatch.args, many)  # type: ignore[arg-type]
        transport = getattr(self.dispatch.target, "transport", "")
        starts, waits, ends, sent = [], [], [], []
        for i in range(many):
            given, how = (x[i], topk_ids[i], topk_weights[i]), {**where, "transport": transport}
            start = self._call(dispatch_combine.dispatch_start, given, how, self.dispatch)
            starts.append(self._stands_for(start, self.dispatch, many))
            sent.append(unpack(start))
        returned = []
        for i in range(many):
            waits.append(self._call(dispatch_combine.dispatch_wait, (x[i], *sent[i]), wait_where, self.dispatch))
            waits[-1].meta["share"] = Fraction(1, many)
            rows, probs, tokens_per_expert, row_id_map, placeholder = unpack(waits[-1])
            handle, cpu_metadata = sent[i][3:5]
            own = {"permuted_probs": probs, "arrived": [sent[i][0], row_id_map, cpu_metadata]}
            options = {k: own[k] if k in own and v is not None else v for k, v in self.experts.kwargs.items()}
            done = self._call(self.experts.target, (rows, tokens_per_expert, *self.experts.args[2:]), options, self.experts)
            self._stands_for(done, self.experts, many)
            rows_and_route = (done, topk_ids[i], row_id_map, handle, cpu_metadata, placeholder)
            start = self._call(dispatch_combine.combine_start, rows_and_route, group, self.combine)
            returned.append(unpack(self._stands_for(start, self.combine, many)))
        for i in range(many):
            started = (*returned[i], topk_ids[i], *sent[i][3:5])
            ends.append(self._call(dispatch_combine.combine_wait, started, group, self.combine))
        y = ends[0] if many == 1 else self._call(aten.cat.default, (ends,), {}, self.combine)
        replace(self.combine, y)
        for old in (self.experts, *getitems(self.dispatch).values(), self.dispatch):
            old.graph.erase_node(old)
        return starts, waits, ends

    @staticmethod
    def _stands_for(new: fx.Node, old: fx.Node, many: int) -> fx.Node:
        """``new`` does one of ``many`` parts of what ``old`` does, by the same kernel."""
        new.meta["semantic"], new.meta["share"] = old.meta.get("semantic", old.target), Fraction(1, many)
        new.meta |= {key: old.meta[key] for key in ("choice",) if key in old.meta}
        new.meta["moefx"] = dataclasses.replace(origin(new), kernel=origin(old).kernel, why=origin(old).why)
        return new
