"""Helpers for ``torch.fx`` graphs: arguments by name, new nodes, the origin of a node, its text in messages."""

from __future__ import annotations

import dataclasses
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from moefx.ir.naming import name_of, rename_like

aten = torch.ops.aten

#: The casts that tracing produces; canonicalize leaves only ``aten._to_copy``.
CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
#: Views and casts: a pattern may share them with other readers, since recomputing them costs nothing.
VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.slice.Tensor,
        aten.transpose.int,
        aten.permute.default,
        aten.select.int,
        aten._to_copy.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        operator.getitem,
    }
)


@dataclass(frozen=True)
class Origin:
    """Where a node comes from and what changed it, as ``moefx.explain`` shows it."""

    sources: tuple[str, ...] = ()  #: "modeling_qwen3_moe.py:259", oldest first
    passes: tuple[str, ...] = ()  #: names of the passes that made or changed it, in order
    kernel: str = ""  #: the backend's name, once lowered
    why: str = ""  #: why this backend, and why others refused

    def touched(self, name: str) -> Origin:
        """The same with one more pass."""
        return self if self.passes[-1:] == (name,) else dataclasses.replace(self, passes=(*self.passes, name))


#: moefx's own files, which are no source of a model's node.
_OWN_FILES = str(Path(__file__).parents[1]) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def source_of(node: fx.Node) -> str:
    """``file.py:line`` of the innermost frame of the model's code that made ``node``; "" if unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [f for f in frames if "/torch/" not in f"/{f[0]}" and not f[0].startswith(_OWN_FILES)]
    models = [f for f in frames if "modeling_" in Path(f[0]).name]
    path, line = (models or frames or [("", "")])[-1]
    return f"{Path(path).name}:{line}" if path else ""


def origin(node: fx.Node) -> Origin:
    """The node's origin; read from its stack trace the first time."""
    found = node.meta.get("moefx")
    if found is None:
        where = source_of(node)
        found = node.meta["moefx"] = Origin(sources=(where,) if where else ())
    return found


#: Keys of ``node.meta`` that export writes: the stack of Python frames, the enclosing modules.
_STACKS = ("stack_trace", "nn_module_stack")
_running_pass: ContextVar[str] = ContextVar("running_pass", default="")


@contextmanager
def running_pass(name: str) -> Iterator[None]:
    """A context in which new nodes are recorded as made by the pass ``name``."""
    token = _running_pass.set(name)
    try:
        yield
    finally:
        _running_pass.reset(token)


def inherit(new: fx.Node, old: Iterable[fx.Node]) -> None:
    """Gives ``new`` the origin of the nodes that it stands for, and records the running pass."""
    old = list(old)
    sources = dict.fromkeys(s for n in old for s in origin(n).sources)
    passes = dict.fromkeys(p for n in old for p in origin(n).passes)
    made, name = Origin(tuple(sources), tuple(passes)), _running_pass.get()
    new.meta["moefx"] = made.touched(name) if name else made
    for key in _STACKS:
        new.meta.pop(key, None)
        for n in old:
            if key in n.meta:
                new.meta[key] = n.meta[key]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with defaults filled in.

    Args:
        node: a ``call_function`` node. A lowered node is read by the schema of its operation; a function without a schema has
            its positional arguments under "0", "1", ...

    Returns:
        Name -> node or constant.
    """
    op = node.meta.get("semantic", node.target)
    if not isinstance(op, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    schema = op._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls a function, one of ``targets`` if there are any.

    Args:
        node: a node, or any other argument of a node: then False.
        targets: operations (``moefx.ops.route``, ``torch.ops.aten.add.Tensor``) or Python functions.
    """
    return isinstance(node, fx.Node) and node.op == "call_function" and (not targets or node.target in targets)


def op_name(target: Any) -> str:
    """The name of a target in messages: ``aten.mean.dim``, ``moefx.route``, ``getitem``."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    return getattr(target, "__name__", str(target))


def value(node: Any) -> Any:
    """The fake value of a node, which has its shape, dtype and device.

    Args:
        node: a node, or a constant argument, which is returned as it is.

    Returns:
        A FakeTensor, a SymInt, or a tuple of them; sizes may be symbolic.
    """
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def describe(node: Any) -> str:
    """A node in a sentence: its name, its operation, its source line."""
    if not isinstance(node, fx.Node):
        return f"the constant {node!r}"
    where = ", ".join(origin(node).sources[-1:])
    what = "" if node.op == "placeholder" else f" = {op_name(node.target)}"
    return f"{node.name}{what}" + (f" ({where})" if where else "")


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a node's value; None if that is no tensor."""
    val = value(node)
    return val.dtype if isinstance(val, torch.Tensor) else None


def shape_text(val: Any) -> str:
    """``bf16[s0, s1, 2048]``."""
    if isinstance(val, torch.Tensor):
        names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64", torch.bool: "b8"}
        return f"{names.get(val.dtype, str(val.dtype).removeprefix('torch.'))}[{', '.join(str(d) for d in val.shape)}]"
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(map(shape_text, val)) + ")"
    return str(val)


def emit(at: fx.Node | fx.Graph, op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds the call ``op(*args, **kwargs)`` to a graph.

    Args:
        at: the node before which the call is added, whose origin it inherits; or a graph: before its output.
        op: an operation, or a Python function that runs on fake tensors.
        args: its arguments: nodes, constants, and lists of them.
        kwargs: its keyword arguments.

    Returns:
        The new node. Its value is that of ``op`` on the fake values of its arguments.
    """
    graph = at if isinstance(at, fx.Graph) else at.graph
    before = next(n for n in reversed(graph.nodes) if n.op == "output") if isinstance(at, fx.Graph) else at
    return insert(before, op, args, kwargs, val=_run_on_fakes(graph, op, args, kwargs))


def insert(
    before: fx.Node, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, val: Any
) -> fx.Node:
    """:func:`emit` with a known fake value, that of the nodes that the new one stands for."""
    with before.graph.inserting_before(before):
        node = before.graph.create_node("call_function", op, args, kwargs or {}, name=name_of(op, args))
    node.meta["val"] = val
    inherit(node, [before] if before.op == "call_function" else [])
    return node


def unpack(node: fx.Node) -> tuple[fx.Node, ...]:
    """The outputs of a call that returns several values, as nodes.

    Args:
        node: a call whose value is a tuple. Its ``getitem`` nodes are reused, and moved up to it.

    Returns:
        A node for each output, in order.
    """
    found = getitems(node)
    outputs: list[fx.Node] = []
    for i, val in enumerate(value(node)):
        at = outputs[-1] if outputs else node
        if i in found:
            at.append(found[i])
        else:
            with node.graph.inserting_after(at):
                name = name_of(operator.getitem, (node, i))
                found[i] = node.graph.create_node("call_function", operator.getitem, (node, i), name=name)
            found[i].meta["val"] = val
            inherit(found[i], [node])
        outputs.append(found[i])
    return tuple(outputs)


def replace(old: fx.Node, new: fx.Node) -> None:
    """Makes all users of ``old`` read ``new``, and erases ``old``.

    What only ``old`` read is dead code, which the pipeline erases after the pass.

    Args:
        old: a node.
        new: a node that does not read ``old``. It inherits the origin of ``old``.
    """
    mine, theirs = origin(new), origin(old)
    sources, passes = dict.fromkeys(mine.sources + theirs.sources), dict.fromkeys(theirs.passes + mine.passes)
    new.meta["moefx"] = dataclasses.replace(mine, sources=tuple(sources), passes=tuple(passes))
    new.meta = {key: old.meta[key] for key in _STACKS if key in old.meta} | new.meta
    if shape_text(value(old)) != shape_text(value(new)):
        new.meta["val"] = value(old)  # equal sizes may be other expressions: keep those that the users were traced with
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    rename_like(new, old)


def getitems(node: fx.Node) -> dict[int, fx.Node]:
    """The ``getitem`` users of a node with several outputs, by index."""
    return {u.args[1]: u for u in node.users if is_call(u, operator.getitem)}  # type: ignore[misc]


def nodes_of(args: Any) -> list[fx.Node]:
    """The nodes among nested arguments, each once, in order."""
    found: dict[fx.Node, None] = {}
    fx.node.map_arg(args, lambda a: found.setdefault(a))
    return list(found)


def _run_on_fakes(graph: fx.Graph, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The fake value of ``op(*args, **kwargs)`` where arguments may be nodes."""
    args, kwargs = fx.node.map_arg((args, kwargs), value)
    fakes = (value(n) for n in graph.nodes)
    mode = next((v.fake_mode for v in fakes if isinstance(v, FakeTensor)), None)
    if mode is None:
        with torch.no_grad():
            return op(*args, **kwargs)
    # a guard would fix sizes of the whole graph: torch 2.11 looks at those of an fp32 linear on the CPU, for XNNPACK
    fixed = nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with mode, fixed, torch.no_grad():
        return op(*args, **kwargs)
