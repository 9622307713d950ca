"""Patterns: traced functions that are matched against graphs. A miss is a sentence that says why.

Pattern and graph are both in canonical form. A pattern is traced in float64, so that every cast of its function leaves a node.
A cast to float64 there means "to the dtype of the input". A cast of the pattern may be missing in the graph if the value has
that dtype already (the graph of an fp32 model has no ``.to(float32)``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moefx.errors import MoefxError
from moefx.ir.graph import VIEWS, arguments, aten, describe, dtype_of, is_call, op_name, value
from moefx.rewriting.canonicalize import canonicalize

_COMMON = VIEWS | {
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.div.Tensor,
    aten.cat.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.linear.default,
    aten.neg.default,
}
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
#: Arguments that follow from the shapes of the inputs: not compared, since certification runs both sides.
_SHAPES = {
    "sorted",
    "size",
    "shape",
    "split_size",
    "split_sizes",
    "pin_memory",
    "layout",
    "device",
    "implicit",
    "memory_format",
}


def f64(*shape: int) -> Tensor:
    """An example input of a pattern: a float64 tensor, so that all casts of its function leave nodes.

    Args:
        shape: its sizes.
    """
    return torch.ones(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Match:
    """A match: what each parameter of the pattern is bound to, the covered nodes, the output nodes."""

    pattern: Pattern
    bound: dict[str, Any]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node | None, ...]
    loose: int  #: casts of the pattern that the graph lacks; the fewer, the closer

    @property
    def node(self) -> fx.Node:
        """The node that computes the pattern's first output."""
        (first, *_) = self.outputs
        assert first is not None
        return first

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class Miss:
    """No match. It is falsy, and ``str(miss)`` says why.

    ``depth`` is the number of distinctive nodes of the pattern that had matched, ``matched`` that of all nodes.
    """

    expected: Any = ""
    found: Any = None
    depth: int = 0
    reason: str = ""
    matched: int = 0

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason or f"expected {self.expected}, found {describe(self.found)}"


@dataclass
class _State:
    bound: dict[str, Any] = field(default_factory=dict)
    pairs: dict[fx.Node, Any] = field(default_factory=dict)
    like_input: list[tuple[fx.Node, torch.dtype]] = field(default_factory=list)
    loose: int = 0

    def copy(self) -> _State:
        return _State(dict(self.bound), dict(self.pairs), list(self.like_input), self.loose)

    def take(self, other: _State) -> None:
        self.bound, self.pairs, self.like_input, self.loose = other.bound, other.pairs, other.like_input, other.loose


class Pattern:
    """A function, traced on an example. A match binds its tensor and number parameters.

    Args:
        function: a functional Python function of torch operations.
        example: its tensor parameters as example inputs (:func:`moefx.f64`; the first one's dtype is "the input's dtype"), and
            its number parameters as unusual numbers (eps=0.0123, top_k=13): equal numbers in the trace become wildcards.
        fixed: its other arguments: strings, booleans, None.
        sizes: names for sizes of the example that the function computes with, such as half a head.

    Raises:
        MoefxError: there is no tensor among the example inputs, or (when traced) the function writes in place.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        example: Mapping[str, Any],
        fixed: Mapping[str, Any] | None = None,
        sizes: Mapping[int, str] | None = None,
    ):
        self.function, self.example, self.fixed = function, dict(example), dict(fixed or {})
        self.tensors = [k for k, v in self.example.items() if isinstance(v, Tensor)]
        self.numbers = {v: k for k, v in self.example.items() if type(v) in (int, float)} | dict(sizes or {})
        if not self.tensors:
            raise MoefxError(f"pattern {getattr(function, '__name__', function)!r} has no tensor input: give it an example")

    @cached_property
    def graph(self) -> fx.Graph:
        """The traced pattern, in canonical form."""
        rest = {k: v for k, v in self.example.items() if k not in self.tensors} | self.fixed

        def call(*tensors: Tensor) -> Any:
            return self.function(**dict(zip(self.tensors, tensors, strict=True)), **rest)

        examples = [self.example[k] for k in self.tensors]
        traced = make_fx(call, tracing_mode="fake", pre_dispatch=True)(*examples)
        for node in traced.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                raise MoefxError(
                    f"pattern {getattr(self.function, '__name__', self.function)!r} writes in place ({op_name(node.target)}): "
                    "captured graphs are functional, write the pattern without in-place operations"
                )
        placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
        for node, name in zip(placeholders, self.tensors, strict=True):
            node.meta["parameter"] = name
        canonicalize(traced.graph)
        traced.graph.eliminate_dead_code()
        return traced.graph

    @cached_property
    def outputs(self) -> list[fx.Node]:
        """The nodes that the traced function returns."""
        out = next(n for n in self.graph.nodes if n.op == "output").args[0]
        return list(out) if isinstance(out, (tuple, list)) else [out]

    @cached_property
    def anchor(self) -> Any:
        """The operation with which a match must end, except for casts."""
        node = self.outputs[0]
        while is_call(node, aten._to_copy.default):
            node = node.args[0]  # type: ignore[assignment]
        return node.target

    @cached_property
    def distinctive(self) -> frozenset[Any]:
        """The operations that few other subgraphs have: a miss that matched one is reported."""
        targets = {n.target for n in self.graph.nodes if n.op == "call_function"}
        return frozenset(targets - _COMMON) or frozenset(targets - VIEWS)

    @cached_property
    def size(self) -> int:
        """The number of calls."""
        return sum(n.op == "call_function" for n in self.graph.nodes)

    def match(self, node: fx.Node) -> Match | Miss:
        """Matches the pattern's first output with ``node``: a Match, or the Miss that got furthest."""
        state, best = _State(), [Miss(reason="nothing matched")]
        if not self._unify(self.outputs[0], node, state, best):
            return best[0]
        covered = {v: k for k, v in state.pairs.items() if isinstance(v, fx.Node)}
        outputs: list[fx.Node | None] = [node]
        for wanted in self.outputs[1:]:
            found = state.pairs.get(wanted)
            if found is None and is_call(wanted, operator.getitem):  # perhaps the graph does not read this output
                source = state.pairs.get(wanted.args[0])  # type: ignore[arg-type]
                users = source.users if isinstance(source, fx.Node) else ()
                found = next((u for u in users if is_call(u, operator.getitem) and u.args[1] == wanted.args[1]), None)
                if found is not None:
                    covered[found] = wanted
            outputs.append(found)
        placeholders = {state.bound[name] for name in self.tensors if name in state.bound}
        nodes = tuple(n for n in node.graph.nodes if n in covered and n not in placeholders)
        missing = [t for t in self.tensors if t not in state.bound]
        if missing:
            return Miss(reason=f"nothing in the graph is bound to the pattern's {', '.join(missing)}", depth=self.size)
        other = self._other_shape(state.bound)
        if other:
            return Miss(reason=other, depth=self.size)
        first = dtype_of(state.bound[self.tensors[0]])
        for at, dtype in state.like_input:
            if dtype != first:
                return Miss(reason=f"{describe(at)} is cast to {dtype}, not to the input's {first}", depth=self.size)
        for inner in nodes:
            if inner in outputs or inner.target in VIEWS:
                continue
            # a value that the function returns (a router's scores) is still computed, beside the new operation
            outside = [u for u in inner.users if u not in covered and u.op != "output"]
            if outside:
                return Miss(
                    reason=f"the intermediate value {describe(inner)} is also used elsewhere, by {describe(outside[0])}",
                    depth=self.size,
                )
        return Match(self, state.bound, nodes, tuple(outputs), state.loose)

    def _other_shape(self, bound: Mapping[str, Any]) -> str | None:
        """What is not shaped as in the example, where broadcasting would hide it: an operation's kernels do not broadcast.

        Vectors are vectors, what has one shape in the example has one shape, and so have last dimensions of one size.
        """
        shapes: dict[Any, tuple[str, list[str]]] = {}
        for name in self.tensors:
            wanted, found = self.example[name].shape, [*map(str, getattr(value(bound[name]), "shape", ()))]
            while len(wanted) == 1 and len(found) > 1 and found[0] == "1":  # a row
                del found[0]
            if len(wanted) == 1 and len(found) != 1:
                return f"{describe(bound[name])} is {name}, of shape [{', '.join(found)}], not a vector"
            for key, part in ((wanted, found), (wanted[-1:], found[-1:])):
                first, before = shapes.setdefault((len(key) > 1, key), (name, part))
                if before != part:
                    return (
                        f"{name} {describe(bound[name])} and {first} {describe(bound[first])} have the sizes "
                        f"[{', '.join(part)}] and [{', '.join(before)}], which must be equal"
                    )
        return None

    def _fail(self, best: list[Miss], state: _State, expected: Any, found: Any, at: Any = None) -> bool:
        depth = sum(p.target in self.distinctive for p in state.pairs)
        if (depth, len(state.pairs)) >= (best[0].depth, best[0].matched):
            where = f" at {describe(at)}" if isinstance(at, fx.Node) else ""
            text = f"expected {expected}, found {describe(found)}{where}"
            best[0] = Miss(expected, found, depth, text, len(state.pairs))
        return False

    def _unify(self, p: Any, t: Any, state: _State, best: list[Miss], at: Any = None) -> bool:
        if not isinstance(p, fx.Node):
            return self._constant(p, t, state, best, at)
        if p in state.pairs:
            return state.pairs[p] is t or self._fail(best, state, f"{state.pairs[p]} again", t, at)
        if p.op == "placeholder":
            if not isinstance(t, fx.Node):
                return self._fail(best, state, f"a tensor for {p.meta['parameter']}", t, at)
            state.pairs[p] = state.bound[p.meta["parameter"]] = t
            return True
        if is_call(p, aten._to_copy.default):
            return self._cast(p, t, state, best, at)
        if not is_call(t) or p.target != t.target:
            return self._fail(best, state, op_name(p.target), t, at)
        state.pairs[p] = t
        ours, theirs = arguments(p), arguments(t)
        names = [n for n in ours if n not in theirs or n != "dtype" or ours[n] is not None]
        first_two = list(ours)[:2]
        trial = state.copy()
        if all(self._argument(n, ours[n], theirs.get(n), trial, best, t) for n in names):
            state.take(trial)
            return True
        if p.target in _COMMUTATIVE and isinstance(theirs[first_two[1]], fx.Node):
            a, b = first_two
            trial, swapped = state.copy(), {**theirs, a: theirs[b], b: theirs[a]}
            if all(self._argument(n, ours[n], swapped.get(n), trial, best, t) for n in names):
                state.take(trial)
                return True
        return False

    def _argument(self, name: str, p: Any, t: Any, state: _State, best: list[Miss], at: fx.Node) -> bool:
        if name == "dim" and isinstance(p, int) and isinstance(t, int):
            rank = len(getattr(value(at.args[0]), "shape", ()))  # the same dimension may be counted from either end
            p, t = p - rank if p >= 0 and t < 0 else p, t - rank if t >= 0 and p < 0 else t
        if name in _SHAPES:
            if isinstance(p, (list, tuple)) and isinstance(t, (list, tuple)) and len(p) == len(t):
                for a, b in zip(p, t, strict=True):  # a number parameter may be one of the sizes
                    if type(a) in (int, float) and a in self.numbers and type(b) is type(a):
                        state.bound.setdefault(self.numbers[a], b)
            return True
        if not isinstance(p, fx.Node):
            return self._constant(p, t, state, best, at, f"{name}=")
        return self._unify(p, t, state, best, at)

    def _constant(self, p: Any, t: Any, state: _State, best: list[Miss], at: Any, name: str = "") -> bool:
        if isinstance(p, (list, tuple)):
            same = isinstance(t, (list, tuple)) and len(p) == len(t)
            if not same:
                return self._fail(best, state, f"{len(p)} arguments", t, at)
            return all(self._unify(a, b, state, best, at) for a, b in zip(p, t, strict=True))
        if type(p) in (int, float) and p in self.numbers:
            if not isinstance(t, (int, float)):
                return self._fail(best, state, f"a number for {self.numbers[p]}", t, at)
            known = state.bound.setdefault(self.numbers[p], t)
            return known == t or self._fail(best, state, f"{self.numbers[p]}={known} again", t, at)
        if p == t or (not p and not t and not isinstance(p, (int, float)) | isinstance(t, (int, float))):
            return True
        return p == t or self._fail(best, state, f"{name}{p}", t, at)

    def _cast(self, p: fx.Node, t: Any, state: _State, best: list[Miss], at: Any) -> bool:
        wanted = p.kwargs.get("dtype")
        like_input = wanted is torch.float64
        if is_call(t, aten._to_copy.default) and (like_input or t.kwargs.get("dtype") == wanted):
            trial = state.copy()
            trial.pairs[p] = t
            if like_input:
                trial.like_input.append((t, t.kwargs["dtype"]))
            if self._unify(p.args[0], t.args[0], trial, best, t):
                state.take(trial)
                return True
        if isinstance(t, fx.Node) and (dtype_of(t) == wanted or like_input):
            trial = state.copy()
            trial.pairs[p] = t
            trial.loose += not t.meta.get("identity_cast", False)
            if like_input and dtype_of(t) is not None:
                trial.like_input.append((t, dtype_of(t)))  # type: ignore[arg-type]
            if self._unify(p.args[0], t, trial, best, at):
                state.take(trial)
                return True
            return False
        return self._fail(best, state, f"a cast to {wanted}", t, at)
