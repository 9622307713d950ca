"""Names of nodes: those of the model's parameters, inputs and modules, and of what operations return."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _Namespace

aten = torch.ops.aten

#: Names of modules in the code of a graph.
_RESERVED = ("torch", "moefx", "aten", "ops", "operator")
#: Key of a parameter's ``node.meta``: its name in the block, "self_attn.q_proj.weight".
_PARAMETER = "moefx_parameter"
#: The result of one of these is named after the module whose parameter it reads.
_OF_A_MODULE = (
    "linear", "linear_to_fp32", "addmm", "mm", "embedding", "rms_norm", "layer_norm", "native_layer_norm", "conv1d", "experts",
)  # fmt: skip
#: Names of outputs that schemas do not name.
_OUTPUTS: dict[str, Sequence[str]] = {
    "route": ("topk_weights", "topk_ids"), "add_rms_norm": ("normed", "residual"), "rotary": ("q_embed", "k_embed"),
    "topk": ("topk_values", "topk_ids"), "max": ("max_values", "max_ids"), "sort": ("sorted_values", "sorted_ids"),
    "dispatch": (
        "permuted_tokens", "permuted_probs", "tokens_per_expert", "row_id_map", "handle", "cpu_metadata", "grad_placeholder",
        "received_tokens",
    ),
    "dispatch_start": (
        "received_tokens", "received_ids", "received_weights", "handle", "cpu_metadata", "tokens_placeholder",
        "weights_placeholder",
    ),
    "dispatch_wait": ("permuted_tokens", "permuted_probs", "tokens_per_expert", "row_id_map", "grad_placeholder"),
    "combine_start": ("returned_tokens", "returned_placeholder"),
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
    """The name for the result of ``op(*args)``, without a number that makes it unique."""
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
    op = source.target if isinstance(source.target, torch._ops.OpOverload) else source.meta.get("semantic", source.target)
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
    """The last part of the name of the module whose parameter is an argument: ``q_proj`` for "self_attn.q_proj.weight"."""
    sources = [_before_casts(a) for a in args if isinstance(a, fx.Node)]
    paths = [a.meta[_PARAMETER] for a in sources if _PARAMETER in a.meta]
    if not paths:
        return ""
    parts = paths[0].split(".")[:-1]
    if parts and parts[-1] in ("gate", "router"):
        return "router_logits"
    return "_".join(parts[-2:] if parts and parts[-1].isdigit() else parts[-1:])


def _is_residual(x: Any) -> bool:
    """Whether this is the residual stream: the block's hidden states, or a sum with them."""
    return isinstance(x, fx.Node) and _base(x.name) in ("hidden_states", "residual")


def _before_casts(x: fx.Node) -> fx.Node:
    while x.op == "call_function" and short_name(x.target) in _CASTS and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x


def _base(name: str) -> str:
    """A name without the number that makes it unique."""
    return re.sub(r"_\d+$", "", name)


def rename_like(new: fx.Node, old: fx.Node) -> None:
    """Gives ``new`` the name of the erased node ``old`` if they differ in their numbers only."""
    if _base(new.name) == _base(old.name):
        new.name = old.name


def name_as_emitted(graph: fx.Graph) -> None:
    """Renames nodes that a pass created by ``graph.call_function``, as :func:`moefx.emit` would have named them."""
    for node in graph.nodes:
        if node.op == "call_function" and _base(node.name) == graph._target_to_str(node.target):
            name = name_of(node.target, node.args)
            if name != _base(node.name):
                node._rename(name)


def input_names(called: Mapping[int, str], signature: Sequence[str], many: int) -> list[str]:
    """Names for the ``many`` tensors of a call, as the call signature names them.

    Args:
        called: index of a tensor -> "position_embeddings 0", or "input 1" for the second positional argument.
        signature: the names of the forward's parameters.
        many: the number of tensors.
    """

    def name(i: int) -> str:
        first, *rest = called.get(i, "tensor").split()
        if first == "input":
            at = int(rest.pop(0)) if rest else 0
            first = signature[at] if at < len(signature) else f"input_{at}"
        return "_".join([first, *rest])

    return [name(i) for i in range(many)]


def name_nodes(graph: fx.Graph, parameters: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """Renames all nodes of a captured graph.

    Args:
        graph: its placeholders are parameters, constants, inputs.
        parameters: "self_attn.q_proj.weight", one per parameter.
        inputs: a name per input.

    Returns:
        The names of the inputs, made unique.
    """
    names = _Namespace()
    for reserved in _RESERVED:
        names.create_name(reserved, None)
    graph._graph_namespace = names
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    constants = ["constant"] * (len(placeholders) - len(parameters) - len(inputs))
    for node, name in zip(placeholders, [*parameters, *constants, *inputs], strict=True):
        node.name = node.target = names.create_name(name.replace(".", "_"), node)
    for node, path in zip(placeholders, parameters, strict=False):
        node.meta[_PARAMETER] = path
    for node in graph.nodes:
        if node.op == "call_function":
            node.name = names.create_name(name_of(node.target, node.args), node)
    return [n.name for n in placeholders[len(placeholders) - len(inputs) :]]
