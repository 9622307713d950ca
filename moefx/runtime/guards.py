"""Guards: is the Python state that graphs of a module depend on what it was? Asked in each call."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from moefx.frontend.module_state import (
    GLOBAL_HOOKS,
    HOOKS,
    MANY,
    MISSING,
    SEQUENCES,
    attributes_of,
    by_value,
    is_around,
    is_library_object,
    of_class,
    own_classes,
)
from moefx.frontend.reads import Reads
from moefx.integrations import fsdp
from moefx.runtime.blocks import blocks_of

#: What is inside of these is no part of the value: they are compared by identity, or what is read of them stands beside them.
_NAMED_APART = (Tensor, nn.Module, PreTrainedConfig, type, types.ModuleType, str, bytes)


class Guard:
    """What some reads give in a module when it is made. :meth:`changed` asks whether they would give the same now.

    Objects are compared by identity, and containers by the identity of their items: no ``__eq__`` of other code runs, and no
    tensor is compared. An object that an equal one has replaced counts as changed; :class:`Reads` then compare values.
    """

    def __init__(self, module: nn.Module, reads: Iterable[Reads]):
        reads, modules = list(reads), dict(module.named_modules())
        #: (reader, what it reads from, ids of what it read)
        self._reads: list[tuple[Callable, Any, list[int]]] = []
        self._absent: list[tuple[Mapping[str, Any], frozenset[str]]] = []
        self._items: list[tuple[Any, list[int]]] = []
        self._cells: list[tuple[types.CellType, int]] = []
        self._kept: list[Any] = []  #: keeps alive what is compared by its id, which another object could get
        self._seen: set[int] = set()
        of_classes: dict[type, set[str]] = {}
        for path, m in modules.items():
            attributes, names = vars(m), {n for r in reads for n in r.of(path, m)}
            around = {n for n in names if is_around(path, n)}
            self._watch(attributes, (names - around) & attributes.keys())
            absent = frozenset(
                names - attributes.keys() - m._parameters.keys() - m._buffers.keys() - m._modules.keys() - around
            )
            if absent:
                self._absent.append((attributes, absent))
            of_classes.setdefault(own_classes(type(m))[0], set()).update(absent | around)
        for cls, names in of_classes.items():
            # class methods are bound anew at each look-up
            there = sorted(
                n for n in names if not isinstance(of_class(cls, n), classmethod) and of_class(cls, n) is not MISSING
            )
            if there:
                self._add(operator.attrgetter(*there, there[0]), cls)
        for r in reads:
            for place, names in r.configs.items():
                held = r.config(module, place)
                self._watch(held, names & held.keys())
            for namespace, names in r.namespaces():
                self._watch(namespace, names & namespace.keys(), inside=False)
        #: dictionaries that are compared whole: submodules, and hooks, but for the module's own, which run around its graphs
        self._live = [m._modules for m in modules.values()] + [vars(m)[h] for path, m in modules.items() if path for h in HOOKS]
        self._live += GLOBAL_HOOKS
        self._before = [dict(d) for d in self._live]
        self._dtype = torch.get_default_dtype()
        self.units = fsdp.units(module)  #: FSDP's units inside the module
        self.sharded = bool(self.units) or fsdp.is_unit(module)
        self._holders = [m._parameters for m in modules.values() if m._parameters]
        self._weights = None if self.sharded else self._weights_now()

    def _add(self, read: Callable, held: Any) -> tuple:
        found: tuple = read(held)
        self._kept.append(found)
        self._reads.append((read, held, [*map(id, found)]))
        return found

    def _watch(self, held: Mapping[str, Any], names: set[str], inside: bool = True) -> None:
        if not names:
            return
        first, *rest = sorted(names)
        for x in self._add(operator.itemgetter(first, *rest, first), held):  # of one name it would not return a tuple
            if inside or by_value(x):
                self._watch_inside(x)

    def _watch_inside(self, x: Any) -> None:
        """Watches the items of a container, the attributes of a plain object, and what a function closes over."""
        if id(x) in self._seen or isinstance(x, _NAMED_APART) or is_library_object(x):
            return
        self._seen.add(id(x))
        if isinstance(x, types.MethodType):
            return self._watch_each(x.__func__, x.__self__)
        if isinstance(x, types.FunctionType):
            for cell in x.__closure__ or ():
                if cell != types.CellType():  # it has contents
                    self._kept.append(cell.cell_contents)
                    self._cells.append((cell, id(cell.cell_contents)))
                    self._watch_inside(cell.cell_contents)
            return self._watch_each(x.__defaults__, x.__kwdefaults__, vars(x) or None)
        if isinstance(x, functools.partial):
            return self._watch_each(x.func, x.args, x.keywords)
        if not isinstance(x, Mapping | SEQUENCES):
            attributes = attributes_of(x)
            if attributes is None or isinstance(x, types.BuiltinFunctionType):
                return None
            x = vars(x) if attributes.keys() == getattr(x, "__dict__", {}).keys() else x  # else some are in slots
        items = _items(x)
        if not isinstance(x, tuple):
            self._kept.append(items)
            self._items.append((x, [*map(id, items)]))
        return self._watch_each(*items[:MANY])

    def _watch_each(self, *parts: Any) -> None:
        for x in parts:
            self._watch_inside(x)

    @property
    def size(self) -> int:
        """How many attributes, names and items are compared in each call, without hooks and submodules."""
        compared = [before for _, _, before in self._reads] + [before for _, before in self._items]
        return sum(map(len, compared)) + len(self._cells)

    def changed(self) -> bool:
        """Would the reads give other objects now, or the parameters have other dtypes or shapes?"""
        if self._live != self._before or torch.get_default_dtype() != self._dtype:
            return True
        try:
            for read, held, before in self._reads:
                if [*map(id, read(held))] != before:
                    return True
            for cell, contents in self._cells:
                if id(cell.cell_contents) != contents:
                    return True
        except (KeyError, AttributeError, ValueError):  # one is gone
            return True
        for attributes, names in self._absent:
            if not names.isdisjoint(attributes):
                return True
        for container, before in self._items:
            if [*map(id, _items(container))] != before:
                return True
        return self._weights is not None and self._weights != self._weights_now()

    def _weights_now(self) -> list[tuple] | None:
        """Dtypes and sizes of the parameters inside. None: FSDP gathers them, in a dtype of its own."""
        found = [p for held in self._holders for p in held.values() if p is not None]
        return None if any(type(p.data) is DTensor for p in found) else [(p.dtype, p.shape) for p in found]


class StepGuard:
    """What a recorded step depends on, in a model or in one of its blocks: names what is not as it was."""

    def __init__(self, path: str, module: nn.Module, reads: Iterable[Reads]):
        self.path, self.module = path, module
        self.states = [(r, r.state(module)) for r in reads]
        self.guard = Guard(module, (r for r, _ in self.states))

    def difference(self) -> str | None:
        """What differs, in words; None if nothing does."""
        if not self.guard.changed():
            return None
        for reads, state in self.states:
            found = state.difference(reads.state(self.module), self.guard.sharded)
            if found:
                return f"{self.path}: {found}" if self.path else found
        self.guard = Guard(self.module, (r for r, _ in self.states))  # other objects, but the same values
        return None


def as_inside(model: nn.Module) -> nn.Module:
    """A module that holds ``model``: what would run around the model itself, its hooks, counts there as what is inside."""
    holder = nn.Module()
    holder.add_module(type(model).__name__, model)
    return holder


def of_a_step(holder: nn.Module, reads: Reads) -> list[StepGuard]:
    """Guards of all that a step of an optimized model depends on.

    ``holder``: see :func:`as_inside`. ``reads``: those outside of the blocks.
    """
    inside = [StepGuard(path, m, [f.reads for f in b.now.functions]) for path, m, b in blocks_of(holder) if b.now is not None]
    return [StepGuard("", holder, [reads]), *inside]


def _items(container: Any) -> list:
    """What a container holds, or an object in its slots and attributes."""
    if isinstance(container, Mapping):
        return [*container.keys(), *container.values()]
    return [*container] if isinstance(container, SEQUENCES) else [*(attributes_of(container) or {}).values()]
