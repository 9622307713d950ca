"""The code of a graph: Python that runs, a call per line, with its shape and the model's source line."""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

from moefx.ir.graph import Origin, shape_text, source_of


@dataclass(frozen=True, eq=False)
class Listing:
    """A snapshot of a graph. ``str(listing)`` is its code, written only when it is read."""

    name: str  #: the name of the function in the code
    nodes: tuple[tuple[fx.Node, Any, Any, Any, Any], ...]  #: node, target, args, kwargs, value
    origins: tuple[Origin | None, ...]  #: None: not read from the stack trace yet

    @classmethod
    def of(cls, graph: fx.Graph, name: str) -> Listing:
        """The graph as it is now."""
        return cls(
            re.sub(r"\W", "_", name),
            tuple((n, n.target, n.args, n.kwargs, n.meta.get("val")) for n in graph.nodes),
            tuple(n.meta.get("moefx") for n in graph.nodes),
        )

    def same(self, other: Listing) -> bool:
        """Whether no node was changed in between. Origins do not count; an equal value that is another object does."""
        return len(self.nodes) == len(other.nodes) and all(
            x is y for mine, theirs in zip(self.nodes, other.nodes, strict=True) for x, y in zip(mine, theirs, strict=True)
        )

    @property
    def modules(self) -> list[str]:
        """The modules that the code needs."""
        unpacked = self._unpacked()
        calls = [
            (n, target)
            for n, target, args, *_ in self.nodes
            if n.op == "call_function" and not _is_item(target, args, unpacked)
        ]
        return sorted({"torch", "moefx.passes", *filter(None, (_callee(target, n)[0] for n, target in calls))})

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        unpacked = self._unpacked()
        yield f"def {self.name}("
        yield from (f"    {n.name},  # {shape_text(val)}" for n, *_, val in self.nodes if n.op == "placeholder")
        yield "):"
        for (n, target, args, kwargs, val), note in zip(self.nodes, self.origins, strict=True):
            if n.op == "output":
                yield f"    return {_text(args[0])}"
            if n.op != "call_function" or _is_item(target, args, unpacked):
                continue
            given = [*map(_text, args), *(f"{k}={_text(v)}" for k, v in kwargs.items())]
            source = note.sources[-1:] if note is not None else (source_of(n),)
            tail = [shape_text(val), *filter(None, source)]
            tail += [f"kernel {note.kernel}"] if note is not None and note.kernel else []
            yield f"    {unpacked.get(n, n.name)} = {_callee(target, n)[1]}({', '.join(given)})  # {'; '.join(tail)}"

    def _unpacked(self) -> dict[fx.Node, str]:
        """Calls whose outputs are read one by one: "topk_weights, topk_ids", with "_" for an unused output."""
        calls = [(n, val) for n, *_, val in self.nodes if n.op == "call_function" and isinstance(val, (tuple, list))]
        names = {n: ["_"] * len(val) for n, val in calls if val}
        for n, target, args, kwargs, _ in self.nodes:
            if _is_item(target, args, names) and type(args[1]) is int:
                at, several = args[1], names[args[0]]
                if several[at] == "_":
                    several[at] = n.name
                    continue
            for read in _nodes(args, kwargs):
                names.pop(read, None)
        return {n: ", ".join(several) + ("," if len(several) == 1 else "") for n, several in names.items()}


def code_of(listings: Iterable[Listing], titles: Iterable[str] = ()) -> str:
    """The code of several functions, with the imports that they need.

    Args:
        listings: the functions' graphs.
        titles: a comment line for each; none if empty.
    """
    listings = list(listings)
    titles = [*titles] or [""] * len(listings)
    imports = [f"import {module}" for module in sorted({m for x in listings for m in x.modules})]
    parts = ["\n".join([*imports, "", "aten, ops = torch.ops.aten, torch.ops.moefx"]) + "\n"]
    parts += [f"{title}\n{x}" if title else str(x) for title, x in zip(titles, listings, strict=True)]
    return "\n\n".join(parts)


def _is_item(target: Any, args: Any, unpacked: Container[fx.Node]) -> bool:
    """Whether a call only names an output of an unpacked call."""
    return target is operator.getitem and isinstance(args[0], fx.Node) and args[0] in unpacked


def _nodes(args: Any, kwargs: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((args, kwargs), found.append)
    return found


def _callee(target: Any, node: fx.Node) -> tuple[str, str]:
    """The module to import for a call, and the function's name. A kernel that cannot be imported is shown as its operation."""
    if not isinstance(target, torch._ops.OpOverload):
        module, name = getattr(target, "__module__", None) or "", getattr(target, "__qualname__", "")
        module = "operator" if module == "_operator" else module
        if _find(module, name) is target:
            return module, f"{module}.{name}"
        target = node.meta.get("semantic")
        if not isinstance(target, torch._ops.OpOverload):
            return "", name or repr(target)
    space, name = target._schema.name.split("::")
    packet = target.overloadpacket
    several = [o for o in packet.overloads() if not o.endswith("out")]
    full = name if several == ["default"] else f"{name}.{target._overloadname}"
    return "", {"aten": "aten", "moefx": "ops"}.get(space, f"torch.ops.{space}") + f".{full}"


def _find(module: str, name: str) -> Any:
    try:
        return reduce(getattr, name.split("."), sys.modules[module])
    except (KeyError, AttributeError):
        return None


def _text(a: Any) -> str:
    """An argument as Python."""
    if isinstance(a, fx.Node):
        return a.name
    if isinstance(a, (tuple, list)):
        inner = ", ".join(map(_text, a))
        if isinstance(a, list):
            return f"[{inner}]"
        return f"({inner},)" if len(a) == 1 else f"({inner})"
    if isinstance(a, dict):
        return "{" + ", ".join(f"{k!r}: {_text(v)}" for k, v in a.items()) + "}"
    if isinstance(a, slice):
        return f"slice({_text(a.start)}, {_text(a.stop)}, {_text(a.step)})"
    if isinstance(a, torch.device):
        return f"torch.device({str(a)!r})"
    if isinstance(a, float) and not math.isfinite(a):
        return f'float("{a}")'
    return repr(a)
