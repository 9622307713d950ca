"""``torch.compile`` of a rewritten graph, with a cache key that tells apart what the graph alone does not."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from moefx.ops import dispatch_combine

if TYPE_CHECKING:
    from moefx.ir.plan import Plan


@functools.cache
def revision() -> str:
    """Differs whenever moefx's source does: the shapes of an operation's results are written there."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class _Key(CustomGraphPass):
    """Changes nothing in the graph. Inductor's disk cache knows an operation by its name and arguments; but an exchange's
    shapes depend on the size of the group that it names, and those of all operations on moefx's version.
    """

    def __init__(self, ep_size: int, then: Any) -> None:
        self.ep_size, self.then = ep_size, then  #: ``then``: the user's own pass

    def __call__(self, graph: fx.Graph) -> None:
        if self.then is not None:
            self.then(graph)

    def uuid(self) -> Any:
        own = f"moefx {revision()} ep={self.ep_size}"
        if self.then is None:
            return own
        then = self.then.uuid() if isinstance(self.then, CustomGraphPass) else None
        return then and (own, then)  # None: not to be cached, as Inductor has it for such a pass


#: torch.export's functions of sizes, and Python's own, which Dynamo traces of sizes and of plain numbers alike: of the former
#: it refuses numbers (torch 2.11: "torch.* op returned non-Tensor"; 2.13 takes sym_min and sym_max), and the sizes of a first
#: call are numbers.
_OF_NUMBERS: dict[Any, Callable] = {
    torch.sym_min: min, torch.sym_max: max, torch.sym_int: int, torch.sym_float: float, torch.sym_not: operator.not_,
}  # fmt: skip


def with_builtins(graph: fx.GraphModule) -> fx.GraphModule:
    """``graph``, or a copy that calls Python's functions of numbers; tracing it again would specialize on their results."""
    if not any(n.target in _OF_NUMBERS for n in graph.graph.nodes):
        return graph
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for node in copied.nodes:
        if node.target in _OF_NUMBERS:
            node.target = _OF_NUMBERS[node.target]
    return fx.GraphModule(graph, copied)


def compiled(graph: fx.GraphModule, plan: Plan) -> Callable:
    """The graph's forward, compiled as ``plan.compile`` says (True: Inductor; a name: that backend; False: not)."""
    # not the module: its __call__ looks into exceptions that pass, as early stopping is one
    if not plan.compile:
        return graph.forward
    run: Callable = with_builtins(graph).forward
    backend = plan.compile if isinstance(plan.compile, str) else "inductor"
    options: dict[str, Any] | None = None
    if backend == "inductor":
        options = {"post_grad_custom_post_pass": _Key(plan.ep_size, config.post_grad_custom_post_pass)}
        if any(n.target is dispatch_combine.dispatch_start for n in graph.graph.nodes):
            options["reorder_for_peak_memory"] = False  # what runs while rows are under way must stay there
    return torch.compile(run, fullgraph=True, backend=backend, options=options)
