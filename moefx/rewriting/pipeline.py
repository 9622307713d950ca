"""Passes, and the pipeline that runs them in order."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import fx

from moefx.errors import MoefxError, PassError
from moefx.ir.code import Listing, code_of
from moefx.ir.graph import describe, op_name, origin, running_pass
from moefx.ir.naming import name_as_emitted

if TYPE_CHECKING:
    from moefx.ir.plan import Plan
    from moefx.ir.program import Function, Program


@dataclass(frozen=True)
class Change:
    """A rewrite, or one that was missed: the node, its source lines, and what was done or why not."""

    node: str
    source: str
    what: str
    instances: int = 1
    function: str = ""

    def __str__(self) -> str:
        return f"{self.function}: {self.node}: {self.what}" + (f" (x{self.instances})" if self.instances > 1 else "")


@dataclass
class Changes:
    """What a pass did to one function: the rewrites that it made and missed."""

    made: list[Change] = field(default_factory=list)
    missed: list[Change] = field(default_factory=list)

    def did(self, node: fx.Node, what: str = "") -> None:
        """Records a rewrite: the new node, and a sentence (the node's operation if empty)."""
        self.made.append(Change(node.name, ", ".join(origin(node).sources), what or op_name(node.target)))

    def miss(self, node: fx.Node, why: str) -> None:
        """Records a node that the pass is made for and left, and why."""
        self.missed.append(Change(describe(node), ", ".join(origin(node).sources), why))


@runtime_checkable
class Pass(Protocol):
    """A rewrite of one function, usually a frozen dataclass whose fields are its options.

    The pipeline checks the graph afterwards, erases dead code, takes the time and keeps the code for reports.
    """

    @property
    def name(self) -> str:
        """The name in reports, pipelines and on the command line."""
        ...

    def run(self, function: Function, plan: Plan) -> Changes:
        """Edits ``function.graph`` in place, and returns what it made and missed."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """A tuple of passes. Its methods return a new pipeline.

    Raises:
        MoefxError: something is no pass, two passes have one name, or no pass has the name that a method is given.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        for p in self.passes:
            if not isinstance(p, Pass):
                raise MoefxError(f"{p!r} is not a pass: it needs a `name` and a method `run(function, plan) -> Changes`")
        names = self.names
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise MoefxError(f"two passes are named {twice[0]!r}: give one of them another `name`")

    @property
    def names(self) -> list[str]:
        """The names of the passes, in order."""
        return [p.name for p in self.passes]

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __getitem__(self, name: str) -> Pass:
        return self.passes[self._at(name)]

    def _at(self, name: str) -> int:
        if name not in self.names:
            raise MoefxError(f"no pass is named {name!r}; the pipeline has: {', '.join(self.names)}")
        return self.names.index(name)

    def before(self, name: str, new: Pass) -> Pipeline:
        """With ``new`` before the pass ``name``."""
        at = self._at(name)
        return Pipeline((*self.passes[:at], new, *self.passes[at:]))

    def after(self, name: str, new: Pass) -> Pipeline:
        """With ``new`` after the pass ``name``."""
        at = self._at(name) + 1
        return Pipeline((*self.passes[:at], new, *self.passes[at:]))

    def replace(self, name: str, new: Pass) -> Pipeline:
        """With ``new`` instead of the pass ``name``."""
        at = self._at(name)
        return Pipeline((*self.passes[:at], new, *self.passes[at + 1 :]))

    def without(self, *names: str) -> Pipeline:
        """Without these passes."""
        gone = {self._at(n) for n in names}
        return Pipeline(tuple(p for i, p in enumerate(self.passes) if i not in gone))

    def run(self, program: Program, plan: Plan) -> list[PassReport]:
        """Runs the passes over every function of ``program``. Raises PassError if one breaks a graph."""
        reports = [PassReport(p.name) for p in self.passes]
        for function in program.functions.values():
            for p, report in zip(self.passes, reports, strict=True):
                report.add(function, run_pass(p, function, plan))
            function.graph_module.recompile()
        return reports


@dataclass
class PassReport:
    """What one pass did to the whole program."""

    name: str
    made: list[Change] = field(default_factory=list)
    missed: list[Change] = field(default_factory=list)
    seconds: float = 0.0
    before: dict[str, Listing] = field(default_factory=dict)
    after: dict[str, Listing] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The functions after this pass, as Python that runs."""
        return code_of(self.after.values())

    def diff(self) -> str:
        """What the pass changed, as a unified diff of the functions' code; empty if nothing."""
        parts: list[str] = []
        for name, after in self.after.items():
            old, new = str(self.before[name]).splitlines(), str(after).splitlines()
            parts += difflib.unified_diff(old, new, f"{name} before {self.name}", f"{name} after {self.name}", lineterm="", n=1)
        return "\n".join(parts)

    @property
    def made_count(self) -> int:
        """The number of rewrites, over all instances of the functions."""
        return sum(c.instances for c in self.made)

    @property
    def missed_count(self) -> int:
        """The number of misses, over all instances of the functions."""
        return sum(c.instances for c in self.missed)

    def add(self, function: Function, done: tuple[Changes, float, Listing, Listing]) -> None:
        """Adds what :func:`run_pass` returned for a function."""
        changes, seconds, self.before[function.name], self.after[function.name] = done
        many = len(function.instances)
        self.made += [Change(c.node, c.source, c.what, many, function.name) for c in changes.made]
        self.missed += [Change(c.node, c.source, c.what, many, function.name) for c in changes.missed]
        self.seconds += seconds

    def __str__(self) -> str:
        head = f"{self.name}: {self.made_count} made, {self.missed_count} missed, {self.seconds:.2f} s"
        return "\n".join([head, *(f"  made   {c}" for c in self.made), *(f"  missed {c}" for c in self.missed)])


def run_pass(p: Pass, function: Function, plan: Plan) -> tuple[Changes, float, Listing, Listing]:
    """Runs a pass over one function, without recompiling its module.

    Returns:
        The changes, the seconds, and the graph before and after.

    Raises:
        PassError: the pass failed or broke the graph.
    """
    before, started = function.listing, time.perf_counter()
    try:
        with running_pass(p.name):
            changes = p.run(function, plan)
    except MoefxError:
        raise
    except Exception as error:
        raise PassError(f"pass {p.name!r} failed on function {function.name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(changes, Changes):
        raise PassError(f"pass {p.name!r} returned {type(changes).__name__} for {function.name!r}: it must return Changes")
    after = function.listing
    if not after.same(before):
        check(p.name, function)
        function.graph.eliminate_dead_code()
        name_as_emitted(function.graph)
        after = function.listing
    return changes, time.perf_counter() - started, before, after


def check(name: str, function: Function) -> None:
    """Raises PassError, naming the node, if the graph is invalid after the pass ``name``."""
    seen: set[fx.Node] = set()
    placeholders = [n.name for n in function.graph.nodes if n.op == "placeholder"]
    if placeholders != function.placeholders:
        raise PassError(
            f"pass {name!r} changed the inputs of {function.name!r} from {function.placeholders} to {placeholders}: "
            "a function's parameters and inputs are the model's, rewrite what is between them"
        )
    for node in function.graph.nodes:
        for arg in node.all_input_nodes:
            if arg not in seen:
                raise PassError(
                    f"pass {name!r} broke {function.name!r}: {describe(node)} reads {arg.name}, which is not defined "
                    "before it; insert the new node after its inputs"
                )
        if node.op == "call_function" and "val" not in node.meta:
            raise PassError(
                f"pass {name!r} left {describe(node)} in {function.name!r} without meta['val']: later passes and backends "
                "read shapes and dtypes there; use moefx.emit"
            )
        seen.add(node)
    outputs = [n for n in function.graph.nodes if n.op == "output"]
    if len(outputs) != 1:
        raise PassError(f"pass {name!r} left {len(outputs)} outputs in {function.name!r}: a function has one")
    try:
        function.graph.lint()
    except Exception as error:
        raise PassError(f"pass {name!r} broke the graph of {function.name!r}: {error}") from error
