"""Keeps the low-rank updates of experts' matrices factors: x W' + (x A') B' instead of x (W + B A)' (LoRA, arXiv 2106.09685).

A model that trains LoRA adapters of its experts multiplies out W + B A in each forward, as large as all experts, keeps it for
the backward, and computes that matrix's gradient to get those of the factors. This is what PEFT does (``target_parameters``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from moefx import ops
from moefx.ir.graph import arguments, aten, emit, inherit, is_call, value
from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.pipeline import Changes


class _Update(NamedTuple):
    """``scale`` times left [E, m, r] @ right [E, r, n], added to matrices [E, m, n]."""

    left: fx.Node
    right: fx.Node
    scale: float


@dataclass(frozen=True)
class SplitLoRA:
    """Gives ``moefx.experts`` the factors of updates of its matrices, and the matrices without them.

    Several active adapters of any ranks are one: their factors stand one after the other along the rank, and their scales are
    multiplied into B. In 16 bits the sum W + B A is no longer rounded, x A' is, as in a LoRA linear layer.
    """

    name: ClassVar[str] = "split_lora"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Splits the updates of every ``experts`` of ``function``."""
        changes = Changes()
        for node in list(function.graph.nodes):
            if is_call(node, ops.experts):
                for name in ("gate_up", "down"):
                    self._split(node, name, changes)
        if changes.made:
            function.graph.eliminate_dead_code()
        return changes

    @staticmethod
    def _split(node: fx.Node, name: str, changes: Changes) -> None:
        given = arguments(node)
        weight, updates = _without_updates(given[name])
        if not updates:
            return
        if given[f"{name}_lora_a"] is not None:
            changes.miss(node, f"{name} has an update in factors already, and another that is added to it")
            return
        factors = [_factors(node, update, given["transposed"]) for update in updates]
        a, b = (_joined(node, [pair[i] for pair in factors], dim) for i, dim in ((0, 1), (1, 2)))
        node.args = tuple(weight if n is given[name] else n for n in node.args)
        node.kwargs = {**node.kwargs, f"{name}_lora_a": a, f"{name}_lora_b": b}
        rank = value(a).shape[1]
        changes.did(node, f"{name}: rank {rank}, of {len(updates)} adapter{'s' * (len(updates) > 1)}, as factors: no W + B A")


def _without_updates(weight: fx.Node) -> tuple[fx.Node, list[_Update]]:
    """The matrices, and what was added to them, first to last."""
    found: list[_Update] = []
    while True:
        update = _update_of(weight)
        if update is None:
            return weight, found[::-1]
        weight, last = update
        found.append(last)


def _update_of(node: fx.Node) -> tuple[fx.Node, _Update] | None:
    """(matrices, update) if ``node`` is their sum."""
    if is_call(node, aten.baddbmm.default):
        matrices, left, right = node.args
        update = _update(left, right, node.kwargs.get("alpha", 1))
        return _sum(node, matrices, update) if node.kwargs.get("beta", 1) == 1 else None
    if is_call(node, aten.add.Tensor):
        first, second = node.args
        alpha = node.kwargs.get("alpha", 1)
        found = _sum(node, first, _product(second, alpha))
        return found or (_sum(node, second, _product(first, 1)) if alpha == 1 else None)
    return None


def _sum(node: fx.Node, matrices: Any, update: _Update | None) -> tuple[fx.Node, _Update] | None:
    if update is None or not isinstance(matrices, fx.Node) or value(matrices).shape != value(node).shape:
        return None
    return (matrices, update) if value(matrices).dtype == value(update.left).dtype == value(node).dtype else None


def _product(node: Any, scale: Any) -> _Update | None:
    """The update that ``scale`` times ``node`` is: a product of two matrices for each expert, perhaps scaled."""
    while is_call(node, aten.mul.Tensor) and isinstance(node.args[1], int | float):
        node, scale = node.args[0], scale * node.args[1]
    if not is_call(node, aten.bmm.default, aten.matmul.default):
        return None
    left, right = node.args
    return _update(left, right, scale)


def _update(left: Any, right: Any, scale: Any) -> _Update | None:
    shapes = [value(t).shape for t in (left, right)]
    batched = all(len(s) == 3 for s in shapes) and shapes[0][0] == shapes[1][0]
    return _Update(left, right, scale) if batched else None


def _factors(at: fx.Node, update: _Update, transposed: bool) -> tuple[fx.Node, fx.Node]:
    """a [E, r, in] and b [E, out, r], which has the scale; ``transposed``: the matrices are [E, in, out]."""
    made: list[fx.Node] = []

    def call(op: Any, *args: Any, **options: Any) -> fx.Node:
        made.append(emit(at, op, *args, **options))
        return made[-1]

    left, right, scale = update
    a, b = (left, right) if transposed else (right, left)
    if transposed:
        a, b = (call(aten.transpose.int, t, 1, 2) for t in (a, b))
    b = b if scale == 1 else call(aten.mul.Tensor, b, scale)
    for node in made:
        inherit(node, [update.left, update.right])
    return a, b


def _joined(at: fx.Node, factors: list[fx.Node], dim: int) -> fx.Node:
    """One factor, contiguous, of those of all adapters."""
    if len(factors) > 1:
        new = emit(at, aten.cat.default, factors, dim)
    else:
        new = emit(at, aten.clone.default, factors[0], memory_format=torch.contiguous_format)
    inherit(new, factors)
    return new
