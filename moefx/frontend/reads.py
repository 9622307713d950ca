"""What a capture read of the Python state around it: a graph holds as long as these reads would give the same.

torch.compile guards on everything that tracing read. Here the forward runs as plain Python while torch.export traces it, so
look-ups of attributes are recorded as they happen: of modules, of configurations, and of the functions that its code names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moefx.errors import CaptureError
from moefx.frontend.module_state import (
    MISSING,
    Values,
    counts,
    global_hooks,
    is_around,
    of_class,
    own_classes,
    shape_of,
)
from moefx.frontend.names import Name, Names
from moefx.integrations import transformers as hf
from moefx.internals.assumptions import assumed
from moefx.internals.torch_patches import module_reads
from moefx.internals.transformers_patches import config_reads

#: Attributes that graphs do not depend on: checkpointing wraps a block's call; all implementations of experts compute the same.
_IGNORED = {"_gradient_checkpointing_func", "_experts_implementation_internal", "__class__"}


@dataclass(eq=False)
class Reads:
    """The names that were looked up, by where: they are looked up again in another state, or in another module."""

    modules: dict[str, set[str]] = field(default_factory=dict)  #: path in the captured module -> attributes
    whole: set[str] = field(default_factory=set)  #: paths of modules all of whose attributes were asked for
    #: (path of a module, its attribute, the attributes from there to a configuration) -> attributes of that configuration
    configs: dict[tuple[str, ...], set[str]] = field(default_factory=dict)
    #: what functions of the forward name outside of themselves
    names: list[Name] = field(default_factory=list)

    @contextmanager
    def recorded(self, root: nn.Module) -> Iterator[None]:
        """Context, around a call of ``root``, in which what it looks up is added."""
        paths = {id(m): path for path, m in root.named_modules()}
        places: dict[int, tuple[str, ...]] = {}

        def module(m: nn.Module, name: str) -> None:
            path = paths.get(id(m))
            if path is None or not counts(name) or name in _IGNORED:
                return
            if name == "__dict__":
                self.whole.add(path)
                return
            self.modules.setdefault(path, set()).add(name)
            found = object.__getattribute__(m, "__dict__").get(name)
            if isinstance(found, PreTrainedConfig):
                places.setdefault(id(found), (path, name))

        def config(c: PreTrainedConfig, name: str) -> None:
            place = places.get(id(c))
            if place is None or name in _IGNORED:
                return
            found = object.__getattribute__(c, "__dict__")
            if name in found:
                self.configs.setdefault(place, set()).add(name)
                if isinstance(found[name], PreTrainedConfig):
                    places.setdefault(id(found[name]), (*place, name))

        with module_reads(module), config_reads(config):
            yield

    def close(self, root: nn.Module) -> None:
        """Ends the recording of ``root``: adds what depends on all that was read."""
        # the layout of experts is found by trying what they compute, their activation too
        for path, m in root.named_modules():
            if hf.is_experts(m):
                self.whole |= {p for p, _ in m.named_modules(prefix=path)}
        self.modules.setdefault("", set()).add("forward")
        names = Names({own_classes(type(m))[0].__module__.partition(".")[0] for m in root.modules()})
        for path in self.modules.keys() | self.whole:
            m = root.get_submodule(path)
            names.follow_class(own_classes(type(m))[0])
            for name in self.of(path, m):
                own = name in vars(m) and not is_around(path, name)
                names.follow(vars(m)[name] if own else of_class(type(m), name))
        names.finish()
        self.names += names.found

    def namespaces(self) -> list[tuple[Mapping[str, Any], set[str]]]:
        """The names that functions of the forward name outside of themselves, by namespace."""
        found: dict[int, tuple[Mapping[str, Any], set[str]]] = {}
        for n in self.names:
            found.setdefault(id(n.namespace), (n.namespace, set()))[1].add(n.name)
        return list(found.values())

    def of(self, path: str, m: nn.Module) -> list[str]:
        """The names that count of a module."""
        names = set(self.modules.get(path, ()))
        if path in self.whole:
            own = {n for c in own_classes(type(m)) if not c.__module__.startswith("torch.") for n in vars(c)}
            names |= {n for n in {*vars(m), *own} if counts(n) and not n.startswith("__")}
        return sorted(names - _IGNORED - hf.without_index(own_classes(type(m))[0]))

    def state(self, root: nn.Module) -> State:
        """What the reads give in ``root`` now."""
        values, found = Values(root), {}
        for path, m in root.named_modules():
            found[path] = shape_of(m, path)
        for path in self.modules.keys() | self.whole:
            try:
                m = root.get_submodule(path)
            except AttributeError:
                continue  # the module above it has other children
            attributes = vars(m)
            for name in self.of(path, m):
                if name in attributes and not is_around(path, name):
                    if isinstance(attributes[name], PreTrainedConfig):
                        continue
                    found[path, name] = values.of(attributes[name])
                elif name not in m._parameters and name not in m._buffers and name not in m._modules:
                    found[path, name] = values.of(of_class(type(m), name))
        for place, names in self.configs.items():
            held = self.config(root, place)
            for name in names:
                found[(*place, name)] = values.of(held[name]) if name in held else MISSING
        for n in self.names:
            now = n.now()
            if now != n.value:
                found[n.of, n.name] = now
        found[("torch.get_default_dtype()",)] = values.of(torch.get_default_dtype())
        found[("hooks of all modules",)] = values.of(global_hooks())
        return State(found)

    @staticmethod
    def config(root: nn.Module, place: tuple[str, ...]) -> Mapping[str, Any]:
        """The attributes of the configuration at a place in ``root``; none if there is no such place now."""
        path, *names = place
        try:
            found: Any = root.get_submodule(path)
            for name in names:
                found = vars(found)[name]
        except (AttributeError, KeyError):
            return {}
        return vars(found) if isinstance(found, PreTrainedConfig) else {}

    def inside(self, child: str) -> Reads:
        """The reads of a submodule of what was captured."""
        start = f"{child}."

        def rest(path: str) -> str | None:
            return "" if path == child else path.removeprefix(start) if path.startswith(start) else None

        return Reads(
            {r: names for p, names in self.modules.items() if (r := rest(p)) is not None},
            {r for p in self.whole if (r := rest(p)) is not None},
            {(r, *more): names for (p, *more), names in self.configs.items() if (r := rest(p)) is not None},
            self.names,
        )


@dataclass(frozen=True)
class State:
    """What reads gave in a module: by path, or path and names."""

    values: dict[Any, Any]

    def difference(self, other: State, sharded: bool = False) -> str | None:
        """The first value of ``other`` that is not this one, in words; None if they are equal.

        ``sharded``: FSDP2 gathers parameters for each call, in a dtype of its own, so theirs are not compared.
        """
        for key in {**self.values, **other.values}:
            mine, theirs = self.values.get(key, MISSING), other.values.get(key, MISSING)
            if mine != theirs:
                if isinstance(key, str):
                    if sharded and MISSING not in (mine, theirs) and (mine[:2], mine[3]) == (theirs[:2], theirs[3]):
                        continue
                    return _differing_shapes(key, mine, theirs)
                return f"{'.'.join(filter(None, key))} was {mine!r}, is {theirs!r}"
        return None


def _differing_shapes(path: str, mine: Any, theirs: Any) -> str:
    what = f"the module {path}" if path else "it"
    if mine == MISSING or theirs == MISSING:
        return f"{what} was {'added' if mine == MISSING else 'removed'}"
    if mine[0] is not theirs[0]:
        return f"{what} was a {mine[0].__name__}, is a {theirs[0].__name__}"
    if mine[3] != theirs[3]:
        return f"{what} has the hooks {', '.join(theirs[3]) or 'none'}, had {', '.join(mine[3]) or 'none'}"
    return f"{what} has other submodules, or parameters of other dtypes or shapes"


class Written:
    """The attributes of the modules inside ``root``, to find those that a call of it writes: a graph would not write them."""

    def __init__(self, root: nn.Module):
        self.root = root
        self.before = self._now()

    def _now(self) -> dict[tuple[str, str], Any]:
        found: dict[tuple[str, str], Any] = {}
        for path, m in self.root.named_modules():
            for name, x in vars(m).items():
                if counts(name):
                    # items of containers too: a forward may append to a list
                    items = (*x, *x.values()) if isinstance(x, dict) else x if isinstance(x, list | set | deque) else ()
                    found[path, name] = x, *map(id, items)
        return found

    def refuse_changes(self) -> None:
        """Raises CaptureError if an attribute is another than it was."""
        after = self._now()
        for key in {**self.before, **after}:
            mine, theirs = self.before.get(key, ()), after.get(key, ())
            if [*map(id, mine[:1]), *mine[1:]] != [*map(id, theirs[:1]), *theirs[1:]]:
                raise CaptureError(f"its forward writes the attribute {'.'.join(filter(None, key))}, which a graph would not")


@assumed(
    "attributes of modules and configurations are seen when they are read", "torch 2.11 to 2.14, transformers 5.23 to 5.24"
)
def reads_are_seen() -> bool:
    """A module that reads a number, a parameter, a submodule, a configuration and all of its attributes."""

    class Tried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number, self.config, self.inner = 2, PreTrainedConfig(), nn.Identity()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            more = len(vars(self.inner))
            return self.inner(x * self.weight * self.number * self.config.chunk_size_feed_forward * more)

    found, tried = Reads(), Tried()

    class Entry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tried = tried

        def forward(self, x: Tensor) -> Tensor:
            with found.recorded(tried):
                return self.tried(x)

    torch.export.export(Entry(), (torch.ones(3),), strict=False)
    ended = "__getattribute__" not in vars(nn.Module)
    seen = {"number", "config", "inner", "weight"} <= found.modules[""] and found.whole == {"inner"}
    return ended and seen and "chunk_size_feed_forward" in found.configs["", "config"]
