"""The Python state of a module as values that can be compared: two blocks whose states are equal may share a graph.

Values do not name the module that they belong to: what lies inside it is named by its path. Numbers, strings and containers are
compared by value, plain objects by their attributes, functions by their code and what they close over, tensors by identity.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module as all_modules
from transformers import PreTrainedConfig

from moefx.integrations import fsdp
from moefx.internals.functions import home

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: Hooks that run on every module; these dictionaries live as long as PyTorch does.
GLOBAL_HOOKS = [getattr(all_modules, f"_global_{h}_hooks") for h in ("forward", "forward_pre", "backward", "backward_pre")]

_PLAIN = (
    bool,
    int,
    str,
    bytes,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    range,
    slice,
)
SEQUENCES = list | tuple | set | frozenset | deque
CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset, deque)
#: Objects in objects are followed this far, and containers up to this many items; beyond, an object is compared by identity.
DEPTH, MANY = 6, 4096


class Same:
    """An object that is compared by identity; kept alive only if it cannot be referred to weakly."""

    def __init__(self, x: Any):
        try:
            self._get: Any = weakref.ref(x)
        except TypeError:
            self._get = lambda: x
        self._hash, self._name = id(x), _named(x)

    def __eq__(self, other: object) -> bool:
        mine = self._get()
        return isinstance(other, Same) and mine is not None and mine is other._get()

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return self._name


def _named(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    return getattr(x, "__qualname__", None) or f"a {type(x).__name__}"


class Value(tuple):
    """A comparable value, which prints as ``shown``: what it stands for."""

    shown: str

    def __new__(cls, items: Any, shown: str) -> Value:
        """Of comparable ``items``; a long ``shown`` is cut."""
        made = super().__new__(cls, items)
        made.shown = shown if len(shown) < 80 else f"{shown[:77]}..."
        return made

    def __repr__(self) -> str:
        return self.shown


#: The value of an attribute that there is not.
MISSING = Value(("missing",), "not set")


class Values:
    """Makes comparable values of what belongs to ``root``, a block for instance."""

    def __init__(self, root: nn.Module):
        self.paths = {id(m): path for path, m in root.named_modules()}
        self._inside: list[int] = []

    def of(self, x: Any) -> Any:
        """The comparable, hashable value of ``x``."""
        if isinstance(x, float):
            return Value((type(x), repr(x)), repr(x))  # by repr: NaN equals itself, -0.0 is not 0.0
        if isinstance(x, _PLAIN) and not isinstance(x, slice):
            return Value((type(x), x), repr(x))  # with its type: True is not 1
        if isinstance(x, nn.Module):
            return Value(("module", self.paths.get(id(x), Same(x))), f"the module {self.paths.get(id(x), _named(x))}")
        if isinstance(x, PreTrainedConfig):
            return Value(("config", type(x)), type(x).__name__)  # what is read of it stands beside it
        if isinstance(x, Tensor | type | types.ModuleType | types.BuiltinFunctionType) or is_library_object(x):
            return Same(x)
        if id(x) in self._inside:
            return Value(("within", len(self._inside) - self._inside.index(id(x))), "itself")
        if len(self._inside) >= DEPTH:
            return Same(x)
        self._inside.append(id(x))
        try:
            return self._of_parts(x)
        finally:
            self._inside.pop()

    def _of_parts(self, x: Any) -> Any:
        if isinstance(x, types.MethodType):
            return Value(("method", self.of(x.__func__), self.of(x.__self__)), f"the method {x.__qualname__}")
        if isinstance(x, types.FunctionType):
            return self._of_function(x)
        if isinstance(x, functools.partial):
            return Value(("partial", *map(self.of, (x.func, x.args, x.keywords))), f"a partial of {_named(x.func)}")
        if isinstance(x, types.CellType):
            try:
                return self.of(x.cell_contents)
            except ValueError:  # it is empty
                return MISSING
        if isinstance(x, slice):
            return self.of((slice, x.start, x.stop, x.step))
        if isinstance(x, Mapping | SEQUENCES) and len(x) > MANY:
            return Same(x)
        if isinstance(x, Mapping):
            items = [(self.of(k), self.of(v)) for k, v in x.items()]
            return Value((type(x), *items), f"{{{', '.join(f'{k!r}: {v!r}' for k, v in items[:9])}}}")
        if isinstance(x, SEQUENCES):
            each = [*map(self.of, x)]
            made = (frozenset(each),) if isinstance(x, set | frozenset) else each
            return Value((type(x), *made), f"[{', '.join(map(repr, each[:9]))}]")
        attributes = attributes_of(x)
        if attributes is None or len(attributes) > MANY:
            return Same(x)
        return Value((type(x), *((k, self.of(v)) for k, v in attributes.items())), _named(x))

    def _of_function(self, f: types.FunctionType) -> Value:
        parts = (f.__closure__, f.__defaults__, f.__kwdefaults__, vars(f) or None)
        return Value(("function", f.__code__, home(f), *map(self.of, parts)), f.__qualname__)


def is_library_object(x: Any) -> bool:
    """Is it an object of a class of PyTorch or moefx? These keep caches, so they are compared by identity."""
    return type(x).__module__.partition(".")[0] in ("torch", "moefx")


def by_value(x: Any) -> bool:
    """Is it a number, a string, a function, or one of Python's containers?"""
    return isinstance(x, (*_PLAIN, float, types.FunctionType, functools.partial)) or type(x) in CONTAINERS


def attributes_of(x: Any) -> dict[str, Any] | None:
    """The attributes of a plain object, also those in slots; None if it has no attributes that Python sees."""
    slots = [n for c in type(x).__mro__ for n in _names(vars(c).get("__slots__", ())) if n not in ("__dict__", "__weakref__")]
    found = {n: getattr(x, n) for n in slots if hasattr(x, n)}
    if hasattr(x, "__dict__"):
        return found | vars(x)
    return found or None


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def own_classes(cls: type) -> tuple[type, ...]:
    """The classes of a module in the order of look-ups, without those that moefx and FSDP2 have put before them."""
    found = _CLASSES.get(cls)
    if found is None:
        found = tuple(c for c in cls.__mro__ if "_moefx_base" not in vars(c) and not issubclass(c, FSDPModule))
        _CLASSES[cls] = found
    return found


_CLASSES: weakref.WeakKeyDictionary[type, tuple[type, ...]] = weakref.WeakKeyDictionary()


def of_class(cls: type, name: str) -> Any:
    """What ``name`` is for instances of ``cls`` that have no such attribute of their own; :data:`MISSING` if nothing."""
    return next((vars(c)[name] for c in own_classes(cls) if name in vars(c)), MISSING)


def foreign_hooks(module: nn.Module) -> Iterator[tuple[Any, bool]]:
    """The hooks of a module that no one of Transformers, FSDP and moefx put there, each with whether it is for gradients."""
    for hook in itertools.chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
        ours = (getattr(hook, "__module__", None) or "").startswith("moefx.")
        if "output_capturing_hook" not in getattr(hook, "__qualname__", "") and not fsdp.is_fsdp_hook(hook) and not ours:
            yield hook, False
    for hook in itertools.chain(module._backward_hooks.values(), module._backward_pre_hooks.values()):
        yield hook, True


def global_hooks() -> tuple[str, ...]:
    """The names of the hooks that are on every module (``register_module_forward_hook``, for instance)."""
    return tuple(_named(hook) for hooks in GLOBAL_HOOKS for hook in hooks.values())


def shape_of(module: nn.Module, path: str) -> tuple:
    """What every graph assumes of a module: its class, what it holds, and that nobody's hooks are on it.

    Hooks of the captured module itself, whose path is "", run around its graph.
    """
    hooks = tuple(getattr(h, "__qualname__", type(h).__name__) for h, _ in foreign_hooks(module)) if path else ()
    held = [
        (name, None if t is None else (t.dtype, tuple(t.shape)))
        for name, t in itertools.chain(module._parameters.items(), module._buffers.items())
    ]
    return own_classes(type(module))[0], tuple(n for n, m in module._modules.items() if m is not None), tuple(held), hooks


def everything(module: nn.Module, ignored: Any = None) -> tuple:
    """The value of the whole Python state of a module: equal for two that compute the same function of parameters and inputs.

    ``ignored``: of a module's class, the names of attributes that do not matter.
    """
    values, found = Values(module), []
    for path, m in module.named_modules():
        left_out = ignored(own_classes(type(m))[0]) if ignored else ()
        own = [(n, values.of(x)) for n, x in vars(m).items() if counts(n) and n not in left_out and not is_around(path, n)]
        configs = [(n, Same(x)) for n, x in vars(m).items() if isinstance(x, PreTrainedConfig)]
        found.append((path, shape_of(m, path), tuple(own), tuple(configs)))
    return tuple(found)


def is_around(path: str, name: str) -> bool:
    """Is this what runs around the graph of the captured module? Its class's forward is in the graph, one of its own is not."""
    return path == "" and name == "forward"


def counts(name: str) -> bool:
    """Is this attribute of a module part of what it computes? Not what ``nn.Module`` and moefx keep there for themselves."""
    return name not in _OWN and not name.startswith("_moefx")


_OWN = {*vars(nn.Module()), "gradient_checkpointing", "_is_hf_initialized"} - {"training"}
