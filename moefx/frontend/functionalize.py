"""Makes a graph functional in the simple cases; the others are left to ``run_decompositions``, which traces again.

Most blocks write in place only to values of their own (``weights /= weights.sum()``). Here those writes become new values in
microseconds. A write through a view, to an input, or in a ``no_grad`` region is left to PyTorch's functionalization, which
takes 1 to 2 seconds a block.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moefx.ir.graph import aten, is_call, value


def _may_alias(node: fx.Node) -> bool:
    """Could the node's value share memory with one of its inputs?"""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _may_alias(source)
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # by schema (views), or by a composite body that returns its input or a view where it can (reshape, to, contiguous)
    aliases = any(a.alias_info is not None for a in node.target._schema.arguments)
    composite = node.target._can_decompose() and node.target.namespace == "aten"
    return aliases or composite


def _functional(target: Any) -> Any:
    """``aten.div.Tensor`` for ``aten.div_.Tensor``; None if there is no such operation with the same arguments."""
    packet, _, overload = str(target).removeprefix("aten.").partition(".")
    plain = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), overload, None)
    if plain is None or [a.name for a in plain._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    return plain


def _fills_slice(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Is this ``base[..., a:b].copy_(x)``, of a base without other views?"""
    view, source = node.args[0], node.args[1]
    if not (is_call(node, aten.copy_.default) and is_call(view, aten.slice.Tensor) and len(view.users) == 1):  # type: ignore[union-attr]
        return False
    base = view.args[0]  # type: ignore[union-attr]
    same = value(view).shape == value(source).shape and value(view).dtype == value(source).dtype
    others = [u for u in base.users if u is not view and order[u] < order[node]]  # type: ignore[union-attr]
    fills = all(is_call(u, aten.slice.Tensor) and all(is_call(w, aten.copy_.default) for w in u.users) for u in others)
    return same and fills and base.op != "placeholder" and not _may_alias(base) and not node.users  # type: ignore[union-attr,arg-type]


def functionalize(graph: fx.Graph) -> bool:
    """Replaces in-place operations by functional ones. Returns False, with the graph unchanged, if it is not a simple case."""
    changes: list[tuple[fx.Node, Any]] = []
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        if node.op not in ("call_function", "placeholder", "output"):
            return False
        if not is_call(node) or not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        written = node.args[0]
        if _fills_slice(node, order):
            changes.append((node, aten.slice_scatter.default))
            continue
        plain = _functional(node.target) if str(node.target).startswith("aten.") else None
        if plain is None or not isinstance(written, fx.Node) or written.op == "placeholder" or _may_alias(written):
            return False
        if any(_may_alias(u) for u in written.users if order[u] < order[node]):
            return False
        changes.append((node, plain))
    for node, plain in changes:  # in order: a second write to the same value sees the first one's result
        written = node.args[0]
        assert isinstance(written, fx.Node)
        if plain is aten.slice_scatter.default:
            view, written = written, written.args[0]
            assert isinstance(written, fx.Node)
            node.args, node.kwargs = (written, node.args[1], *view.args[1:]), dict(view.kwargs)
            node.meta["val"] = value(written)
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
        node.target = plain
    return True
