"""The report as text of 100 columns."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from moefx.analysis.report import Report

WIDTH = 100


def render(*parts: object) -> str:
    """Renders rich's tables and strings as plain text of ``WIDTH`` columns."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False, markup=False)
    for p in parts:
        console.print(p)
    return out.getvalue().rstrip() + "\n"


def report_text(report: Report) -> str:
    """Functions, passes and kernels, then what was not rewritten, and why."""
    functions = Table("function", "instances", "nodes", "expected", title="captured", title_justify="left", expand=False)
    for f in report.program:
        where = f.instances[0] + (f" ... {f.instances[-1]}" if len(f.instances) > 1 else "")
        nodes = str(sum(n.op == "call_function" for n in f.graph.nodes))
        functions.add_row(f.name, f"{len(f.instances)}: {where}", nodes, ", ".join(f"{n} {k}" for k, n in f.expects.items()))
    passes = Table("pass", "made", "missed", "seconds", title="passes", title_justify="left")
    for p in report.passes:
        passes.add_row(p.name, str(p.made_count), str(p.missed_count), f"{p.seconds:.2f}")
    kernels = Table("operation", "kernel", "times", "why", title="kernels", title_justify="left")
    for (op, backend), (many, why) in report.kernels().items():
        kernels.add_row(op, backend, str(many), why)
    notes = (
        [
            "NUMERICS CHANGE (dispatch_dtype='fp8'): all experts, also local ones, read tokens rounded to 8 bits, each "
            "number within 2**-4 of itself"
        ]
        if report.plan.dispatch_dtype
        else []
    )
    notes += [f"expected ops that were not matched: {s}" for s in report.shortfall()]
    notes += [f"not captured: {x}" for x in report.not_captured]
    notes += [f"ran the original forward {n} times: {p}: {r}" for (p, r), n in report.fallbacks.items()]
    notes += [f"in {n} calls {p}: {t}" for (p, t), n in report.notes.items()]
    total = sum(report.seconds.values())
    times = ", ".join(f"{k} {v:.1f}" for k, v in report.seconds.items())
    plan = report.plan
    options = [f"ep_size={plan.ep_size}", *(["BALANCED ROUTING, FOR BENCHMARKS ONLY"] if plan.balanced_routing else [])]
    options += [f"router_z_loss={plan.router_z_loss:g}"] if plan.router_z_loss else []
    options += ["check_numerics"] if plan.check_numerics else []
    head = f"{report.program.model_class}, {', '.join(options)}" + (f": {total:.1f} s ({times})" if times else "")
    schedules = [str(t) for way in (False, True) for t in report.timelines(backward=way)]
    return render(head, functions, passes, kernels, *schedules, *notes)
