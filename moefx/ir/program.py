"""A captured model: a Program of Functions, one per distinct block, which passes rewrite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from moefx.errors import MoefxError
from moefx.ir.code import Listing, code_of


@dataclass(frozen=True)
class NotCaptured:
    """A module that was not captured, so that its original forward runs, and why."""

    path: str
    module: str  #: name of its class
    reason: str
    by_design: bool = False  #: a recurrent mixer, for instance: no shortfall
    detail: str = ""  #: PyTorch's error message, if there was one

    def __str__(self) -> str:
        return f"{self.path} ({self.module}): {self.reason}"


@dataclass(frozen=True)
class RouterOutputs:
    """Which outputs of a function are those of one of its routers; recorded by the pass ``expose_routes``."""

    experts: str  #: path of the experts module in the block
    topk_ids: int  #: [T, K]: the selected experts
    num_experts: int
    top_k: int
    bias: str | None = None  #: the parameter or buffer of the block that is added to scores to select experts only
    logits: int | None = None  #: [T, E]
    nonfinite: int | None = None  #: how many logits are NaN or infinite
    not_replayable: str = ""  #: why its experts cannot be forced

    def path(self, block: str) -> str:
        """The path of the experts in the model, given that of the block (which may be the experts themselves)."""
        return f"{block}.{self.experts}" if self.experts else block


@dataclass(eq=False)
class Function:
    """One captured graph, and the modules of the model that it serves.

    ``graph_module`` is stateless: its placeholders are ``parameters`` (named relative to an instance), then ``constants``, then
    the tensor ``inputs`` of the call. It returns a flat tuple: the block's tensors, then those that it writes into a dictionary
    argument, then the outputs of ``call.routers``, then those of ``routes``.
    """

    name: str
    module_class: str
    graph_module: fx.GraphModule
    instances: list[str]  #: module paths, in order
    parameters: list[str]  #: "self_attn.q_proj.weight", one per parameter placeholder
    constants: list[torch.Tensor]
    inputs: list[str]  #: "hidden_states", one per remaining placeholder
    call: Any  #: call_signature.Call: which calls this graph serves, and how its outputs are packed
    fake_mode: Any
    expects: dict[str, int] = field(default_factory=dict)  #: operation -> how many one instance has, by its modules
    placeholders: list[str] = field(default_factory=list)
    routes: tuple[RouterOutputs, ...] = ()
    captured: Function | None = None  #: a copy from before the passes
    forced_inputs: tuple[str, ...] = ()  #: of a replaying function: its inputs that force routes
    reads: Any = None  #: reads.Reads: the Python state that the graph depends on
    state: Any = None  #: reads.State: what it was
    _routed: dict[tuple[int, ...], list[int]] = field(default_factory=dict, init=False)  #: by the inputs' sizes

    def __post_init__(self) -> None:
        self.placeholders = [n.name for n in self.graph.nodes if n.op == "placeholder"]

    def routed(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """The number of tokens that each of ``routes`` has in a call with these inputs.

        The graph's symbolic sizes tell: which sizes of an input count tokens depends on the block (hyper-connections take
        [B, S, streams, H]).
        """
        sizes = tuple(n for t in tensors for n in t.shape)
        if sizes not in self._routed:
            nodes = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
            symbolic = [n for name in self.inputs for n in nodes[name].meta["val"].shape]
            known = {n.node.expr: size for n, size in zip(symbolic, sizes, strict=True) if isinstance(n, torch.SymInt)}
            (results,) = next(n for n in self.graph.nodes if n.op == "output").args
            counts = [results[r.topk_ids].meta["val"].shape[0] for r in self.routes]
            if len(self._routed) > 4096:  # of a long run with a new length in every step
                self._routed.clear()
            self._routed[sizes] = [n if isinstance(n, int) else int(n.node.expr.subs(known)) for n in counts]
        return self._routed[sizes]

    def copy(self) -> Function:
        """The same function with its own copy of the graph."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return replace(self, graph_module=fx.GraphModule(nn.Module(), graph), instances=list(self.instances))

    def replaying(self) -> Function:
        """A copy for replaying routes: each call of experts can be told which experts each token goes to.

        It has one more input [T, K] int64 for each call of experts, then a boolean scalar: whether these inputs replace the
        routers' choices. Made from a captured function, before the passes.
        """
        made = self.copy()
        graph = made.graph
        calls = [n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.moefx.experts.default]
        with self.fake_mode:
            scalar = torch.empty((), dtype=torch.bool, device=self.call.device)
        wanted = {f"forced_topk_ids_{i}": n.args[1].meta["val"] for i, n in enumerate(calls)} | {"routes_are_forced": scalar}
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        for name, val in wanted.items():
            with graph.inserting_after(last):
                last = graph.placeholder(name)
            last.meta["val"] = val
        return replace(made, name=f"{self.name}_replaying", forced_inputs=tuple(wanted), inputs=[*self.inputs, *wanted])

    @property
    def graph(self) -> fx.Graph:
        """The graph, which passes edit."""
        return self.graph_module.graph

    @property
    def code(self) -> str:
        """The graph as a Python function that runs, with the imports that it needs."""
        return code_of([self.listing])

    @property
    def listing(self) -> Listing:
        """The graph as it is now."""
        return Listing.of(self.graph, self.name)

    @property
    def title(self) -> str:
        """A comment that says which modules it serves."""
        where = " ... ".join(dict.fromkeys((*self.instances[:1], *self.instances[-1:])))
        return f"# {self.name}: {where}" + (f" ({len(self.instances)})" if len(self.instances) > 1 else "")

    def __str__(self) -> str:
        return code_of([self.listing], [self.title])


@dataclass(eq=False)
class Program:
    """A captured model: ``functions`` by name, in the order of the model, and the modules that were not captured."""

    model_class: str
    functions: dict[str, Function]
    not_captured: list[NotCaptured]
    packs_beside_cache: bool | None = None  #: it separates packed sequences in calls that fill a cache; None: unknown
    own_attention: bool = False  #: it keeps an attention that moefx.attention cannot express

    def __getitem__(self, name: str) -> Function:
        if name not in self.functions:
            raise MoefxError(f"no function is named {name!r}; this program has: {', '.join(self.functions)}")
        return self.functions[name]

    def __iter__(self) -> Iterator[Function]:
        return iter(self.functions.values())

    def serving(self, path: str) -> Function:
        """The function that serves the module ``path``, or the block around it. Raises MoefxError if none does."""
        for function in self:
            if any(path == i or path.startswith(f"{i}.") for i in function.instances):
                return function
        raise MoefxError(f"no captured function serves {path!r}; captured: {', '.join(i for f in self for i in f.instances)}")

    def add(self, function: Function) -> None:
        """Adds a function, under its name or, if that is taken, with a number."""
        name, n = function.name, 2
        while function.name in self.functions:
            function.name, n = f"{name}_{n}", n + 1
        self.functions[function.name] = function

    def __str__(self) -> str:
        code = code_of([f.listing for f in self], [f.title for f in self])
        head = f"# {self.model_class}: {len(self.functions)} functions"
        return "\n".join([head, code, *(f"# not captured: {x}" for x in self.not_captured)])
