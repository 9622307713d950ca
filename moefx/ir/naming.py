"""Names of nodes that a reader of the model knows: of its parameters and inputs, of what operations return."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _Namespace

aten = torch.ops.aten

#: What the code of a graph calls its modules.
RESERVED = ("torch", "moefx", "aten", "ops", "operator")
#: Key of ``node.meta`` of a parameter: its name in the block, "self_attn.q_proj.weight".
PARAMETER = "moefx_parameter"
#: A call of one of these with a parameter is the output of the parameter's module.
_OF_A_MODULE = (
    "linear", "linear_to_fp32", "addmm", "mm", "embedding", "rms_norm", "layer_norm", "native_layer_norm", "conv1d", "experts",
)  # fmt: skip
#: What operations return, where their schemas do not say.
_OUTPUTS: dict[str, Sequence[str]] = {
    "route": ("topk_weights", "topk_ids"), "add_rms_norm": ("normed", "residual"), "rotary": ("q_embed", "k_embed"),
    "topk": ("topk_values", "topk_ids"), "max": ("max_values", "max_ids"), "sort": ("sorted_values", "sorted_ids"),
}  # fmt: skip
_CASTS = ("to", "_to_copy", "type_as")
_NAMES = {
    "attention": "attn_output", "experts": "experts_output", "route_at": "topk_weights",
    "balanced_index": "topk_ids", "cross_entropy_loss": "loss", "linear_cross_entropy": "loss",
}  # fmt: skip


def short_name(op: Any) -> str:
    """``rms_norm`` of ``moefx.rms_norm.default``, ``mul`` of ``aten.mul.Tensor``, a function's own name."""
    if isinstance(op, torch._ops.OpOverload):
        return op._schema.name.split("::")[1]
    return getattr(op, "__name__", type(op).__name__).lstrip("_") or "call"


def name_of(op: Callable[..., Any], args: Sequence[Any]) -> str:
    """What the result of ``op(*args)`` is called; nodes are named once, when they are made."""
    first = args[0] if args and isinstance(args[0], fx.Node) else None
    if op is operator.getitem and first is not None:
        return _output_name(first, args[1])
    short = short_name(op)
    if short in _CASTS and first is not None:
        return _base(first.name)
    if short == "sym_size" and first is not None and len(args) == 2:
        return f"{first.name}_size_{args[1]}"
    if short in _OF_A_MODULE:
        owner = _module_of(args)
        if owner:
            return owner
    if short == "add" and any(_is_residual(a) for a in args[:2]):
        return "residual"
    return _NAMES.get(short, short)


def _output_name(source: fx.Node, at: Any) -> str:
    op = source.meta.get("semantic", source.target)
    short = short_name(op)
    names = _OUTPUTS.get(short, ())
    if not names and isinstance(op, torch._ops.OpOverload):
        returns = op._schema.returns
        names = [r.name or f"{short}_{i}" for i, r in enumerate(returns)] if len(returns) > 1 else ()
    if isinstance(at, int) and at < len(names):
        owner = _module_of(source.args) if short == "add_rms_norm" and at == 0 else ""
        return owner or names[at]
    return f"{source.name}_part_{at}"


def _module_of(args: Sequence[Any]) -> str:
    """The last name of the module whose parameter stands among the arguments: ``q_proj`` of "self_attn.q_proj.weight"."""
    sources = [_before_casts(a) for a in args if isinstance(a, fx.Node)]
    paths = [a.meta[PARAMETER] for a in sources if PARAMETER in a.meta]
    if not paths:
        return ""
    parts = paths[0].split(".")[:-1]
    if parts and parts[-1] in ("gate", "router"):
        return "router_logits"
    return "_".join(parts[-2:] if parts and parts[-1].isdigit() else parts[-1:])


def _is_residual(x: Any) -> bool:
    """Is this what flows from block to block: the first input, or a sum of it?"""
    return isinstance(x, fx.Node) and _base(x.name) in ("hidden_states", "residual")


def _before_casts(x: fx.Node) -> fx.Node:
    while x.op == "call_function" and short_name(x.target) in _CASTS and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def _base(name: str) -> str:
    """A name without the number that made it unique."""
    return re.sub(r"_\d+$", "", name)


def rename_like(new: fx.Node, old: fx.Node) -> None:
    """Gives ``new`` the name of ``old``, which is gone, if only a number tells them apart."""
    if _base(new.name) == _base(old.name):
        new.name = old.name


def name_as_emitted(graph: fx.Graph) -> None:
    """Names the nodes that a pass has made by ``graph.call_function`` as :func:`moefx.emit` would have."""
    for node in graph.nodes:
        if node.op == "call_function" and _base(node.name) == graph._target_to_str(node.target):
            name = name_of(node.target, node.args)
            if name != _base(node.name):
                node._rename(name)


def input_names(called: Mapping[int, str], signature: Sequence[str], many: int) -> list[str]:
    """Names for the ``many`` tensors of a call: of "input 1", the second positional argument, what ``signature`` calls it."""

    def name(i: int) -> str:
        first, *rest = called.get(i, "tensor").split()
        if first == "input":
            at = int(rest.pop(0)) if rest else 0
            first = signature[at] if at < len(signature) else f"input_{at}"
        return "_".join([first, *rest])

    return [name(i) for i in range(many)]


def name_nodes(graph: fx.Graph, parameters: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """Names all nodes of a captured graph anew; its placeholders are ``parameters``, constants, then ``inputs``.

    Returns the names of the inputs, which differ from those given where two are the same.
    """
    names = _Namespace()
    for reserved in RESERVED:
        names.create_name(reserved, None)
    graph._graph_namespace = names
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    constants = ["constant"] * (len(placeholders) - len(parameters) - len(inputs))
    for node, name in zip(placeholders, [*parameters, *constants, *inputs], strict=True):
        node.name = node.target = names.create_name(name.replace(".", "_"), node)
    for node, path in zip(placeholders, parameters, strict=False):
        node.meta[PARAMETER] = path
    for node in graph.nodes:
        if node.op == "call_function":
            node.name = names.create_name(name_of(node.target, node.args), node)
    return [n.name for n in placeholders[len(placeholders) - len(inputs) :]]
