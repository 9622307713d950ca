"""What a forward's functions name outside of themselves, in turn: globals, and attributes of modules, classes and objects.

The code is read, not run: a name counts wherever it may be looked up. So ``type(self).forward``, ``super().forward`` and a
method of a plain object are followed as well as a function of the same file. What has no name in the code is not found, such as
``getattr(self, "for" + "ward")``.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from moefx.frontend.module_state import CONTAINERS, MANY, MISSING, Same, Values, attributes_of, by_value
from moefx.internals.functions import home, is_installed, is_of, names_in

#: Packages and modules whose functions name nothing that a graph depends on; Transformers' two convert checkpoints.
_LIBRARIES = ("torch", "moefx", "numpy", "transformers.conversion_mapping", "transformers.core_model_loading")
#: Packages whose objects are not followed: registries, which hold all that a forward might call.
_REGISTRIES = ("transformers", "peft")
_HOLDERS = (
    property | functools.cached_property | staticmethod | classmethod | functools.partial | types.MethodType
    | type(functools.cache(len))
)  # fmt: skip
#: What these hold is compared elsewhere, or is data.
_NOT_FOLLOWED = (Tensor, nn.Module, PreTrainedConfig, str, bytes)


@dataclass(frozen=True, eq=False)
class Name:
    """What a function named, and where that is found again."""

    of: str  #: the module, class or object that has it, in words
    namespace: Mapping[str, Any]
    name: str
    value: Any  #: comparable, at that time

    def now(self) -> Any:
        """Its comparable value now."""
        return of_name(self.namespace.get(self.name, MISSING))


class Names:
    """Follows functions; :attr:`found` has what they name.

    ``packages``: those of the modules that a graph is of. What else was installed is not followed: tqdm's monitor, say.
    """

    def __init__(self, packages: set[str]) -> None:
        self.found: list[Name] = []
        self._packages = packages
        self._named: set[str] = set()
        self._namespaces: dict[int, tuple[str, Mapping[str, Any]]] = {}  #: of classes, modules and objects
        self._seen: dict[int, Any] = {}
        self._added: set[tuple[int, str]] = set()

    def follow(self, x: Any) -> None:
        """Adds what ``x`` names if it is a function or holds some, and the class of an object with what that defines."""
        if isinstance(x, _NOT_FOLLOWED) or id(x) in self._seen:
            return
        self._seen[id(x)] = x
        if isinstance(x, _HOLDERS):
            for part in ("fget", "func", "__func__", "__self__", "args", "keywords", "__wrapped__"):
                self.follow(getattr(x, part, None))
        elif isinstance(x, types.FunctionType):
            self._follow_function(x)
        elif isinstance(x, types.ModuleType):
            if self._counts(x.__name__):
                self._namespaces.setdefault(id(x), (x.__name__, vars(x)))
        elif type(x) in CONTAINERS:
            for item in () if len(x) > MANY else x.values() if isinstance(x, dict) else x:
                self.follow(item)
        elif self._counts(of := home(x if isinstance(x, type) else type(x))) and not is_of(of, _REGISTRIES):
            self.follow_class(x if isinstance(x, type) else type(x))
            if not isinstance(x, type):
                # one in slots has no dictionary that could be looked up again: what it held is compared with the object
                held = vars(x) if hasattr(x, "__dict__") else {}
                self._namespaces.setdefault(id(x), (f"a {type(x).__qualname__}", held))
                for name, item in (attributes_of(x) or {}).items():
                    if name not in held:
                        self.follow(item)

    def follow_class(self, cls: type) -> None:
        """Adds what the class and its bases define under names that the code has; what Python calls without a name, too."""
        for c in cls.__mro__:
            if self._counts(home(c)):
                self._namespaces.setdefault(id(c), (c.__qualname__, c.__dict__))
                self._seen[id(c)] = c
                if not issubclass(cls, nn.Module):
                    self._named |= {n for n, f in vars(c).items() if n.startswith("__") and inspect.isfunction(f)}

    def _follow_function(self, f: types.FunctionType) -> None:
        self.follow(getattr(f, "__wrapped__", None))
        if not self._counts(home(f)):
            return
        for cell in f.__closure__ or ():
            if cell != types.CellType():  # it has contents
                self.follow(cell.cell_contents)
        for given in (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values(), *vars(f).values()):
            self.follow(given)
        names = {*names_in(f.__code__)}
        self._named |= names
        self._add(home(f), f.__globals__, names)

    def _counts(self, module: str) -> bool:
        package = module.partition(".")[0]
        return not is_of(module, _LIBRARIES) and (package in self._packages or not is_installed(package))

    def finish(self) -> None:
        """Looks up all names in all that was followed, until there is nothing new."""
        before = None
        while before != (before := (len(self._named), len(self._namespaces), len(self._added))):
            for of, namespace in [*self._namespaces.values()]:
                self._add(of, namespace, self._named)

    def _add(self, of: str, namespace: Mapping[str, Any], names: set[str]) -> None:
        for name in names & namespace.keys():
            if (id(namespace), name) in self._added:
                continue
            self._added.add((id(namespace), name))
            x = namespace[name]
            library = inspect.isroutine(x) and not self._counts(home(x))
            if not library and not isinstance(x, types.ModuleType):
                self.found.append(Name(of, namespace, name, of_name(x)))
            self.follow(x)


def of_name(x: Any) -> Any:
    """The comparable value of what a function names: objects by identity, such as a logger, whose caches change."""
    return Values(nn.Module()).of(x) if by_value(x) else Same(x)
