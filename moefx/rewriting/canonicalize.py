"""One form for equal computations: drops assertions, copies and redundant casts, so that patterns have one form to match."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from moefx.ir.graph import CASTS, arguments, aten, dtype_of, emit, is_call, op_name, replace, value
from moefx.rewriting.pipeline import Changes

_ASSERTIONS = {
    aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
}  # fmt: skip
_COPIES = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.lift_fresh_copy.default}
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints}


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares sizes as expressions: comparing symbols would add guards."""
    return len(a.shape) == len(b.shape) and all(str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True))


def _drop(node: fx.Node, by: fx.Node) -> None:
    """Makes the users of ``node`` read ``by``, which has the same value."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _is_whole(part: fx.Node) -> bool:
    """Whether this is ``x[:]``."""
    given = arguments(part)
    start, end = given.get("start") or 0, given.get("end")
    return start == 0 and given.get("step", 1) == 1 and (end is None or (type(end) is int and end == sys.maxsize))


def _feeds_output(node: fx.Node) -> bool:
    return any(u.op == "output" for u in node.users)


def canonicalize(graph: fx.Graph) -> Changes:
    """Brings a captured graph or a traced pattern into canonical form. Bitwise."""
    changes = Changes()
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is None:
            continue
        before = op_name(node.target)
        if _rewrite(node):
            changes.did(node, before)
    return changes


def _rewrite(node: fx.Node) -> bool:
    x = node.args[0] if node.args else None
    if node.target in _ASSERTIONS:
        if node.target is aten._assert_tensor_metadata.default and isinstance(x, fx.Node):
            # export writes this where the model casts to the dtype that the value already has
            x.meta["identity_cast"] = True
        node.graph.erase_node(node)
        return True
    if node.target in _COPIES and isinstance(x, fx.Node) and not _feeds_output(node):
        _drop(node, x)  # in a functional graph a copy is its source
        return True
    if is_call(node, aten.slice.Tensor) and _is_whole(node) and not _feeds_output(node):
        _drop(node, x)  # type: ignore[arg-type]
        return True
    if is_call(node, aten.dropout.default) and (not node.args[2] or node.args[1] == 0):
        _drop(node, x)  # type: ignore[arg-type]
        return True
    if node.target in CASTS and isinstance(value(node), torch.Tensor):
        return _cast(node, x)
    if is_call(node, aten.softmax.int, aten._softmax.default) and arguments(node).get("dtype") is not None:
        given = arguments(node)
        if dtype_of(given["self"]) == given["dtype"]:
            given["self"].meta["identity_cast"] = True
            node.args, node.kwargs = (given["self"], given["dim"]), {}
            return True
        cast = emit(node, aten._to_copy.default, given["self"], dtype=given["dtype"])
        node.args, node.kwargs = (cast, given["dim"]), {}
        return True
    if is_call(node, aten.copy.default):  # functionalization makes it of `x[...] = y`; autograd has no formula for it
        source = node.args[1]
        if _same_shape(value(source), value(node)) and value(source).dtype == value(node).dtype:
            _drop(node, source)  # type: ignore[arg-type]
            return True
        target = emit(node, aten.expand_as.default, source, node.args[0])
        if value(source).dtype != value(node).dtype:
            target = emit(node, aten._to_copy.default, target, dtype=value(node).dtype)
        replace(node, target)
        return True
    if is_call(node, aten.square.default):  # torch computes it as a power
        node.target, node.args = aten.pow.Tensor_Scalar, (x, 2)
        return True
    if is_call(node, aten.chunk.default):
        dim, size = arguments(node)["dim"], value(x).shape[arguments(node)["dim"]]
        node.target, node.args, node.kwargs = aten.split.Tensor, (x, -(-size // node.args[1]), dim), {}
        return True
    if node.target in _RESHAPES and isinstance(x, fx.Node):
        if _same_shape(value(x), value(node)) and not _feeds_output(node):
            _drop(node, x)
            return True
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a view fails if a kernel returns other strides
            return True
    return False


def _cast(node: fx.Node, x: Any) -> bool:
    val = value(node)
    if value(x).device != val.device:
        return False
    # casts to float64 stay: in a traced pattern they mean "to the dtype of the input"
    if value(x).dtype == val.dtype and val.dtype is not torch.float64 and not (x.op == "placeholder" and _feeds_output(node)):
        x.meta["identity_cast"] = True
        _drop(node, x)
        return True
    if node.target is not aten._to_copy.default or node.kwargs != {"dtype": val.dtype}:
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": val.dtype}
        return True
    return False
