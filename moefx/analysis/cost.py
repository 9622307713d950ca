"""The cost of a node as formulas: FLOPs, bytes read and written, bytes sent between ranks.

Sizes are symbols: B and S (batch size and sequence length of one rank), ep, and those that a function's semantic operations
define: H hidden size, I intermediate size, E experts, K experts per token, A heads, G key/value heads, D head size, V
vocabulary size. A number that stands for two of them in one function (128 experts, heads of 128) stays a number, except where
an operation determines which is meant. A multiply-add counts as two FLOPs. Only matrix products count FLOPs; everything else
counts the bytes that it moves. Formulas are of the forward; the backward of a matrix product costs twice as much. Routing is
assumed to be balanced, with all sets of K experts equally likely: a token then has experts on
``ep * (1 - C(E - E/ep, K) / C(E, K))`` ranks.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moefx import ops, transports
from moefx.errors import MoefxError
from moefx.ir.graph import VIEWS, arguments, aten, origin, value
from moefx.ir.program import Function
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped
from moefx.transports import fp8_rows

B, S, EP = sympy.symbols("B S ep", positive=True, integer=True)
_MATRIX = (aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default)


@dataclass(frozen=True)
class Cost:
    """The cost of a forward: ``flops``, and the bytes ``read``, ``written`` and ``sent``, as sympy expressions.

    Costs can be added, and multiplied by an integer.
    """

    flops: sympy.Expr = sympy.Integer(0)
    read: sympy.Expr = sympy.Integer(0)
    written: sympy.Expr = sympy.Integer(0)
    sent: sympy.Expr = sympy.Integer(0)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.parts, other.parts)))

    def __mul__(self, many: int) -> Cost:
        return Cost(*(a * many for a in self.parts))

    @property
    def parts(self) -> tuple[sympy.Expr, ...]:
        """``(flops, read, written, sent)``."""
        return self.flops, self.read, self.written, self.sent

    def evaluate(self, sizes: dict[str, int]) -> tuple[float, float, float, float]:
        """``parts`` as numbers.

        Raises:
            MoefxError: ``sizes`` lacks a symbol of the formulas.
        """
        numbers = []
        for part in self.parts:
            missing = sorted(str(s) for s in part.free_symbols if str(s) not in sizes)
            if missing:
                raise MoefxError(f"the cost depends on {missing[0]}, which has no value: pass {missing[0]}=...")
            numbers.append(float(part.subs({s: sizes[str(s)] for s in part.free_symbols})))
        return numbers[0], numbers[1], numbers[2], numbers[3]


def _roles(function: Function) -> dict[str, int]:
    """The values of the symbols, read from the function's semantic operations."""
    found: dict[str, int] = {}

    def define(**numbers: Any) -> None:
        for name, number in numbers.items():
            if isinstance(number, int):
                found.setdefault(name, number)

    for node in function.graph.nodes:
        op = node.meta.get("semantic", node.target)
        if op in (ops.experts, grouped.grouped_mlp):
            given = arguments(node)
            x, down = value(given["x" if op is ops.experts else "permuted_tokens"]), value(given["down"])
            define(H=x.shape[-1], I=down.shape[1 if given["transposed"] else 2])
            define(E=down.shape[0]) if op is ops.experts else None
        elif op is dispatch_combine.dispatch:
            define(E=arguments(node)["num_experts"], K=value(arguments(node)["topk_ids"]).shape[1])
        elif op is ops.route:
            define(E=value(arguments(node)["logits"]).shape[-1], K=arguments(node)["top_k"])
        elif op is ops.attention:
            q, k = value(arguments(node)["q"]), value(arguments(node)["k"])
            define(A=q.shape[1], G=k.shape[1], D=q.shape[3])
        elif op is ops.linear_cross_entropy:
            weight = value(arguments(node)["weight"])
            define(V=weight.shape[0], H=weight.shape[1])
    return found


class Sizes:
    """Translates the sizes of a function's tensors into symbols."""

    def __init__(self, function: Function):
        self.roles = _roles(function)
        numbers = list(self.roles.values())
        self.names = {n: _symbol(name) for name, n in self.roles.items() if numbers.count(n) == 1 and n > 4}
        self.dynamic: dict[Any, sympy.Expr] = {}
        inputs = [n for n in function.graph.nodes if n.op == "placeholder"][
            len(function.parameters) + len(function.constants) :
        ]
        for node, sizes in zip(inputs, function.call.sizes):
            for size, letter in zip(value(node).shape, sizes):
                if isinstance(size, torch.SymInt) and letter in ("a", "b"):
                    self.dynamic.setdefault(size.node.expr, B if letter == "a" else S)
        self.rows = B * S * self.role("K") if "K" in self.roles else B * S

    def role(self, name: str) -> sympy.Expr:
        """The symbol of a role: "H", "E", ..."""
        return _symbol(name)

    def size(self, n: Any) -> sympy.Expr:
        """One size, an int or SymInt, as an expression."""
        if not isinstance(n, torch.SymInt):
            return self.names.get(int(n), sympy.Integer(int(n)))
        found = n.node.expr.subs(self.dynamic)
        # rows received from other ranks: as many as are sent, if routing is balanced
        return found if found.free_symbols <= {B, S} else self.rows

    def elements(self, val: Any) -> sympy.Expr:
        """The number of elements of a tensor."""
        return sympy.Mul(*(self.size(n) for n in val.shape))

    def bytes(self, val: Any) -> sympy.Expr:
        """The bytes of a tensor, or of all tensors of a tuple; 0 for anything else."""
        if isinstance(val, (tuple, list)):
            return sympy.Add(*(self.bytes(v) for v in val))
        if not isinstance(val, Tensor) or (val.dim() and all(isinstance(s, int) and s == 0 for s in val.stride())):
            return sympy.Integer(0)  # the links of an exchange have a shape and no memory
        return self.elements(val) * val.element_size()

    def of_part(self, share: Any) -> Sizes:
        """The sizes of a call that gets ``share`` of the rows from other ranks."""
        if share == 1:
            return self
        part = copy.copy(self)
        part.rows = self.rows * sympy.Rational(share)
        return part


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, positive=True, integer=True)


def node_cost(node: fx.Node, sizes: Sizes) -> Cost:
    """The cost of one call. Views are free; dispatch and combine send a row per token and *other* rank with its experts."""
    op, sizes = node.meta.get("semantic", node.target), sizes.of_part(node.meta.get("share", 1))
    if (
        node.op != "call_function"
        or op in VIEWS
        or op is operator.getitem
        or not isinstance(value(node), (Tensor, tuple, list))
    ):
        return Cost()
    inputs = [value(a) for a in node.all_input_nodes if isinstance(value(a), (Tensor, tuple, list))]
    results = value(node) if isinstance(value(node), (tuple, list)) else [value(node)]
    # a result that is an input is passed through, not written
    written = sizes.bytes([r for r in results if not any(r is v for v in inputs)])
    read = sympy.Add(*(sizes.bytes(v) for v in inputs))
    if op in _MATRIX:
        return Cost(_matrix_product(node, op, sizes), read, written)
    rule = _RULES.get(op)
    if rule is None:
        return Cost(sympy.Integer(0), read, written)
    flops, sent, instead = rule({**arguments(node), "kernel": origin(node).kernel, "node": node}, sizes)
    return Cost(flops, read if instead is None else instead, written, sent)


def _matrix_product(node: fx.Node, op: Any, sizes: Sizes) -> sympy.Expr:
    inner = value(node.args[1 if op is aten.addmm.default else 0]).shape[-1]
    return 2 * sizes.elements(value(node)) * sizes.size(inner)


def _experts(given: dict[str, Any], sizes: Sizes) -> tuple[Any, Any, Any]:
    """Each of the B*S*K rows is multiplied by one expert's two matrices; the weights of all of a rank's experts are read."""
    spread = "permuted_tokens" in given
    x, up, down = value(given["permuted_tokens" if spread else "x"]), value(given["gate_up"]), value(given["down"])
    h, i, local = sizes.role("H"), sizes.role("I"), sizes.role("E") / (EP if spread else 1)
    halves = up.shape[2 if given["transposed"] else 1] // down.shape[1 if given["transposed"] else 2]  # 2: gate and up
    read = sizes.bytes(x) + local * (halves + 1) * h * i * up.element_size()
    for name, width in (("gate_up_bias", halves * i), ("down_bias", h)):
        bias = given[name]
        read += 0 if bias is None else local * width * value(bias).element_size()
    read += sum(
        sizes.bytes(value(given[n]))
        for n in ("topk_ids", "topk_weights", "tokens_per_expert", "permuted_probs")
        if given.get(n)
    )
    return 2 * sizes.rows * (halves + 1) * h * i, sympy.Integer(0), read


def _attention(given: dict[str, Any], sizes: Sizes) -> tuple[Any, Any, Any]:
    """Counts the pairs of positions that attend: a triangle, the band of a sliding window, or all.

    Packed sequences count as one sequence, an upper bound; a mask beside a window adds nothing to it.
    """
    q, v = value(given["q"]), value(given["v"])
    same = q.shape[3] == v.shape[3]
    widths = 2 * sizes.role("D") if same else sizes.role("D") + sizes.size(v.shape[3])
    length, window = sizes.size(q.shape[2]), given["window"]
    pairs = length * sizes.size(value(given["k"]).shape[2])
    if window is not None:
        near = sympy.Min(length, window)
        pairs = near * (near + 1) / 2 + (length - near) * near
    elif given["is_causal"] and (given["mask"] is None or ops.is_packed(value(given["mask"]))):
        pairs = length * (length + 1) / 2
    return 2 * sizes.size(q.shape[0]) * sizes.role("A") * pairs * widths, sympy.Integer(0), None


def _head(given: dict[str, Any], sizes: Sizes) -> tuple[Any, Any, Any]:
    hidden = value(given["hidden"])
    tokens = sizes.elements(hidden) / sizes.size(hidden.shape[-1])
    return 2 * tokens * sizes.role("H") * sizes.role("V"), sympy.Integer(0), None


def _part(width: sympy.Expr, number: int, dtype: torch.dtype) -> sympy.Expr:
    """Bytes of ``number`` values of a row, ``width`` as a symbol; parts of a row begin at whole 16 bytes."""
    plain = not isinstance(number, int) or number * dtype.itemsize % 16 == 0
    return width * dtype.itemsize if plain else transports.row_bytes((width, dtype))


def _encoded(width: sympy.Expr, number: Any, plain: bool) -> sympy.Expr:
    """Bytes of a hidden state in FP8: a byte a number, four for each 128. ``plain``: its parts are sent one by one."""
    if plain or not isinstance(number, int) or number % (4 * fp8_rows.BLOCK) == 0:  # whole 16 bytes of scales
        return width + 4 * sympy.ceiling(width / fp8_rows.BLOCK)
    return sympy.Integer(transports.row_bytes((number, torch.int8), (fp8_rows.blocks(number), torch.float32)))


def _transport(node: fx.Node) -> tuple[str, int]:
    """The transport of this dispatch (or of its start), and the ranks per node, if these matter.

    By default ``transports.default_transport``; if the graph's process group no longer exists, all-to-all.
    """
    name, given = node.kwargs.get("transport") or getattr(node.target, "transport", ""), arguments(node)
    try:
        group = transports.process_group(given["group"])
    except (RuntimeError, ValueError):
        return str(name) or "all_to_all", 1
    name = name or transports.default_transport(transports.Call(group, given["num_experts"], given["capacity"]))
    return str(name), len(transports.nodes(group)[0])


def _pairs(given: dict[str, Any], sizes: Sizes, transport: tuple[str, int]) -> sympy.Expr:
    """How many rows a rank sends to other ranks: one per token and other rank with one of its experts.

    Hierarchically, with m ranks per node: one per token and other node; then, for the tokens received from the ``ep / m``
    nodes, one per token and other rank of the node.
    """
    tokens, e, k = sizes.size(value(given["topk_ids"]).shape[0]), sizes.role("E"), sizes.role("K")

    def wanted(parts: sympy.Expr) -> sympy.Expr:
        """The probability that a token has an expert on one of so many equal parts."""
        return 1 - sympy.binomial(e - e / parts, k) / sympy.binomial(e, k)

    if transport[0] == "hierarchical":
        nodes, each = EP / transport[1], transport[1]
        return tokens * ((nodes - 1) * wanted(nodes) + nodes * (each - 1) * wanted(EP))
    if given.get("capacity"):
        return (EP - 1) * given["capacity"]
    return tokens * (EP - 1) * wanted(EP)


def _dispatch(given: dict[str, Any], sizes: Sizes) -> tuple[Any, Any, Any]:
    x, top_k, k = value(given["x"]), value(given["topk_ids"]).shape[1], sizes.role("K")
    if given["dispatch_dtype"] == "fp8":
        row = _encoded(sizes.size(x.shape[-1]), x.shape[-1], given["kernel"] == "deepep")
    else:
        row = _part(sizes.size(x.shape[-1]), x.shape[-1], x.dtype)
    transport = _transport(given["node"])
    if given["kernel"] == "deepep":  # int64 experts, float32 weights, where the token came from
        return sympy.Integer(0), _pairs(given, sizes, transport) * (row + 12 * k + 4), None
    row += _part(k, top_k, transports.accumulation_dtype(value(given["topk_weights"]).dtype)) + _part(k, top_k, torch.int32)
    others = EP / transport[1] + transport[1] - 2 if transport[0] == "hierarchical" else EP - 1
    counts = 0 if given["capacity"] else 16 * others  # tokens and rows for each other rank, int64
    return sympy.Integer(0), _pairs(given, sizes, transport) * row + counts, None


def _combine(given: dict[str, Any], sizes: Sizes) -> tuple[Any, Any, Any]:
    rows = value(given["permuted_tokens"])
    sent = given["row_id_map"].args[0]  # a dispatch, or the wait of one, which gets what its start gave
    capacity = sent.kwargs.get("capacity")
    start = sent.args[1].args[0] if sent.target is dispatch_combine.dispatch_wait else sent
    pairs = _pairs({"capacity": capacity, "topk_ids": given["topk_ids"]}, sizes, _transport(start))
    return sympy.Integer(0), pairs * sizes.size(rows.shape[-1]) * rows.element_size(), None


#: operation -> (arguments, sizes) -> (FLOPs, bytes sent, bytes read or None for all inputs)
_RULES: dict[Any, Any] = {
    ops.experts: _experts, grouped.grouped_mlp: _experts, ops.attention: _attention, ops.linear_cross_entropy: _head,
    dispatch_combine.dispatch: _dispatch, dispatch_combine.combine: _combine,
}  # fmt: skip
