"""Shards ``experts`` across ranks: dispatch tokens to the ranks that own them, run the local experts, combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moefx import ops
from moefx.errors import MoefxError
from moefx.ir.graph import arguments, aten, describe, emit, inherit, is_call, replace, unpack, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped
from moefx.rewriting.pipeline import Changes

_WEIGHTS = ("gate_up", "gate_up_bias", "down", "down_bias")
_FACTORS = ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b")


@dataclass(frozen=True)
class ExpertParallel:
    """``experts(x, index, weights, ...)`` becomes

        rows, probs, tokens_per_expert, ... = dispatch(x, index, weights)  # a token once to each rank with one of its experts
        rows = grouped_mlp(rows, tokens_per_expert, local weights, probs)  # E / ep experts; rows weighted, not saved
        y = combine(rows, ...)                                             # sum per token and rank, return, sum over ranks

    Numerics: a row's weight multiplies its activation instead of its result (see ``grouped_mlp``), without another rounding; in
    16 bits a token's sum is rounded once per rank before it is sent (see ``combine``). Sums over tokens in a weight's gradient
    are taken per rank. ``grad_scale`` = 1/ep makes experts' gradients the average over the ranks' losses, as DDP and FSDP
    average the dense ones. Low-rank updates of the weights are replicated on every rank, like dense parameters, and each takes
    the factors of its own experts: their gradients are not scaled, since the mean over ranks divides them already. With
    ``plan.dispatch_dtype`` "fp8" (opt-in) tokens are quantized to be sent: a relative error of up to 2**-4, see
    :mod:`moefx.transports.fp8_rows`.
    """

    name: ClassVar[str] = "expert_parallel"

    def run(self, function: Function, plan: Plan) -> Changes:
        """Rewrites every ``experts`` of a function."""
        changes = Changes()
        if plan.ep_size == 1:
            return changes
        if function.expects.get("dense_experts") and not any(is_call(n, ops.experts) for n in function.graph.nodes):
            raise MoefxError(
                f"ep_size={plan.ep_size}, but the experts of {function.name} run on every token and were not raised to "
                "moefx.experts (the pass dense_experts says why): use ep_size=1"
            )
        for node in list(function.graph.nodes):
            if is_call(node, ops.experts):
                problem = self._rewrite(function, node, plan, changes)
                if problem:
                    changes.miss(node, problem)
        return changes

    def _rewrite(self, function: Function, node: fx.Node, plan: Plan, changes: Changes) -> str | None:
        given = arguments(node)
        num_experts = value(given["gate_up"]).shape[0]
        if ops.has_zero_computation_experts(value(given["gate_up"]), value(given["down"])):
            return f"{value(given['down']).shape[0]} of {num_experts} experts compute: ranks would hold unequal parts"
        if num_experts % plan.ep_size:
            return f"{num_experts} experts cannot be sharded across ep_size={plan.ep_size} ranks"
        owners = {w: given[w] for w in _WEIGHTS if given[w] is not None}
        strange = [w for w in owners.values() if w.op != "placeholder"]
        if strange:
            return f"the experts' weight {describe(strange[0])} is computed in the block, not a parameter of the model"
        local = {w: self._local(function, n, plan) for w, n in owners.items()}
        where = {"num_experts": num_experts, "group": plan.ep_group}
        limited = {**where, "capacity": plan.dispatch_capacity} if plan.dispatch_capacity else dict(where)
        if plan.dispatch_dtype:
            limited["dispatch_dtype"] = plan.dispatch_dtype
        sent = emit(node, dispatch_combine.dispatch, given["x"], given["topk_ids"], given["topk_weights"], **limited)
        rows, probs, tokens_per_expert, *route, received = unpack(sent)
        row_id_map, _, cpu_metadata, _ = route
        options = {k: given[k] for k in ("activation", "alpha", "limit", "transposed", "interleaved")}
        weights = tuple(local.get(w) for w in _WEIGHTS)
        options |= {"grad_scale": plan.experts_gradient_scale, "permuted_probs": probs}
        options["arrived"] = [received, row_id_map, cpu_metadata]
        options |= {f: self._slice(node, given[f], plan) for f in _FACTORS if given[f] is not None}
        done = emit(node, grouped.grouped_mlp, rows, tokens_per_expert, *weights, **options)
        back = emit(node, dispatch_combine.combine, done, given["topk_ids"], *route, **where)
        if value(back).dtype != value(node).dtype:
            back = emit(node, aten._to_copy.default, back, dtype=value(node).dtype)
        replace(node, back)
        share = f"{num_experts // plan.ep_size} of {num_experts} experts a rank"
        sends = "; tokens are sent in FP8: numerics change" if plan.dispatch_dtype else ""
        changes.did(sent, f"dispatch, grouped_mlp, combine: {share}{sends}")
        return None

    @staticmethod
    def _slice(at: fx.Node, factor: fx.Node, plan: Plan) -> fx.Node:
        """The factors of this rank's experts."""
        many = value(factor).shape[0] // plan.ep_size
        first = plan.ep_rank * many
        new = emit(at, aten.slice.Tensor, factor, 0, first, first + many)
        inherit(new, [factor])
        return new

    @staticmethod
    def _local(function: Function, w: fx.Node, plan: Plan) -> fx.Node:
        """A weight, of which this rank has its own experts."""
        with function.fake_mode:
            w.meta["val"] = value(w).new_empty((value(w).shape[0] // plan.ep_size, *value(w).shape[1:]))
        return w
