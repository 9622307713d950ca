"""What a captured graph costs, as formulas: FLOPs, bytes read and written, bytes sent between ranks.

Sizes are the symbols B, S (batch and sequence of one rank), ep and those of ``Program.symbols`` (H, I, E, K, A, D, V, L). A
number that is none of them, or two of them at once, stays a number. FLOPs count a multiply-add as two; only matrix products
are counted as FLOPs, everything else as the bytes that it moves. Formulas are of the forward; the backward of a matrix product
costs twice its forward.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from . import exchange, grouped, ops
from .errors import MoefxError
from .graph import VIEWS, aten, value
from .plan import Plan
from .program import Function, Program

B, S, EP = sympy.symbols("B S ep", positive=True, integer=True)
_MATRIX = (aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default)


@dataclass(frozen=True)
class Cost:
    """Of a forward: ``flops``; ``read``, ``written``, ``sent`` in bytes. Sympy expressions; costs add and multiply."""

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
        return self.flops, self.read, self.written, self.sent

    def evaluate(self, sizes: dict[str, int]) -> tuple[float, float, float, float]:
        """The four numbers; raises MoefxError naming a symbol that ``sizes`` lacks."""
        numbers = []
        for part in self.parts:
            missing = sorted(str(s) for s in part.free_symbols if str(s) not in sizes)
            if missing:
                raise MoefxError(f"the cost depends on {missing[0]}, which has no value: pass {missing[0]}=...")
            numbers.append(float(part.subs({s: sizes[str(s)] for s in part.free_symbols})))
        return numbers[0], numbers[1], numbers[2], numbers[3]


class Sizes:
    """Turns the sizes of a function's tensors into symbols."""

    def __init__(self, function: Function, symbols: dict[str, int]):
        self.names: dict[int, sympy.Symbol] = {}
        for name, number in symbols.items():
            taken = number in self.names
            self.names[number] = sympy.Symbol(name, positive=True, integer=True)
            if taken:
                del self.names[number]  # two meanings: keep the number
        self.dynamic: dict[Any, sympy.Expr] = {}
        inputs = [n for n in function.graph.nodes if n.op == "placeholder"][
            len(function.parameters) + len(function.constants) :
        ]
        for node, sizes in zip(inputs, function.call.sizes):
            for size, letter in zip(value(node).shape, sizes):
                if isinstance(size, torch.SymInt) and letter in ("a", "b"):
                    self.dynamic.setdefault(size.node.expr, B if letter == "a" else S)
        self.rows = B * S * self.known(symbols.get("K", 1))

    def known(self, number: int) -> sympy.Expr:
        return self.names.get(number, sympy.Integer(number))

    def size(self, n: Any) -> sympy.Expr:
        if not isinstance(n, torch.SymInt):
            return self.known(int(n)) if int(n) > 4 else sympy.Integer(int(n))
        expression = n.node.expr
        found = expression.subs(self.dynamic)
        # rows that arrive from other ranks: as many as leave, if routing is balanced
        return found if found.free_symbols <= {B, S} else self.rows

    def elements(self, val: Any) -> sympy.Expr:
        return sympy.Mul(*(self.size(n) for n in val.shape))

    def bytes(self, val: Any) -> sympy.Expr:
        if isinstance(val, (tuple, list)):
            return sympy.Add(*(self.bytes(v) for v in val))
        return self.elements(val) * val.element_size() if isinstance(val, Tensor) else sympy.Integer(0)


def node_cost(node: fx.Node, sizes: Sizes, ep_size: int = 1) -> Cost:
    """The cost of one call; views are free. ``dispatch`` and ``combine`` send all but the rank's own share of rows."""
    op = node.meta.get("semantic", node.target)
    if (
        node.op != "call_function"
        or op in VIEWS
        or op is operator.getitem
        or not isinstance(value(node), (Tensor, tuple, list))
    ):
        return Cost()
    inputs = [value(a) for a in node.all_input_nodes if isinstance(value(a), (Tensor, tuple, list))]
    read = sympy.Add(*(sizes.bytes(v) for v in inputs))
    flops, sent = sympy.Integer(0), sympy.Integer(0)
    given = list(node.args)
    if op in _MATRIX:
        matrix = value(given[0])
        weights = value(given[1])
        inner = sizes.size(matrix.shape[-1]) if op is not aten.addmm.default else sizes.size(weights.shape[-1])
        flops = 2 * sizes.elements(value(node)) * inner
    elif op is ops.experts:
        up, down = value(given[3]), value(given[5])
        flops = 2 * sizes.rows * _matrix(sizes, up) + 2 * sizes.rows * _matrix(sizes, down)
    elif op is grouped.grouped_mlp:
        up, down = value(given[2]), value(given[4])
        flops = 2 * sizes.rows * _matrix(sizes, up) + 2 * sizes.rows * _matrix(sizes, down)
    elif op is ops.attention:
        q, k, v = (value(a) for a in given[:3])
        pairs = sizes.elements(q) / sizes.size(q.shape[-1]) * sizes.size(k.shape[2])
        share = sympy.Rational(1, 2) if given[3] is None and node.kwargs.get("is_causal", True) else 1
        flops = 2 * pairs * (sizes.size(q.shape[-1]) + sizes.size(v.shape[-1])) * share
    elif op is ops.linear_cross_entropy:
        flops = 2 * sizes.elements(value(given[0])) * sizes.size(value(given[1]).shape[0])
    elif op in (exchange.dispatch, exchange.combine):
        rows = value(given[0])
        sent = sizes.rows * sizes.size(rows.shape[-1]) * rows.element_size() * (EP - 1) / EP
    return Cost(flops, read, sizes.bytes(value(node)), sent)


def _matrix(sizes: Sizes, weight: Tensor) -> sympy.Expr:
    """Elements of one expert's matrix [E, a, b]; 2I is recognised where a gate and an up projection share it."""

    def one(n: int) -> sympy.Expr:
        half = sizes.known(n // 2)
        return 2 * half if n % 2 == 0 and half.free_symbols and not sizes.known(n).free_symbols else sizes.known(n)

    return one(int(weight.shape[1])) * one(int(weight.shape[2]))


def function_cost(function: Function, symbols: dict[str, int], ep_size: int = 1) -> Cost:
    """The cost of one call of ``function``."""
    sizes = Sizes(function, symbols)
    return sum((node_cost(n, sizes, ep_size) for n in function.graph.nodes), Cost())


@dataclass(frozen=True)
class ProgramCost:
    """Per function (cost of one call, instances) and in total; ``print`` shows formulas, and numbers at ``sizes``."""

    functions: dict[str, tuple[Cost, int]]
    sizes: dict[str, int]

    @property
    def total(self) -> Cost:
        return sum((cost * many for cost, many in self.functions.values()), Cost())

    def evaluate(self, **sizes: int) -> tuple[float, float, float, float]:
        """(FLOPs, bytes read, bytes written, bytes sent) of a forward of one rank at these sizes."""
        return self.total.evaluate({**self.sizes, **sizes})

    def __str__(self) -> str:
        from rich.table import Table

        from .show import render

        known = ", ".join(f"{k}={v}" for k, v in self.sizes.items())
        table = Table(
            "function",
            "times",
            "TFLOP",
            "GB read",
            "GB written",
            "GB sent",
            title=f"forward of one rank at {known}",
            title_justify="left",
        )
        formulas = []
        for name, (cost, many) in self.functions.items():
            table.add_row(name, str(many), *_numbers((cost * many).evaluate(self.sizes)))
            formulas.append(
                f"{name}: FLOPs = {sympy.factor(cost.flops)}"
                + (f"; bytes sent = {sympy.factor(cost.sent)}" if cost.sent != 0 else "")
            )
        table.add_row("total", "", *_numbers(self.evaluate()))
        return render(table, *formulas)


def _numbers(parts: tuple[float, ...]) -> list[str]:
    return [f"{parts[0] / 1e12:.3g}", *(f"{p / 1e9:.3g}" for p in parts[1:])]


def program_cost(program: Program, plan: Plan, **sizes: int) -> ProgramCost:
    """Costs of the functions that a training forward runs; ``sizes`` (default B=1, S=4096) are what ``print`` evaluates at.

    Functions captured later for other kinds of calls of the same modules are left out: a forward runs one of them.
    """
    seen: set[str] = set()
    functions = {}
    for f in program:
        if f.instances and f.instances[0] not in seen:
            seen.update(f.instances)
            functions[f.name] = (function_cost(f, program.symbols, plan.ep_size), len(f.instances))
    return ProgramCost(functions, {**program.symbols, "ep": plan.ep_size, "B": 1, "S": 4096, **sizes})
