"""One module of the model, node by node: what ``moefx.explain`` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from moefx.analysis.report import Report
from moefx.ir.graph import op_name, origin, shape_text, value


@dataclass(frozen=True)
class Explanation:
    """What became of one module: a line per node. ``print`` it, or read ``lines`` and ``notes``."""

    path: str
    function: str
    lines: list[str]
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([f"{self.path}: in function {self.function}", *self.lines, *self.notes])


def explanation(report: Report, path: str) -> Explanation:
    """Each node of the module ``path``: its source line in the model -> the passes that changed it -> its kernel, and why."""
    function = report.program.serving(path)
    instance = next(i for i in function.instances if path == i or path.startswith(f"{i}."))
    inner = path.removeprefix(instance).strip(".")
    lines = []
    for node in function.graph.nodes:
        if node.op != "call_function" or not _is_inside(node, inner):
            continue
        note = origin(node)
        what = op_name(node.meta.get("semantic", node.target))
        steps = [", ".join(note.sources) or "(made by moefx)", what + " " + shape_text(value(node))]
        steps += [", ".join(note.passes)] if note.passes else []
        steps += [f"{note.kernel}" + (f" ({note.why})" if note.why else "")] if note.kernel else []
        lines.append(f"  {node.name}: " + " -> ".join(steps))
    notes = [f"  not rewritten by {p.name}: {c}" for p in report.passes for c in p.missed if c.function == function.name]
    notes += [f"  not captured: {x}" for x in report.not_captured if x.path == path or path.startswith(f"{x.path}.")]
    notes += [f"  {n} calls ran the original forward: {r}" for (p, r), n in report.fallbacks.items() if p == instance]
    notes += [f"  in {n} calls {t}" for (p, t), n in report.notes.items() if p == instance]
    return Explanation(path, function.name, lines, notes)


def _is_inside(node: fx.Node, inner: str) -> bool:
    if not inner:
        return True
    stack = node.meta.get("nn_module_stack") or {}
    return any(f".{entry[0]}.".endswith(f".{inner}.") or f".{inner}." in f".{entry[0]}." for entry in stack.values())
