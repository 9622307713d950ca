"""The report of ``optimize``: what was rewritten, what was not and why, and which calls ran the original forward."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moefx.errors import MoefxError, PassError
from moefx.ir.graph import op_name, origin
from moefx.ir.program import Function, NotCaptured, Program
from moefx.rewriting.pipeline import PassReport

if TYPE_CHECKING:
    from torch import Tensor

    from moefx.ir.plan import Plan

#: The pass that raises each expected operation. Experts and attention are raised by capture.
_RAISED_BY = {n: n for n in ("rms_norm", "route", "rotary", "linear_cross_entropy", "dense_experts")}


class ShortfallWarning(UserWarning):
    """Expected operations were not matched, or calls train without their graphs. The model computes correctly, but slower."""


@dataclass(eq=False)
class Report:
    """``print`` it; ``report["route"]`` is one pass's :class:`PassReport`: ``made``, ``missed``, ``diff()`` and ``code``."""

    program: Program
    plan: Plan
    passes: list[PassReport]
    expected: dict[str, list[str]] = field(default_factory=dict)  #: operation -> paths of the modules that consist of one
    fallbacks: dict[tuple[str, str], int] = field(default_factory=dict)  #: (path, reason) -> calls
    details: dict[tuple[str, str], str] = field(default_factory=dict)  #: (path, reason) -> PyTorch's error message
    notes: dict[tuple[str, str], int] = field(default_factory=dict)  #: (path, note) -> calls
    seconds: dict[str, float] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)  #: texts and reasons that were warned about
    _has_positions: bool = False  #: position_ids have been looked at

    def __getitem__(self, name: str) -> PassReport:
        for p in self.passes:
            if p.name == name:
                return p
        raise MoefxError(f"no pass is named {name!r}; the pipeline had: {', '.join(p.name for p in self.passes)}")

    @property
    def not_captured(self) -> list[NotCaptured]:
        """Modules that were not captured, with reasons."""
        return self.program.not_captured

    def fell_back(self, path: str, reason: str, warn: bool = False, detail: str = "", consequence: str = "") -> None:
        """Counts a call that ran the original forward.

        Args:
            path: the module's path.
            reason: why it ran.
            warn: warn, once per reason: the call trains.
            detail: PyTorch's error message.
            consequence: of running it, for the warning.
        """
        if warn and reason not in self._warned:
            self._warned.add(reason)
            text = f"{self.program.model_class} trains without its graph of {path} in this call: {reason}"
            warnings.warn(text + (f"; {consequence}" if consequence else ""), ShortfallWarning, stacklevel=2)
        if detail:
            self.details[path, reason] = detail
        self.fallbacks[path, reason] = self.fallbacks.get((path, reason), 0) + 1

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, ShortfallWarning, stacklevel=3)

    def runs_replicas(self) -> None:
        """Warns once that nn.DataParallel runs copies of the model."""
        self._warn_once(
            f"nn.DataParallel runs copies of {self.program.model_class} in plain PyTorch, without its graphs: start one "
            "process per GPU with torchrun, or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def ignored_packing(self, position_ids: Tensor | None) -> None:
        """Warns once that packed sequences attend to one another, as in the model without moefx.

        Only the first ``position_ids`` [B, S] are looked at: reading them synchronizes with the device.
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
        """Warns once that a call filled a cache that was not asked for: its blocks ran without their graphs."""
        self._warn_once(
            f"{self.program.model_class} fills a cache in this call, so its blocks run without their graphs: if nothing "
            "reads past_key_values (scores, rewards, a teacher's logits), pass use_cache=False, or set it in model.config"
        )

    def note(self, path: str, text: str) -> None:
        """Counts a call of ``path`` that ran its graph, with a remark."""
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
        """How many ``op`` one instance of ``function`` has; None if the pipeline has no pass that raises it."""
        name = _RAISED_BY.get(op)
        if name is None:
            return function.expects.get(op, 0)
        found = next((p for p in self.passes if p.name == name), None)
        return None if found is None else sum(c.function == function.name for c in found.made)

    def shortfall(self, functions: Iterable[Function] | None = None) -> list[str]:
        """Expected operations that were not matched, a sentence each; empty if all were."""
        found = []
        for function in self.program if functions is None else functions:
            for op, expected in function.expects.items():
                made = self.made(op, function)
                if made is not None and made < expected:
                    missed = [
                        str(c)
                        for p in self.passes
                        if p.name == _RAISED_BY.get(op)
                        for c in p.missed
                        if c.function == function.name
                    ]
                    why = f": {'; '.join(missed)}" if missed else ": the graph has no similar subgraph"
                    found.append(f"{op}: {made} of {expected} in {function.name} ({len(function.instances)} instances){why}")
        if functions is None:
            served = [i for f in self.program for i in f.instances]
            for op, paths in self.expected.items():
                outside = [p for p in paths if not any(p == i or p.startswith(f"{i}.") for i in served)]
                if outside:
                    reasons = {
                        x.reason for x in self.not_captured if any(p == x.path or p.startswith(f"{x.path}.") for p in outside)
                    }
                    why = "; ".join(sorted(reasons))
                    found.append(f"{op}: {len(outside)} of {len(paths)} are not captured, {outside[0]} first: {why}")
            heads = [x for x in self.not_captured if x.module == "head" and not x.by_design]
            found += [f"head: {x.reason}; the logits of all tokens are stored" for x in heads]
        return found

    def warn_or_raise(self, shortfall: list[str], strict: bool) -> None:
        """Warns of the shortfall; raises PassError instead if ``strict``."""
        text = f"{self.program.model_class}: expected operations were not matched: " + " | ".join(shortfall)
        if strict:
            raise PassError(text)
        warnings.warn(text + " (see moefx.report(model))", ShortfallWarning, stacklevel=4)

    def cost(self, **sizes: int) -> Any:
        """FLOPs and bytes read, written and sent, as formulas per function; see :mod:`moefx.analysis.cost`."""
        from moefx.analysis.program_cost import program_cost

        return program_cost(self.program, self.plan, **sizes)

    def timelines(self, *, backward: bool = False, **sizes: int) -> list[Any]:
        """A :class:`moefx.analysis.timeline.Timeline` of each function that dispatches tokens to other ranks."""
        from moefx.analysis.timeline import has_exchange, timeline

        return [timeline(f, self.plan, backward=backward, **sizes) for f in self.program if has_exchange(f)]

    def diagram(self, function: str | None = None, after: str | None = None) -> str:
        """The functions' graphs as a Mermaid flowchart.

        Args:
            function: the name of a function; all of them if None.
            after: the name of a pass: the graphs after it, instead of those that run.

        Raises:
            MoefxError: there is no function or pass of that name.
        """
        from moefx.analysis.diagram import mermaid

        if function is not None and function not in self.program.functions:
            raise MoefxError(f"no function is named {function!r}; the program has: {', '.join(self.program.functions)}")
        chosen = [f for f in self.program if function in (None, f.name)]
        stages = self[after].after if after is not None else {f.name: f.listing for f in chosen}
        return mermaid({f.name: (f, stages[f.name]) for f in chosen})

    def kernels(self) -> dict[tuple[str, str], tuple[int, str]]:
        """``(operation, backend) -> (number of calls over all instances, why this backend)``."""
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
        """Everything that ``print`` shows, as JSON types."""
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
            "not_captured": [
                {"path": x.path, "module": x.module, "reason": x.reason, "by_design": x.by_design, "detail": x.detail}
                for x in self.not_captured
            ],
            "fallbacks": [
                {"path": p, "reason": r, "calls": n, "detail": self.details.get((p, r), "")}
                for (p, r), n in self.fallbacks.items()
            ],
            "notes": [{"path": p, "text": t, "calls": n} for (p, t), n in self.notes.items()],
            "shortfall": self.shortfall(),
        }

    def __str__(self) -> str:
        """Functions, passes and kernels, then what was not rewritten, and why."""
        from rich.table import Table

        from moefx.analysis.text import render

        functions = Table("function", "instances", "nodes", "expected", title="captured", title_justify="left", expand=False)
        for f in self.program:
            where = f.instances[0] + (f" ... {f.instances[-1]}" if len(f.instances) > 1 else "")
            nodes = str(sum(n.op == "call_function" for n in f.graph.nodes))
            functions.add_row(
                f.name, f"{len(f.instances)}: {where}", nodes, ", ".join(f"{n} {k}" for k, n in f.expects.items())
            )
        passes = Table("pass", "made", "missed", "seconds", title="passes", title_justify="left")
        for p in self.passes:
            passes.add_row(p.name, str(p.made_count), str(p.missed_count), f"{p.seconds:.2f}")
        kernels = Table("operation", "kernel", "times", "why", title="kernels", title_justify="left")
        for (op, backend), (many, why) in self.kernels().items():
            kernels.add_row(op, backend, str(many), why)
        notes = (
            [
                "NUMERICS CHANGE (dispatch_dtype='fp8'): all experts, also local ones, read tokens rounded to 8 bits, each "
                "number within 2**-4 of itself"
            ]
            if self.plan.dispatch_dtype
            else []
        )
        notes += [f"expected ops that were not matched: {s}" for s in self.shortfall()]
        notes += [f"not captured: {x}" for x in self.not_captured]
        notes += [f"ran the original forward {n} times: {p}: {r}" for (p, r), n in self.fallbacks.items()]
        notes += [f"in {n} calls {p}: {t}" for (p, t), n in self.notes.items()]
        total = sum(self.seconds.values())
        times = ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items())
        plan = self.plan
        options = [f"ep_size={plan.ep_size}", *(["BALANCED ROUTING, FOR BENCHMARKS ONLY"] if plan.balanced_routing else [])]
        options += [f"router_z_loss={plan.router_z_loss:g}"] if plan.router_z_loss else []
        options += ["check_numerics"] if plan.check_numerics else []
        head = f"{self.program.model_class}, {', '.join(options)}" + (f": {total:.1f} s ({times})" if times else "")
        schedules = [str(t) for way in (False, True) for t in self.timelines(backward=way)]
        return render(head, functions, passes, kernels, *schedules, *notes)
