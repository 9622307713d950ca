"""Raises experts that a model runs on all tokens, mostly on zeros, to ``moefx.route`` and ``moefx.experts``.

Llama 4 multiplies each token by its score for each expert, which is zero unless that expert was selected, and runs every expert
on every token. An expert maps zeros to zeros, so only the selected one counts: one of 16 or 128 GEMMs remains, forward and
backward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moefx import ops
from moefx.ir.graph import aten, emit, inherit, replace, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.certify import certify
from moefx.rewriting.pattern import Match, f64
from moefx.rewriting.pipeline import Changes
from moefx.rewriting.raise_ops import Raise

#: Such a router's options of ``moefx.route``: the sigmoid of the selected logit.
_SCORES = {"score": "sigmoid", "topk_first": True, "fp32": True, "cast": True}
_OPTIONS = {"activation": "swiglu", "transposed": True}


def _dense(x: Tensor, logits: Tensor, up: Tensor, down: Tensor, top_k: int, experts: int) -> Tensor:
    """The form that models write: x [T, H], logits [T, E], up [E, H, 2I], down [E, I, H] -> [T, H]."""
    chosen, index = torch.topk(logits, top_k, dim=1)
    scores = torch.full_like(logits, float("-inf")).scatter(1, index, chosen)
    scores = torch.sigmoid(scores.float()).to(scores.dtype)
    rows = x.repeat(experts, 1) * scores.transpose(0, 1).reshape(-1, 1)
    gate, high = torch.bmm(rows.view(experts, -1, x.shape[1]), up).chunk(2, dim=-1)
    rows = torch.bmm(high * F.silu(gate), down).view(-1, x.shape[1])
    return rows.reshape(experts, -1, x.shape[1]).sum(dim=0)


def _sparse(call: Callable[..., Any], x: Any, logits: Any, up: Any, down: Any) -> Any:
    """The same for the best expert of each token. ``call(op, *args, **kwargs)`` computes a value or emits a node."""
    chosen = call(ops.route, logits, None, 1, **_SCORES)
    weights, index = (call(operator.getitem, chosen, i) for i in (0, 1))
    ones = call(aten.ones_like.default, weights)
    return call(ops.experts, call(aten.mul.Tensor, x, weights), index, ones, up, None, down, None, **_OPTIONS)


def _computed(*given: Tensor) -> Any:
    return _sparse(lambda op, *args, **kwargs: op(*args, **kwargs), *given)


class DenseExperts(Raise):
    """Each token's selected expert instead of all experts, where the others compute zeros."""

    def __init__(self) -> None:
        example = {
            "x": f64(3, 10), "logits": f64(3, 19), "up": f64(19, 10, 14), "down": f64(19, 7, 10), "top_k": 13, "experts": 19,
        }  # fmt: skip
        needs = {aten.topk.default, aten.scatter.src, aten.repeat.default, aten.bmm.default}
        super().__init__("dense_experts", ops.experts, example, body=_dense, needs=lambda _: needs)

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Raises the experts; the function then has routes that can be forced."""
        changes = super().run(function, plan)
        if changes.made:  # now there are experts whose routes can be forced
            function.graph.eliminate_dead_code()
            function.captured = function.copy()
        return changes

    def rewrite(self, function: Function, match: Match, changes: Changes) -> str | None:
        """Replaces a match by ``route`` and ``experts``. Returns None, or a sentence that says why it cannot."""
        given = tuple(match.bound[n] for n in ("x", "logits", "up", "down"))
        if match.bound["top_k"] != 1:
            return f"its {match.bound['top_k']} experts per token each scale their input: moefx.experts has one input per token"
        agrees, how = certify(match.nodes, match.outputs, _computed, given, {})
        if not agrees:
            return f"it resembles experts that run on zeros, but {how}"
        (out,) = match.outputs
        assert out is not None
        made: list[fx.Node] = []

        def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
            made.append(emit(out, op, *args, **kwargs))
            return made[-1]

        experts = _sparse(call, *given)
        for node in made:
            inherit(node, match.nodes)
        replace(out, experts)
        many = value(given[2]).shape[0]
        changes.did(
            experts, f"moefx.experts for {len(match.nodes)} nodes, one of {many} experts per token instead of all, {how}"
        )
        return None
