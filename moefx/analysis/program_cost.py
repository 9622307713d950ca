"""The costs of a whole program: per function, as formulas and as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from rich.table import Table

from moefx.analysis.cost import Cost, Sizes, node_cost
from moefx.analysis.text import render
from moefx.ir.plan import Plan
from moefx.ir.program import Function, Program


def function_cost(function: Function) -> tuple[Cost, dict[str, int]]:
    """The cost of one call of ``function``, and the values of its symbols."""
    sizes = Sizes(function)
    return sum((node_cost(n, sizes) for n in function.graph.nodes), Cost()), sizes.roles


@dataclass(frozen=True)
class ProgramCost:
    """The cost of one call of each function, and its instances. ``print`` it for formulas, and numbers at ``sizes``."""

    functions: dict[str, tuple[Cost, int]]
    sizes: dict[str, int]  #: B, S, ep and what the caller passed
    roles: dict[str, dict[str, int]]  #: of each function: H, I, E, ...

    def numbers(self, name: str, **sizes: int) -> tuple[float, float, float, float]:
        """(FLOPs, bytes read, bytes written, bytes sent) of one call of a function."""
        return self.functions[name][0].evaluate({**self.roles[name], **self.sizes, **sizes})

    def evaluate(self, **sizes: int) -> tuple[float, float, float, float]:
        """(FLOPs, bytes read, bytes written, bytes sent) of a forward of one rank at these sizes."""
        calls = [(self.numbers(name, **sizes), many) for name, (_, many) in self.functions.items()]
        a, b, c, d = (sum(numbers[i] * many for numbers, many in calls) for i in range(4))
        return a, b, c, d

    def __str__(self) -> str:
        at = ", ".join(f"{k}={v}" for k, v in self.sizes.items())
        table = Table(
            "function",
            "times",
            "TFLOP",
            "GB read",
            "GB written",
            "GB sent",
            title=f"forward of one rank at {at}",
            title_justify="left",
        )
        formulas = Table("function", "of one call", "where", title="formulas", title_justify="left")
        for name, (cost, many) in self.functions.items():
            table.add_row(name, str(many), *_numbers(tuple(n * many for n in self.numbers(name))))
            where = ", ".join(f"{k}={v}" for k, v in self.roles[name].items())
            if cost.flops != 0:
                formulas.add_row(name, f"FLOPs = {_readable(cost.flops)}", where)
            if cost.sent != 0:
                formulas.add_row(name, f"bytes sent = {_readable(cost.sent)}", "")
        table.add_row("total", "", *_numbers(self.evaluate()))
        return render(table, formulas)


def _readable(expression: sympy.Expr) -> str:
    return str(sympy.factor(expression)) if not expression.has(sympy.Min) else str(expression)


def _numbers(parts: tuple[float, ...]) -> list[str]:
    return [f"{parts[0] / 1e12:.3g}", *(f"{p / 1e9:.3g}" for p in parts[1:])]


def program_cost(program: Program, plan: Plan, **sizes: int) -> ProgramCost:
    """Costs of the functions that a training forward runs; ``sizes`` (default B=1, S=4096) are what ``print`` evaluates at.

    Functions captured later for other kinds of calls of the same modules are left out: a forward runs one of them.
    """
    seen: set[str] = set()
    functions, roles = {}, {}
    for f in program:
        if f.instances and f.instances[0] not in seen:
            seen.update(f.instances)
            cost, roles[f.name] = function_cost(f)
            functions[f.name] = (cost, len(f.instances))
    return ProgramCost(functions, {"B": 1, "S": 4096, "ep": plan.ep_size, **sizes}, roles)
