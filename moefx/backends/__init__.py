"""Backends: tables from semantic operations to kernels. They are asked in the order of a list.

A kernel has its operation's signature, so that lowering is ``node.target = kernel.fn``; ``moefx.ops.takes_spec`` makes it of a
function that takes the operation's spec. A kernel that cannot serve a node says why, in a sentence with the two values that
disagree.

A table may have variants of kernels, under (operation, variant): passes ask for them by name, and any backend may have them.

    "stream"        of rms_norm: gives the norm and its input, and adds the gradients of both in one kernel
    "recompute"     of experts, grouped_mlp: keeps no pre-activations for the backward
    "fp8"           of experts, grouped_mlp: products in 8 bits
    "fp8_<recipe>"  of aten.linear: the same, by a recipe of Transformer Engine

A kernel may lack arguments of its operation that are optional tensors, such as the factors of low-rank updates: it is not asked
where they are given. A variant takes the operation's arguments, and may take more after them. Variants of variants have longer
keys: (operation, "fp8", "recompute").
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch._ops import OpOverload  # not `import torch`: the package has a module of that name

from moefx.errors import MoefxError
from moefx.ir.graph import op_name, origin


def accept(node: fx.Node) -> str | None:
    """Refuses nothing."""
    return None


def anywhere() -> str | None:
    """Nothing is missing."""
    return None


@dataclass(frozen=True)
class Kernel:
    """``fn`` with the operation's signature; ``refuses(node)`` gives a sentence or None; ``why`` is shown in reports.

    ``available()``: why this kernel cannot run on this machine though its backend can, or None.
    """

    fn: Callable[..., Any]
    refuses: Callable[[fx.Node], str | None] = accept
    why: str = ""
    available: Callable[[], str | None] = anywhere


@dataclass(frozen=True)
class Backend:
    """A name and a table operation -> Kernel, (operation, variant, ...) -> Kernel; ``available()``: why not here, or None.

    ``opt_in``: it is used only where the caller names it, since it has not measured faster than the others, or was never
    measured on a GPU.
    """

    name: str
    kernels: Mapping[Any, Kernel]
    available: Callable[[], str | None] = anywhere
    opt_in: bool = False

    def kernel(self, op: Any, *variants: str) -> Kernel | None:
        """The kernel of ``op``, or that variant of it; None where there is none."""
        return self.kernels.get((op, *variants) if variants else op)


@dataclass(frozen=True)
class Choice:
    """Who runs a node, why, and who refused before."""

    backend: Backend
    kernel: Kernel
    why: str
    refusals: list[tuple[str, str]] = field(default_factory=list)
    variants: tuple[str, ...] = ()

    def apply(self, node: fx.Node, by: str, *, why: str | None = None) -> None:
        """Makes ``node`` call the kernel, and notes the choice: ``by`` is the pass, ``why`` what reports say."""
        label = "fp8" if self.variants[:1] == ("fp8",) else self.backend.name
        node.meta["semantic"] = node.meta.get("semantic", node.target)
        node.meta["moefx"] = replace(origin(node).touched(by), kernel=label, why=self.why if why is None else why)
        node.meta["choice"] = self
        node.target = self.kernel.fn


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
    usable = [name for name, b in known.items() if not b.opt_in and b.available() is None]
    for b in usable if backends is None else backends:
        if isinstance(b, str) and b not in known:
            raise MoefxError(f"no backend is named {b!r}; there are: {', '.join(known)} (or pass a moefx.Backend)")
        backend = known[b] if isinstance(b, str) else b
        if not isinstance(backend, Backend):
            raise MoefxError(f"{backend!r} is not a backend: pass a name ({', '.join(known)}) or a moefx.Backend")
        problem = backend.available()
        if problem:
            raise MoefxError(f"backend {backend.name!r} cannot be used here: {problem}")
        for key, kernel in backend.kernels.items():
            check_signature(backend.name, key, kernel)
        found.append(backend)
    if known["reference"] not in found:
        found.append(known["reference"])
    return tuple(found)


def check_signature(backend: str, key: Any, kernel: Kernel) -> None:
    """Raises MoefxError if ``kernel`` cannot be called as its operation is; a variant may take more arguments at the end."""
    op, *variants = key if isinstance(key, tuple) else (key,)
    if not isinstance(op, OpOverload):
        raise MoefxError(
            f"backend {backend!r} has a kernel for {op!r}, which is not an operation (torch.ops.moefx.<name>.default)"
        )
    theirs = _signature(kernel.fn)
    if theirs is None:
        return
    ours = [(a.name, a.kwarg_only) for a in op._schema.arguments]
    # positional arguments by position, keyword-only ones by name
    (plain, named), (their_plain, their_named) = ((sum(not k for _, k in of), {n for n, k in of if k}) for of in (ours, theirs))
    required = named - {a.name for a in op._schema.arguments if _may_lack(a)}
    if variants:
        same = plain <= their_plain and required <= their_named
    else:
        same = plain == their_plain and required <= their_named <= named
    if not same:
        what = op_name(op) + "".join(f", variant {v!r}" for v in variants)
        hint = "give it the operation's signature"
        if (named and ("spec", False) in theirs) or ("spec", True) in theirs:
            hint += ", by moefx.ops.takes_spec"
        raise MoefxError(
            f"backend {backend!r}: the kernel of {what} takes {_text(theirs)}, the operation has {_text(ours)}: {hint}"
        )


def _may_lack(argument: Any) -> bool:
    """Whether kernels need not have that argument: those without are not asked where it is given."""
    return argument.kwarg_only and argument.has_default_value() and argument.default_value is None


@functools.lru_cache(1024)
def _signature(fn: Callable[..., Any]) -> list[tuple[str, bool]] | None:
    """Name of each parameter, and whether it is keyword-only; None: any, or it does not tell."""
    if isinstance(fn, OpOverload):
        return [(a.name, a.kwarg_only) for a in fn._schema.arguments]
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return None  # a builtin
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    return [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters]


def _lacks(kernel: Kernel, node: fx.Node) -> str | None:
    """Which optional arguments of ``node`` the kernel does not have."""
    theirs = _signature(kernel.fn)
    lacking = [] if theirs is None else [n for n in node.kwargs if n not in dict(theirs)]
    return f"its kernel has no argument {', '.join(lacking)}" if lacking else None


def _text(signature: list[tuple[str, bool]]) -> str:
    plain, named = [n for n, k in signature if not k], [n for n, k in signature if k]
    return f"({', '.join([*plain, *(['*', *named] if named else [])])})"


def known(op: Any, backends: Sequence[Backend]) -> bool:
    """Is ``op`` a semantic operation that some backend has a kernel for?"""
    return any(b.kernel(op) is not None for b in backends)


def accepting(node: fx.Node, backends: Sequence[Backend], *variants: str) -> tuple[list[Choice], list[tuple[str, str]]]:
    """The kernels that accept ``node``, in order, each with the refusals of those before it; and all refusals.

    A refusal is a backend's name and its sentence. ``variants``: of that variant, else of the operation itself.
    """
    op = node.meta.get("semantic", node.target)
    found: list[Choice] = []
    refusals: list[tuple[str, str]] = []
    for backend in backends:
        kernel = backend.kernel(op, *variants)
        if kernel is None:
            continue
        sentence = kernel.available() or _lacks(kernel, node) or kernel.refuses(node)
        if sentence is None:
            found.append(Choice(backend, kernel, kernel.why, list(refusals), variants))
        else:
            refusals.append((backend.name, sentence))
    return found, refusals


def candidates(node: fx.Node, backends: Sequence[Backend]) -> list[Choice]:
    """The kernels that accept ``node``, in order; each with the sentences of those before it that did not.

    Raises:
        MoefxError: none does.
    """
    found, refusals = accepting(node, backends)
    if not found:
        reasons = "; ".join(f"{n}: {s}" for n, s in refusals) or "none has a kernel for it"
        raise MoefxError(f"no backend takes {op_name(node.target)}: {reasons}")
    return found


def choose(node: fx.Node, backends: Sequence[Backend]) -> Choice:
    """The first backend whose kernel accepts ``node``, with the sentences of those that did not."""
    return candidates(node, backends)[0]


# --- variants --------------------------------------------------------------------------------------------------------


def with_variant(op: Any, variant: str, backends: Sequence[Backend] = ()) -> tuple[tuple[Backend, ...], str]:
    """The backends with that variant of ``op`` that can be used here: of ``backends``, then this package's others.

    And, if there is none, why: the reasons of those that have one.
    """
    names = {b.name for b in backends}
    usable, reasons = [], []
    for backend in (*backends, *(b for b in builtin().values() if b.name not in names)):
        kernel = backend.kernel(op, variant)
        if kernel is None:
            continue
        problem = backend.available() or kernel.available()
        if problem:
            reasons.append(problem)
        else:
            usable.append(backend)
    reason = "; ".join(dict.fromkeys(reasons)) or f"no backend has the variant {variant!r} of {op_name(op)}"
    return tuple(usable), "" if usable else reason


def variants_of(op: Any) -> list[str]:
    """The names of the variants of ``op`` that this package's backends have."""
    keys = itertools.chain.from_iterable(b.kernels for b in builtin().values())
    return list(dict.fromkeys(key[1] for key in keys if isinstance(key, tuple) and key[0] is op and len(key) == 2))


def variant_of(node: fx.Node, variant: str) -> Choice | str:
    """That variant of the kernel that ``node`` was lowered to; or a sentence why there is none."""
    choice = node.meta.get("choice")
    op = node.meta.get("semantic", node.target)
    if choice is None:
        return f"{op_name(op)} is not lowered to a kernel: the pass has to run after lower"
    kernel = choice.backend.kernel(op, *choice.variants, variant)
    if kernel is None:
        have = [b.name for b in builtin().values() if b.kernel(op, *choice.variants, variant)]
        others = f": {', '.join(have)} has one" if len(have) == 1 else f": {', '.join(have)} have one" if have else ""
        return f"{op_name(op)} by {origin(node).kernel} has no variant {variant!r}{others}"
    problem = kernel.available() or _lacks(kernel, node) or kernel.refuses(node)
    return problem or Choice(choice.backend, kernel, kernel.why or choice.why, choice.refusals, (*choice.variants, variant))
