"""Returns each router's selected experts from its function; in a replaying function, takes them as inputs."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import fx

from moefx import ops
from moefx.ir.graph import VIEWS, arguments, aten, describe, emit, is_call, replace, unpack, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function, RouterOutputs
from moefx.rewriting.pipeline import Changes

#: What ``route_at`` is given besides logits, bias and index.
_GIVEN = ("expert_scale", *(f.name for f in fields(ops.TopkWeightsSpec)))


@dataclass(frozen=True)
class ExposeRoutes:
    """Each router's choice becomes an output. For ``route(logits, ...)`` before ``experts(x, topk_ids, topk_weights, ...)``:

        return ..., topk_ids  # for load metrics, recording and recomputation

    and in a function made by ``Function.replaying``

        topk_ids = where(routes_are_forced, forced_topk_ids, topk_ids)
        topk_weights = route_at(logits, bias, topk_ids)

    With ``plan.balanced_routing`` topk_ids is ``balanced_index(logits)``, for benchmarks only. If the plan needs them, the
    router's logits, or the number of those that are not finite, are returned too. Numerics: ``route_at`` is ``route`` without
    its top-k.
    """

    name: ClassVar[str] = "expose_routes"

    def run(self, function: Function, plan: Plan) -> Changes:
        """Adds the outputs, and records them in ``function.routes``."""
        changes, found = Changes(), []
        for i, experts in enumerate([n for n in function.graph.nodes if is_call(n, ops.experts)]):
            given = arguments(experts)
            route = self._route(given["topk_ids"])
            not_replayable = "" if route is not None else f"{describe(given['topk_ids'])} is not an output of a moefx.route"
            if route is None:
                changes.miss(experts, not_replayable)
            elif function.forced_inputs or plan.balanced_routing:
                self._choose(function, route, plan, i)
            found.append(self._return(function, experts, route, not_replayable, plan))
            changes.did(experts, f"its topk_ids are output {found[-1].topk_ids}")
        function.routes = tuple(found)
        return changes

    @staticmethod
    def _route(index: fx.Node) -> fx.Node | None:
        """The ``route`` of which ``index`` is the second output."""
        while is_call(index) and index.target in VIEWS and index.target is not operator.getitem:
            index = index.args[0]  # type: ignore[assignment]
        here = is_call(index, operator.getitem) and index.args[1] == 1 and is_call(index.args[0], ops.route)
        return index.args[0] if here else None  # type: ignore[return-value]

    @staticmethod
    def _choose(function: Function, route: fx.Node, plan: Plan, at: int) -> None:
        """Replaces the experts that ``route`` selects, by those of the plan or of the function's inputs."""
        given, (weights, chosen) = arguments(route), unpack(route)
        after, index = chosen.next, chosen
        if plan.balanced_routing:
            index = emit(after, ops.balanced_index, given["logits"], given["top_k"])
        if function.forced_inputs:
            known = {n.name: n for n in function.graph.nodes if n.op == "placeholder"}
            index = emit(after, aten.where.self, known[function.forced_inputs[-1]], known[function.forced_inputs[at]], index)
        of_index = emit(after, ops.route_at, given["logits"], given["bias"], index, **{k: given[k] for k in _GIVEN})
        replace(weights, of_index)
        chosen.replace_all_uses_with(index, lambda reader: reader is not index)

    def _return(
        self, function: Function, experts: fx.Node, route: fx.Node | None, not_replayable: str, plan: Plan
    ) -> RouterOutputs:
        graph, given = function.graph, arguments(experts)
        output = next(n for n in graph.nodes if n.op == "output")
        results = list(output.args[0])

        def put(node: fx.Node) -> int:
            results.append(node)
            return len(results) - 1

        # as the experts read it: the model may have changed it after the router
        index = put(arguments(experts)["topk_ids"])
        logits = nonfinite = bias = None
        if route is not None:
            of_router = arguments(route)
            logits = put(of_router["logits"]) if plan.router_z_loss else None
            nonfinite = put(emit(route, ops.nonfinite, of_router["logits"])) if plan.check_numerics else None
            bias = self._name(function, of_router["bias"])
        output.args = (tuple(results),)
        path = (self._name(function, given["gate_up"]) or experts.name).rpartition(".")[0]
        num_experts, top_k = value(given["gate_up"]).shape[0], value(given["topk_ids"]).shape[1]
        return RouterOutputs(path, index, num_experts, top_k, bias, logits, nonfinite, not_replayable)

    @staticmethod
    def _name(function: Function, node: fx.Node | None) -> str | None:
        """The name of the parameter or buffer that ``node`` is, perhaps cast or reshaped."""
        while is_call(node) and (node.target in VIEWS or node.target is aten.squeeze.default):  # type: ignore[union-attr]
            node = node.args[0]  # type: ignore[assignment,union-attr]
        known = dict(zip(function.placeholders, function.parameters))
        return known.get(node.name) if node is not None else None
