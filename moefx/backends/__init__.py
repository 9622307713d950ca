"""Backends: tables from semantic operations to kernels. An ordered list decides; who takes nothing leaves it to the next.

A kernel has its operation's signature, so that lowering is ``node.target = kernel.fn``. A kernel that cannot serve a node
says why, in a sentence with the two values that disagree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._ops import OpOverload  # not `import torch`: the package has a module of that name

from moefx.errors import MoefxError
from moefx.ir.graph import op_name


def accept(node: fx.Node) -> str | None:
    """Refuses nothing."""
    return None


@dataclass(frozen=True)
class Kernel:
    """``fn`` with the operation's signature; ``refuses(node)`` gives a sentence or None; ``why`` is shown in reports."""

    fn: Callable[..., Any]
    refuses: Callable[[fx.Node], str | None] = accept
    why: str = ""


@dataclass(frozen=True)
class Backend:
    """A name and a table operation -> Kernel. ``available()`` says why it cannot be used here, or None.

    ``by_name``: it is used only where the caller names it, since it has not measured faster than the others
    (or, on GPUs, not at all).
    """

    name: str
    kernels: Mapping[Any, Kernel]
    available: Callable[[], str | None] = lambda: None
    by_name: bool = False

    def kernel(self, op: Any) -> Kernel | None:
        return self.kernels.get(op)


@dataclass(frozen=True)
class Choice:
    """Who runs a node, why, and who refused before."""

    backend: Backend
    kernel: Kernel
    why: str
    refusals: list[tuple[str, str]] = field(default_factory=list)


def builtin() -> dict[str, Backend]:
    """The backends of this package by name, in the default order."""
    from moefx.backends import deepep, fa4, quack, reference, te, torch, triton
    from moefx.backends.experimental import deepep_elastic, te_ep

    order = (deepep, deepep_elastic, te_ep, quack, fa4, triton, torch, te, reference)
    return {module.BACKEND.name: module.BACKEND for module in order}


def resolve(backends: Sequence[str | Backend] | None) -> tuple[Backend, ...]:
    """Names and Backend objects as Backends, in the order given; the reference always comes last.

    None: all that are usable here, but for those that want to be named.

    Raises:
        MoefxError: an unknown name, a backend that cannot be used here, a kernel with another signature than its operation.
    """
    known = builtin()
    if isinstance(backends, (str, Backend)):
        backends = [backends]
    found: list[Backend] = []
    usable = [name for name, b in known.items() if not b.by_name and b.available() is None]
    for b in usable if backends is None else backends:
        if isinstance(b, str) and b not in known:
            raise MoefxError(f"no backend is named {b!r}; there are: {', '.join(known)} (or pass a moefx.Backend)")
        backend = known[b] if isinstance(b, str) else b
        if not isinstance(backend, Backend):
            raise MoefxError(f"{backend!r} is not a backend: pass a name ({', '.join(known)}) or a moefx.Backend")
        problem = backend.available()
        if problem:
            raise MoefxError(f"backend {backend.name!r} cannot be used here: {problem}")
        for op, kernel in backend.kernels.items():
            check_signature(backend.name, op, kernel)
        found.append(backend)
    if known["reference"] not in found:
        found.append(known["reference"])
    return tuple(found)


def check_signature(backend: str, op: Any, kernel: Kernel) -> None:
    """Raises MoefxError if ``kernel`` cannot be called as ``op`` is."""
    if not isinstance(op, OpOverload):
        raise MoefxError(
            f"backend {backend!r} has a kernel for {op!r}, which is not an operation (torch.ops.moefx.<name>.default)"
        )
    if isinstance(kernel.fn, OpOverload):
        theirs = [(a.name, a.kwarg_only) for a in kernel.fn._schema.arguments]
    else:
        try:
            parameters = inspect.signature(kernel.fn).parameters.values()
        except (TypeError, ValueError):
            return  # a builtin that does not tell
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return
        theirs = [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters]
    ours = [(a.name, a.kwarg_only) for a in op._schema.arguments]
    # positional arguments by place, keyword-only ones by name
    same = [k for _, k in ours if not k] == [k for _, k in theirs if not k] and (
        {n for n, k in ours if k} == {n for n, k in theirs if k}
    )
    if not same:
        raise MoefxError(
            f"backend {backend!r}: the kernel of {op_name(op)} takes {_text(theirs)}, the operation has {_text(ours)}: give it "
            "the operation's signature"
        )


def _text(signature: list[tuple[str, bool]]) -> str:
    plain, named = [n for n, k in signature if not k], [n for n, k in signature if k]
    return f"({', '.join([*plain, *(['*', *named] if named else [])])})"


def known(op: Any, backends: Sequence[Backend]) -> bool:
    """Is ``op`` a semantic operation that some backend has a kernel for?"""
    return any(b.kernel(op) is not None for b in backends)


def candidates(node: fx.Node, backends: Sequence[Backend]) -> list[Choice]:
    """The kernels that accept ``node``, in order; each with the sentences of those before it that did not.

    Raises:
        MoefxError: none does.
    """
    found: list[Choice] = []
    refusals: list[tuple[str, str]] = []
    for backend in backends:
        kernel = backend.kernel(node.target)
        if kernel is None:
            continue
        sentence = kernel.refuses(node)
        if sentence is None:
            found.append(Choice(backend, kernel, kernel.why, list(refusals)))
        else:
            refusals.append((backend.name, sentence))
    if not found:
        told = "; ".join(f"{n}: {s}" for n, s in refusals) or "none has a kernel for it"
        raise MoefxError(f"no backend takes {op_name(node.target)}: {told}")
    return found


def choose(node: fx.Node, backends: Sequence[Backend]) -> Choice:
    """The first backend whose kernel accepts ``node``, with the sentences of those that did not."""
    return candidates(node, backends)[0]
