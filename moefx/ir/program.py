"""What capture makes and passes rewrite: a Program of Functions, one per distinct block of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from moefx.errors import MoefxError
from moefx.ir.code import Listing, code_of


@dataclass(frozen=True)
class Left:
    """A module that stays as it was, and why."""

    path: str
    module: str
    reason: str
    by_design: bool = False  #: a recurrent mixer, say: no shortfall, only worth knowing
    detail: str = ""  #: what PyTorch said, where it was PyTorch that refused

    def __str__(self) -> str:
        return f"{self.path} ({self.module}): {self.reason}"


@dataclass(frozen=True)
class RouterOutputs:
    """What a function returns of one of its routers, by output position, as the pass ``expose_routes`` notes it."""

    experts: str  #: path of the experts module inside the block
    index: int  #: [T, K]: the experts chosen
    num_experts: int
    top_k: int
    bias: str | None = None  #: the parameter or buffer of the block that is added for the choice only
    logits: int | None = None  #: [T, E]
    nonfinite: int | None = None  #: how many logits are NaN or infinite
    fixed: str = ""  #: why its choice cannot be given

    def path(self, block: str) -> str:
        """Of the experts in the model: they may be the block themselves."""
        return f"{block}.{self.experts}" if self.experts else block


@dataclass(eq=False)
class Function:
    """One captured graph and the places of the model that it serves.

    ``graph_module`` is stateless: its placeholders are ``parameters`` (names relative to an instance), then ``constants``,
    then the tensor ``inputs`` of the call. It returns a flat tuple: the block's tensors, then those that it leaves in a
    dictionary that it is given, then what ``routers`` returned, then what ``routes`` says.
    """

    name: str
    module_class: str
    graph_module: fx.GraphModule
    instances: list[str]  #: module paths, in order
    parameters: list[str]  #: "self_attn.q_proj.weight", one per parameter placeholder
    constants: list[torch.Tensor]
    inputs: list[str]  #: names of the tensor inputs, one per remaining placeholder
    call: Any  #: capture.Call: which calls this graph covers, and how its outputs are put together
    fake_mode: Any
    expects: dict[str, int] = field(default_factory=dict)  #: operations that one instance promises
    placeholders: list[str] = field(default_factory=list)
    routes: tuple[RouterOutputs, ...] = ()
    captured: Function | None = None  #: before any pass but those that raise experts, where it has some
    given: tuple[str, ...] = ()  #: in a replaying function: the inputs that choose experts, one per route, and whether they do
    _routed: dict[tuple[int, ...], list[int]] = field(default_factory=dict, init=False)  #: by the inputs' sizes: see routed

    def __post_init__(self) -> None:
        self.placeholders = [n.name for n in self.graph.nodes if n.op == "placeholder"]

    def routed(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """How many tokens each of ``routes`` has in a call with these inputs, as the graph says: which of an input's sizes
        count tokens is the block's own affair (hyper-connections take [B, S, streams, H]).
        """
        sizes = tuple(n for t in tensors for n in t.shape)
        if sizes not in self._routed:
            nodes = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
            symbolic = [n for name in self.inputs for n in nodes[name].meta["val"].shape]
            known = {n.node.expr: size for n, size in zip(symbolic, sizes, strict=True) if isinstance(n, torch.SymInt)}
            (results,) = next(n for n in self.graph.nodes if n.op == "output").args
            counts = [results[r.index].meta["val"].shape[0] for r in self.routes]
            if len(self._routed) > 4096:  # a new length every step, for days
                self._routed.clear()
            self._routed[sizes] = [n if isinstance(n, int) else int(n.node.expr.subs(known)) for n in counts]
        return self._routed[sizes]

    def copy(self) -> Function:
        """The same function over a graph of its own."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return replace(self, graph_module=fx.GraphModule(nn.Module(), graph), instances=list(self.instances))

    def replaying(self) -> Function:
        """A copy of a captured function, before the passes, with an input [T, K] for each call of experts, whom to call, and
        one, a boolean scalar, that says whether these count or what the routers choose.
        """
        made = self.copy()
        graph = made.graph
        calls = [n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.moefx.experts.default]
        with self.fake_mode:
            scalar = torch.empty((), dtype=torch.bool, device=self.call.device)
        wanted = {f"given_index_{i}": n.args[1].meta["val"] for i, n in enumerate(calls)} | {"given": scalar}
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        for name, val in wanted.items():
            with graph.inserting_after(last):
                last = graph.placeholder(name)
            last.meta["val"] = val
        return replace(made, name=f"{self.name}_replaying", given=tuple(wanted), inputs=[*self.inputs, *wanted])

    @property
    def graph(self) -> fx.Graph:
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
        """Which places of the model it serves, as a comment."""
        where = " ... ".join(dict.fromkeys((*self.instances[:1], *self.instances[-1:])))
        return f"# {self.name}: {where}" + (f" ({len(self.instances)})" if len(self.instances) > 1 else "")

    def __str__(self) -> str:
        return code_of([self.listing], [self.title])


@dataclass(eq=False)
class Program:
    """A captured model: ``functions`` by name, in the order of the model; ``left``: what stays Python, with reasons."""

    model_class: str
    functions: dict[str, Function]
    left: list[Left]
    packs_beside_cache: bool | None = None  #: it keeps packed sequences apart in calls that fill a cache; None: nobody knows
    own_attention: bool = False  #: the model keeps its attention: it is none that moefx.attention could say

    def __getitem__(self, name: str) -> Function:
        if name not in self.functions:
            raise MoefxError(f"no function is named {name!r}; this program has: {', '.join(self.functions)}")
        return self.functions[name]

    def __iter__(self) -> Iterator[Function]:
        return iter(self.functions.values())

    def serving(self, path: str) -> Function:
        """The function that serves the module ``path`` or a part of it."""
        for function in self:
            if any(path == i or path.startswith(f"{i}.") for i in function.instances):
                return function
        raise MoefxError(f"no captured function serves {path!r}; captured: {', '.join(i for f in self for i in f.instances)}")

    def add(self, function: Function) -> None:
        name, n = function.name, 2
        while function.name in self.functions:
            function.name, n = f"{name}_{n}", n + 1
        self.functions[function.name] = function

    def __str__(self) -> str:
        code = code_of([f.listing for f in self], [f.title for f in self])
        head = f"# {self.model_class}: {len(self.functions)} functions"
        return "\n".join([head, code, *(f"# left: {x}" for x in self.left)])
