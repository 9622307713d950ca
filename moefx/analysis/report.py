"""What was rewritten, what was not and why: the report that ``optimize`` leaves and ``moefx.explain`` reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moefx.errors import MoefxError, PassError
from moefx.ir.graph import op_name, origin, shape_text, value
from moefx.ir.program import Function, Left, Program
from moefx.rewriting.pipeline import PassReport

if TYPE_CHECKING:
    from torch import Tensor

    from moefx.ir.plan import Plan

#: Which pass makes which promised operation. Experts and attention are raised by capture.
_MAKERS = {n: n for n in ("rms_norm", "route", "rotary", "linear_cross_entropy", "dense_experts")}


class ShortfallWarning(UserWarning):
    """The model promises operations that were not raised; it computes correctly, some of it unrewritten."""


@dataclass(eq=False)
class Report:
    """``print(report)``; ``report["route"]`` is a :class:`PassReport` with ``.made``, ``.missed``, ``.diff()``, ``.code``."""

    program: Program
    plan: Plan
    passes: list[PassReport]
    promised: dict[str, list[str]] = field(default_factory=dict)  #: operation -> module paths that promise one
    fallbacks: dict[tuple[str, str], int] = field(default_factory=dict)  #: (path, reason) -> calls
    details: dict[tuple[str, str], str] = field(default_factory=dict)  #: (path, reason) -> what PyTorch said
    notes: dict[tuple[str, str], int] = field(default_factory=dict)  #: (path, what else is worth knowing) -> calls
    seconds: dict[str, float] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)  #: reasons; a fallback that did not train was not warned of
    _has_positions: bool = False  #: has seen what position_ids look like

    def __getitem__(self, name: str) -> PassReport:
        for p in self.passes:
            if p.name == name:
                return p
        raise MoefxError(f"no pass is named {name!r}; the pipeline had: {', '.join(p.name for p in self.passes)}")

    @property
    def left(self) -> list[Left]:
        return self.program.left

    def fell_back(self, path: str, reason: str, warn: bool = False, detail: str = "", comes_of_it: str = "") -> None:
        """Counts a call that ran the original forward. ``warn``: it trains, so says it, once a reason, and what comes of it.
        ``detail``: what PyTorch said.
        """
        if warn and reason not in self._warned:
            self._warned.add(reason)
            text = f"{self.program.model_class} trains without its graph of {path} in this call: {reason}"
            warnings.warn(text + (f"; {comes_of_it}" if comes_of_it else ""), ShortfallWarning, stacklevel=2)
        if detail:
            self.details[path, reason] = detail
        self.fallbacks[path, reason] = self.fallbacks.get((path, reason), 0) + 1

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, ShortfallWarning, stacklevel=3)

    def runs_replicas(self) -> None:
        """Says once that nn.DataParallel runs copies of the model."""
        self._warn_once(
            f"nn.DataParallel runs copies of {self.program.model_class} in plain PyTorch, without its graphs: start one "
            "process per GPU with torchrun, or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def ignored_packing(self, position_ids: Tensor | None) -> None:
        """Says once that packed sequences see one another, as in the model without moefx. It looks at the first positions only:
        the host waits for them.
        """
        if position_ids is None or position_ids.dim() != 2 or self._has_positions:
            return
        self._has_positions = True
        if bool((position_ids.diff(dim=-1) != 1).any()):
            warnings.warn(
                f"{self.program.model_class} is called with position_ids that begin anew within a row, and use_cache is on, "
                "its default: Transformers does not keep packed sequences apart then, nor does moefx; pass use_cache=False",
                UserWarning,
                stacklevel=2,
            )

    def filled_a_cache(self) -> None:
        """Says, once, that a call filled a cache that nobody had asked for: whoever reads it must find it right."""
        self._warn_once(
            f"{self.program.model_class} fills a cache in this call, so its blocks run without their graphs: where nobody "
            "reads past_key_values (scores, rewards, a teacher's logits), pass use_cache=False, or set it in model.config"
        )

    def note(self, path: str, text: str) -> None:
        self.notes[path, text] = self.notes.get((path, text), 0) + 1

    def extend(self, passes: list[PassReport], function: Function) -> None:
        """Adds what the passes did to a function captured later."""
        for mine, new in zip(self.passes, passes, strict=True):
            mine.made += new.made
            mine.missed += new.missed
            mine.seconds += new.seconds
            mine.before |= new.before
            mine.after |= new.after

    def made(self, op: str, function: Function) -> int | None:
        """How many of ``op`` one instance of ``function`` got; None if the pipeline has no pass for it."""
        name = _MAKERS.get(op)
        if name is None:
            return function.expects.get(op, 0)
        found = next((p for p in self.passes if p.name == name), None)
        return None if found is None else sum(c.function == function.name for c in found.made)

    def shortfall(self, functions: Iterable[Function] | None = None) -> list[str]:
        """Promised operations that are not there, one sentence each; empty if all is as the model promises."""
        found = []
        for function in self.program if functions is None else functions:
            for op, promised in function.expects.items():
                made = self.made(op, function)
                if made is not None and made < promised:
                    missed = [
                        str(c)
                        for p in self.passes
                        if p.name == _MAKERS.get(op)
                        for c in p.missed
                        if c.function == function.name
                    ]
                    why = f": {'; '.join(missed)}" if missed else ": nothing in the graph resembles it"
                    found.append(f"{op}: {made} of {promised} in {function.name} ({len(function.instances)} instances){why}")
        if functions is None:
            served = [i for f in self.program for i in f.instances]
            for op, paths in self.promised.items():
                outside = [p for p in paths if not any(p == i or p.startswith(f"{i}.") for i in served)]
                if outside:
                    reasons = {x.reason for x in self.left if any(p == x.path or p.startswith(f"{x.path}.") for p in outside)}
                    found.append(
                        f"{op}: {len(outside)} of {len(paths)} stay Python, {outside[0]} first: {'; '.join(sorted(reasons))}"
                    )
            heads = [x for x in self.left if x.module == "head" and not x.by_design]
            found += [f"head: {x.reason}; the logits of all tokens are stored" for x in heads]
        return found

    def warn_or_raise(self, shortfall: list[str], strict: bool) -> None:
        text = f"{self.program.model_class}: not everything that the model promises was raised: " + " | ".join(shortfall)
        if strict:
            raise PassError(text)
        warnings.warn(text + " (moefx.report(model) has the nodes)", ShortfallWarning, stacklevel=4)

    def cost(self, **sizes: int) -> Any:
        """FLOPs, bytes read and written, bytes sent, as formulas per function; see :mod:`moefx.analysis.cost`."""
        from moefx.analysis.cost import program_cost

        return program_cost(self.program, self.plan, **sizes)

    def timelines(self, *, backward: bool = False, **sizes: int) -> list[Any]:
        """Of each function that exchanges rows, what runs when: :class:`moefx.timeline.Timeline`, to print or as ``svg()``."""
        from moefx.analysis.timeline import exchanges, timeline

        return [timeline(f, self.plan, backward=backward, **sizes) for f in self.program if exchanges(f)]

    def diagram(self, function: str | None = None, after: str | None = None) -> str:
        """The functions' graphs as a Mermaid flowchart; ``function``: of this one alone, ``after``: as that pass left them,
        instead of as they are. Raises MoefxError for a name that there is not.
        """
        from moefx.analysis.diagram import mermaid

        if function is not None and function not in self.program.functions:
            raise MoefxError(f"no function is named {function!r}; the program has: {', '.join(self.program.functions)}")
        chosen = [f for f in self.program if function in (None, f.name)]
        stages = self[after].after if after is not None else {f.name: f.listing for f in chosen}
        return mermaid({f.name: (f, stages[f.name]) for f in chosen})

    def kernels(self) -> dict[tuple[str, str], tuple[int, str]]:
        """(operation, backend) -> (how often over all instances, why)."""
        found: dict[tuple[str, str], tuple[int, str]] = {}
        for function in self.program:
            for node in function.graph.nodes:
                note = origin(node) if node.op == "call_function" else None
                if note is not None and note.kernel:
                    op = op_name(node.meta.get("semantic", node.target)).removeprefix("moefx.")
                    many = found.get((op, note.kernel), (0, ""))[0]
                    found[op, note.kernel] = (many + len(function.instances), note.why)
        return found

    def to_dict(self) -> dict[str, Any]:
        """For programs: everything that ``print`` shows."""
        return {
            "model": self.program.model_class,
            "ep_size": self.plan.ep_size,
            "dispatch_dtype": self.plan.dispatch_dtype,
            "functions": [
                {
                    "name": f.name,
                    "instances": f.instances,
                    "nodes": sum(n.op == "call_function" for n in f.graph.nodes),
                    "expects": f.expects,
                }
                for f in self.program
            ],
            "passes": [
                {
                    "name": p.name,
                    "made": p.made_count,
                    "missed": p.missed_count,
                    "seconds": round(p.seconds, 3),
                    "reasons": [str(c) for c in p.missed],
                }
                for p in self.passes
            ],
            "kernels": [{"op": op, "backend": b, "count": n, "why": why} for (op, b), (n, why) in self.kernels().items()],
            "left": [
                {"path": x.path, "module": x.module, "reason": x.reason, "by_design": x.by_design, "detail": x.detail}
                for x in self.left
            ],
            "fallbacks": [
                {"path": p, "reason": r, "calls": n, "detail": self.details.get((p, r), "")}
                for (p, r), n in self.fallbacks.items()
            ],
            "notes": [{"path": p, "text": t, "calls": n} for (p, t), n in self.notes.items()],
            "shortfall": self.shortfall(),
        }

    def __str__(self) -> str:
        from moefx.analysis.text import report_text

        return report_text(self)


@dataclass(frozen=True)
class Explanation:
    """The nodes of one part of the model: ``print`` it, or read ``lines``."""

    path: str
    function: str
    lines: list[str]
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([f"{self.path}: in function {self.function}", *self.lines, *self.notes])


def explain(report: Report, path: str) -> Explanation:
    """Each node of the module ``path``: the model's line -> the passes that touched it -> its kernel and why that one."""
    function = report.program.serving(path)
    instance = next(i for i in function.instances if path == i or path.startswith(f"{i}."))
    inner = path.removeprefix(instance).strip(".")
    lines = []
    for node in function.graph.nodes:
        if node.op != "call_function" or not _inside(node, inner):
            continue
        note = origin(node)
        what = op_name(node.meta.get("semantic", node.target))
        steps = [", ".join(note.sources) or "(made by moefx)", what + " " + shape_text(value(node))]
        steps += [", ".join(note.passes)] if note.passes else []
        steps += [f"{note.kernel}" + (f" ({note.why})" if note.why else "")] if note.kernel else []
        lines.append(f"  {node.name}: " + " -> ".join(steps))
    notes = [f"  not rewritten by {p.name}: {c}" for p in report.passes for c in p.missed if c.function == function.name]
    notes += [f"  left: {x}" for x in report.left if x.path == path or path.startswith(f"{x.path}.")]
    notes += [f"  {n} calls ran the original forward: {r}" for (p, r), n in report.fallbacks.items() if p == instance]
    notes += [f"  in {n} calls {t}" for (p, t), n in report.notes.items() if p == instance]
    return Explanation(path, function.name, lines, notes)


def _inside(node: Any, inner: str) -> bool:
    if not inner:
        return True
    stack = node.meta.get("nn_module_stack") or {}
    return any(f".{entry[0]}.".endswith(f".{inner}.") or f".{inner}." in f".{entry[0]}." for entry in stack.values())
