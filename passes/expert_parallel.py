"""Cuts ``experts`` for expert parallelism: dispatch tokens to the ranks that own them, run the local experts, combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx import exchange, grouped, ops
from moefx.graph import arguments, compute, describe, inherit, insert, is_call, value
from moefx.pipeline import Changes

_WEIGHTS = ("up", "up_bias", "down", "down_bias")


@dataclass(frozen=True)
class ExpertParallel:
    """``experts(x, index, weights, ...)`` becomes

        rows, counts, handle = dispatch(x, index)        # all-to-all over the ep group
        rows = grouped_mlp(rows, counts, local weights)  # E / ep experts
        y = combine(rows, weights, handle)               # all-to-all back, weighted sum per token

    Numerics: the same products; sums over tokens in a weight's gradient are taken per rank. ``grad_scale`` = 1/ep makes
    experts' gradients the average over the ranks' losses, as DDP and FSDP average the dense ones.
    """

    name: ClassVar[str] = "expert_parallel"

    def run(self, function, plan) -> Changes:
        changes = Changes()
        if plan.ep_size == 1:
            return changes
        for node in list(function.graph.nodes):
            if is_call(node, ops.experts):
                problem = self._rewrite(function, node, plan, changes)
                if problem:
                    changes.miss(node, problem)
        return changes

    def _rewrite(self, function, node: fx.Node, plan, changes: Changes) -> str | None:
        graph, given = function.graph, arguments(node)
        num_experts = value(given["up"]).shape[0]
        if num_experts % plan.ep_size:
            return f"{num_experts} experts cannot be cut over ep_size={plan.ep_size} ranks"
        owners = [given[w] for w in _WEIGHTS if given[w] is not None]
        computed = [w for w in owners if w.op != "placeholder"]
        if computed:
            return f"the experts' weight {describe(computed[0])} is computed in the block, not a parameter of the model"
        for w in owners:
            full = value(w)
            with function.fake_mode:
                w.meta["val"] = full.new_empty((num_experts // plan.ep_size, *full.shape[1:]))
        where = {"num_experts": num_experts, "group": plan.ep_group}
        made = []

        def call(op, args, kwargs):
            new = insert(graph, node, op, args, kwargs, val=compute(op, args, kwargs, function.fake_mode))
            made.append(new)
            return new

        sent = call(exchange.dispatch, (given["x"], given["index"]), where)
        rows, counts, handle = (self._item(graph, node, sent, i) for i in range(3))
        options = {k: given[k] for k in ("activation", "alpha", "limit", "transposed", "interleaved")}
        weights = tuple(given[w] for w in _WEIGHTS)
        done = call(grouped.grouped_mlp, (rows, counts, *weights), {**options, "grad_scale": plan.experts_gradient_scale})
        back = call(exchange.combine, (done, given["weights"], handle), where)
        if value(back).dtype != value(node).dtype:
            back = call(torch.ops.aten._to_copy.default, (back,), {"dtype": value(node).dtype})
        for new in [*made, rows, counts, handle]:
            inherit(new, [node], self.name)
        back.meta["val"] = value(node)
        node.replace_all_uses_with(back)
        graph.erase_node(node)
        changes.did(sent, f"dispatch, grouped_mlp, combine: {num_experts // plan.ep_size} of {num_experts} experts a rank")
        return None

    @staticmethod
    def _item(graph: fx.Graph, before: fx.Node, source: fx.Node, i: int) -> fx.Node:
        import operator

        return insert(graph, before, operator.getitem, (source, i), val=value(source)[i])
