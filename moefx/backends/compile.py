"""``torch.compile`` of a rewritten graph, with a cache key that tells apart what the graph alone does not."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit
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
    """Changes nothing in the graph, but the key of Inductor's disk cache.

    The cache identifies an operation by its name and arguments. But the shapes of an exchange depend on the size of the process
    group that it names, and those of all operations on moefx's version.
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


#: Variants of one graph before it runs uncompiled: with and without gradients, a batch or a length of 1, and what else Dynamo
#: specializes on. Its own limit of 8 is reached by training, evaluating and scoring at a few shapes, and is an error.
MOST_VARIANTS = 64
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


def _limit() -> dict[str, Any]:
    """From torch 2.13 on; earlier versions are given more variants when they have reached Dynamo's limit."""
    return {"recompile_limit": MOST_VARIANTS} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}


def compiled(graph: fx.GraphModule, plan: Plan) -> Callable:
    """The graph's forward, compiled as ``plan.compile`` says (True: Inductor; a name: that backend; False: not)."""
    # not the module: its __call__ looks into exceptions that pass, as early stopping is one
    if not plan.compile:
        return graph.forward
    plain: Callable = with_builtins(graph).forward
    backend = plan.compile if isinstance(plan.compile, str) else "inductor"
    options: dict[str, Any] | None = None
    if backend == "inductor":
        options = {"post_grad_custom_post_pass": _Key(plan.ep_size, config.post_grad_custom_post_pass)}
        if any(n.target is dispatch_combine.dispatch_start for n in graph.graph.nodes):
            options["reorder_for_peak_memory"] = False  # what runs while rows are under way must stay there
    run = torch.compile(plain, fullgraph=True, backend=backend, options=options, **_limit())
    warned = False

    def call(*inputs: Any) -> Any:
        nonlocal warned
        with contextlib.suppress(FailOnRecompileLimitHit):
            return run(*inputs)
        with contextlib.suppress(FailOnRecompileLimitHit), dynamo_config.patch(recompile_limit=MOST_VARIANTS):
            return run(*inputs)
        if not warned:
            warned = True
            warnings.warn(
                f"a block was compiled {MOST_VARIANTS} times, for inputs that differ each time: what fits none of these runs "
                "uncompiled from here on (TORCH_LOGS=recompiles prints what differs)",
                stacklevel=2,
            )
        return plain(*inputs)

    return call
