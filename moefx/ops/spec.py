"""Specs: frozen dataclasses that name, type and document the non-tensor options of an operation, once.

    @dataclass(frozen=True)
    class ScaleSpec:
        scale: float = 1.0  #: what x is multiplied by

    @moefx.op(f"scale(Tensor x, *, {schema(ScaleSpec)}) -> Tensor")
    @takes_spec
    def scale(x, *, spec: ScaleSpec):
        return x * spec.scale

The operation's schema is generated from the fields, so that its node in a graph shows them as keyword arguments. The body, and
each kernel of the operation, takes the spec in their place: a new option is a field, and a line where it is read.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from moefx.errors import MoefxError

_EMPTY = inspect.Parameter.empty
_TYPES = {
    bool: "bool", int: "int", float: "float", str: "str",
    bool | None: "bool?", int | None: "int?", float | None: "float?", str | None: "str?",
}  # fmt: skip


def _typed_fields(spec: type) -> list[tuple[str, Any, Any]]:
    """Name, type and default (``MISSING``: none) of each field."""
    types_of = typing.get_type_hints(spec)
    for f in fields(spec):
        if types_of[f.name] not in _TYPES:
            raise MoefxError(
                f"{spec.__name__}.{f.name} is a {types_of[f.name]}: fields are bool, int, float, str, or one of them or None; "
                "tensors are arguments of the operation"
            )
    return [(f.name, types_of[f.name], f.default) for f in fields(spec)]


def schema(spec: type) -> str:
    """The fields of ``spec`` as arguments of an operator's schema: ``str score='softmax', bool fp32=True, ...``.

    Raises:
        MoefxError: a field that is not a bool, int, float or str (or None).
    """
    return ", ".join(
        f"{_TYPES[kind]} {name}" + ("" if default is MISSING else f"={default!r}")
        for name, kind, default in _typed_fields(spec)
    )


def spec_of(function: Callable) -> type | None:
    """The dataclass that ``function``'s parameter ``spec`` is annotated with; None without such a parameter.

    Raises:
        MoefxError: the annotation is not a dataclass.
    """
    parameter = inspect.signature(function).parameters.get("spec")
    if parameter is None:
        return None
    found = parameter.annotation
    if isinstance(found, str):
        found = typing.get_type_hints(function).get("spec")
    if not (isinstance(found, type) and is_dataclass(found)):
        raise MoefxError(f"{function.__qualname__} takes a spec of type {found!r}: annotate it with a frozen dataclass")
    return found


def takes_spec(function: Callable) -> Callable:
    """Gives a function of an operation's tensors and ``spec`` the operation's own signature.

    The fields of ``spec``, a dataclass by its annotation, become keyword-only parameters with their defaults. The adapter is
    generated, as dataclasses generate their methods: defaults are constants in its code, so that torch.compile, which inlines
    it, has nothing to guard on.
    """
    spec = spec_of(function)
    if spec is None:
        raise MoefxError(f"{function.__qualname__} has no parameter `spec`: takes_spec is for functions that have one")
    tensors = [p for p in inspect.signature(function).parameters.values() if p.name != "spec"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_EMPTY if default is MISSING else default)
        for name, _, default in _typed_fields(spec)
    ]
    plain = [p for p in tensors if p.kind is not p.KEYWORD_ONLY]
    named = [p for p in (*tensors, *options) if p.kind is p.KEYWORD_ONLY]

    def read(p: inspect.Parameter) -> str:
        return p.name if p in plain or p.default is _EMPTY else f"options.pop({p.name!r}, {p.default!r})"

    declared = [p.name if p.default is _EMPTY else f"{p.name}={p.default!r}" for p in plain]
    required = [p.name for p in named if p.default is _EMPTY]
    declared += ["*", *required] if required else []
    passed = [p.name if p in plain else f"{p.name}={p.name}" for p in tensors]
    lines = [f"{p.name} = {read(p)}" for p in tensors if p in named and p.default is not _EMPTY]
    lines += [
        f"spec = Spec({', '.join(f'{p.name}={read(p)}' for p in options)})",
        "if options:",
        f"    raise TypeError('{function.__name__}() got an unexpected keyword argument ' + repr(next(iter(options))))",
        f"return function({', '.join([*passed, 'spec=spec'])})",
    ]
    source = f"def make(function, Spec):\n    def call({', '.join(declared)}, **options):\n"
    source += "".join(f"        {line}\n" for line in lines) + "    return call\n"
    space: dict[str, Any] = {}
    exec(source, space)
    call = space["make"](function, spec)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(call, name, getattr(function, name))
    call.spec, call.__signature__ = spec, inspect.Signature([*plain, *named])
    return call


class Flattening:
    """``function(x, spec, n)`` as ``flat(x, score, eps, n)``: for operators, whose arguments are tensors and numbers.

    Where ``function`` has no parameter ``spec``, nothing is changed.
    """

    def __init__(self, function: Callable):
        self.spec = spec_of(function)
        parameters = list(inspect.signature(function).parameters)
        self.at = parameters.index("spec") if self.spec else len(parameters)
        self.names = tuple(f.name for f in fields(self.spec)) if self.spec else ()
        self.end = self.at + len(self.names)
        self._cached = functools.lru_cache(256)(self.spec) if self.spec else None
        read = [f"spec.{name}" for name in self.names]
        #: The arguments of ``function`` -> those of the operator.
        self.flatten: Callable[..., tuple] | None = None
        if self.spec:
            flat = [*parameters[: self.at], *read, *parameters[self.at + 1 :]]
            self.flatten = eval(f"lambda {', '.join(parameters)}: ({', '.join(flat)},)")

    def prototype(self, function: Callable) -> Callable:
        """A function with the flattened signature, to infer a schema from; not to be called."""
        if self.spec is None:
            return function
        found = []
        for p in inspect.signature(function).parameters.values():
            if p.name == "spec":
                found += [p.replace(name=name, annotation=kind) for name, kind, _ in _typed_fields(self.spec)]
            else:
                found.append(p)
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
        made.__signature__ = inspect.signature(function).replace(parameters=found)  # type: ignore[attr-defined]
        return made

    def pack(self, args: tuple) -> tuple:
        """The arguments of the operator -> those of ``function``."""
        if self._cached is None:
            return args
        return *args[: self.at], self._cached(*args[self.at : self.end]), *args[self.end :]

    def packed(self, function: Callable) -> Callable:
        """``function``, to be called with the operator's arguments."""
        if self.spec is None:
            return function

        @functools.wraps(function)
        def flat(*args: Any, **keywords: Any) -> Any:
            return function(*self.pack(args), **keywords)

        return flat

    def gradients(self, found: tuple) -> tuple:
        """One gradient for each argument of ``function`` -> one for each of the operator's: options have none."""
        return found if self.spec is None else (*found[: self.at], *[None] * len(self.names), *found[self.at + 1 :])
