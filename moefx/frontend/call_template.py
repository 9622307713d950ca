"""Call templates: the arguments of a call, or what a module returned, with the tensors taken out.

A template is the structure of the containers and a flat tuple of leaves, like a tree of ``torch.utils._pytree``. Only tuples,
lists and dicts are containers: a graph must not look into others (caches, ``ModelOutput``).
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moefx.errors import CaptureError
from moefx.frontend.unread import Unread, name_and_kind
from moefx.integrations import transformers as hf

# --- structures ------------------------------------------------------------------------------------------------------

#: None for a leaf; else tuple, list or dict, the keys of a dict, and the structures of its items.
Structure = tuple[type, tuple | None, tuple] | None
#: Indices and keys that lead to a leaf. In a call the first is 0 for positional arguments, 1 for keyword arguments.
Path = tuple[Any, ...]

# Functions that call themselves are module-level functions here: one inside another function is a reference cycle, which keeps
# the tensors that it refers to, and with them a step's graph, until the garbage collector runs.


def split(value: Any, leaves: list[Any]) -> Structure:
    """The structure of ``value``; appends its leaves to ``leaves``."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind, None, tuple([split(v, leaves) for v in value])
    if kind is dict:
        return kind, tuple(value), tuple([split(v, leaves) for v in value.values()])
    leaves.append(value)
    return None


def fold(structure: Structure, leaf: Callable[[Path], Any], path: Path = ()) -> Any:
    """The containers of ``structure`` around ``leaf(path)`` of each leaf, which are called in the order of ``split``."""
    if structure is None:
        return leaf(path)
    kind, keys, parts = structure
    made = [fold(part, leaf, (*path, key)) for key, part in zip(range(len(parts)) if keys is None else keys, parts)]
    return kind(made) if keys is None else dict(zip(keys, made))


def paths(structure: Structure) -> list[Path]:
    """The path of each leaf."""
    found: list[Path] = []
    fold(structure, found.append)
    return found


def argument_name(path: Path) -> str:
    """``block(hidden, position_embeddings=(cos, sin))`` has "input", "position_embeddings 0" and "position_embeddings 1"."""
    keyword, argument, *rest = path
    first = argument if keyword else f"input {argument}" if argument else "input"
    return " ".join(map(str, (first, *rest)))


def _output_name(path: Path) -> str:
    return " ".join(map(str, ("output", *path)))


# --- leaves ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorLeaf:
    """The tensor at a position of the flat list of tensors."""

    tensor: int

    def fill(self, tensors: Sequence[Tensor], written: dict[Any, dict]) -> Any:
        """The tensor itself."""
        return tensors[self.tensor]


@dataclass(frozen=True)
class Constant:
    """A value that a graph holds. The type counts: a graph captured with True is not one for 1."""

    value: Any
    kind: type = field(init=False)
    tensor = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", type(self.value))

    def fill(self, tensors: Sequence[Tensor], written: dict[Any, dict]) -> Any:
        """The value itself."""
        return self.value


@dataclass(frozen=True)
class OpenNumber:
    """Any int, or any float: the module does not read it."""

    name: str
    kind: type
    tensor = None

    def fill(self, tensors: Sequence[Tensor], written: dict[Any, dict]) -> Any:
        """A stand-in that raises CaptureError when it is read."""
        return Unread(self.name, self.kind)


@dataclass(frozen=True)
class MaskLeaf:
    """A mask that is all in a :class:`hf.MaskPattern`. ``tensor``: the position of its ``starts``, None without packing."""

    dtype: torch.dtype
    window: int | None
    tensor: int | None

    def fill(self, tensors: Sequence[Tensor], written: dict[Any, dict]) -> Any:
        """The mask, at the batch size and length of the first tensor."""
        rows, length = tensors[0].shape[:2]
        starts = None if self.tensor is None else tensors[self.tensor]
        return hf.MaskPattern(self.dtype, self.window, starts).mask(rows, length, tensors[0].device)


@dataclass(frozen=True)
class WrittenDict:
    """A ``UserDict`` in which the module leaves results for others: ``argument`` is its position or keyword."""

    cls: type
    argument: int | str
    tensor = None

    def fill(self, tensors: Sequence[Tensor], written: dict[Any, dict]) -> Any:
        """A dictionary that puts what it takes into ``written[argument]`` and refuses to be read."""
        return _write_only(self.cls, self.argument, written.setdefault(self.argument, {}))


Leaf = TensorLeaf | Constant | OpenNumber | MaskLeaf | WrittenDict


def _write_only(cls: type, argument: int | str, into: dict) -> Any:
    """An instance of the dictionary ``cls`` that refuses to be read: a graph captured with it holds whatever is in there."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise CaptureError(f"it reads its argument {argument}, a {cls.__name__}: neither tensor nor constant")

    def put(_: Any, key: Any, value: Any) -> None:
        into[key] = value

    methods: dict[str, Any] = {n: refuse for n in dir(cls) if callable(getattr(cls, n)) and n not in vars(object)}
    methods |= {"__eq__": refuse, "__hash__": refuse, "__getattr__": refuse, "__setitem__": put, "_moefx_base": cls}
    return object.__new__(type(cls.__name__, (cls,), methods))


def _number_kind(leaf: Leaf) -> type | None:
    """``int`` or ``float`` for a number, also for an open one; else None."""
    return leaf.kind if isinstance(leaf, OpenNumber) or (isinstance(leaf, Constant) and leaf.kind in (int, float)) else None


def _opened(leaf: Leaf, other: Leaf, path: Path) -> Leaf | None:
    """``leaf`` if it equals ``other``, an open number for two numbers of one type, else None."""
    if leaf == other or (isinstance(leaf, OpenNumber) and leaf.kind is _number_kind(other)):
        return leaf
    kind = _number_kind(leaf)
    return OpenNumber(argument_name(path), kind) if kind is not None and kind is _number_kind(other) else None


# --- templates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A call's arguments ``(args, kwargs)``, or what a module returned, with its tensors taken out."""

    structure: Structure
    leaves: tuple[Leaf, ...]

    def fill(self, tensors: Sequence[Tensor], written: dict[Any, dict] | None = None) -> Any:
        """The arguments. What is put into a :class:`WrittenDict` goes to ``written``, by argument."""
        into = {} if written is None else written
        if self.structure is None:  # most blocks return one tensor
            return self.leaves[0].fill(tensors, into)
        values = iter([leaf.fill(tensors, into) for leaf in self.leaves])
        return fold(self.structure, lambda _: next(values))

    def _named(self) -> Iterator[tuple[str, Leaf]]:
        return zip(map(argument_name, paths(self.structure)), self.leaves, strict=True)

    def names(self) -> dict[int, str]:
        """The :func:`argument_name` of each tensor of the call, by its position."""
        return {leaf.tensor: name for name, leaf in self._named() if leaf.tensor is not None}

    def numbers(self) -> dict[str, float]:
        """The numbers in the call, by :func:`argument_name`, without open ones."""
        return {name: leaf.value for name, leaf in self._named() if isinstance(leaf, Constant) and _number_kind(leaf)}

    def covers(self, other: Template) -> bool:
        """Is ``other`` the same except for numbers that are open here?"""
        return self == other or self.opened(other) == self

    def opened(self, other: Template) -> Template | None:
        """This template with the numbers open in which ``other`` differs; None if anything else differs."""
        if self.structure != other.structure:
            return None
        leaves = []
        for leaf, theirs, path in zip(self.leaves, other.leaves, paths(self.structure), strict=True):
            opened = _opened(leaf, theirs, path)
            if opened is None:
                return None
            leaves.append(opened)
        return Template(self.structure, tuple(leaves))


def flatten(args: tuple, kwargs: dict) -> tuple[list[Tensor], Template]:
    """The tensors of a call, and its template.

    Raises:
        CaptureError: an argument is neither tensor nor constant (a cache, for example).
    """
    tensors: list[Tensor] = []
    return tensors, _template((tuple(args), dict(kwargs)), tensors, True)


def flatten_output(value: Any, tensors: list[Tensor]) -> Template:
    """The template of what a module returned; its tensors are appended to ``tensors``. Raises CaptureError as ``flatten``."""
    return _template(value, tensors, False)


def _template(value: Any, tensors: list[Tensor], is_call: bool) -> Template:
    values: list[Any] = []
    structure = split(value, values)
    return Template(
        structure, tuple([_leaf(v, path, tensors, is_call) for v, path in zip(values, paths(structure), strict=True)])
    )


def _leaf(x: Any, path: Path, tensors: list[Tensor], is_call: bool) -> Leaf:
    if type(x) is hf.LazyMask or hf.pattern_of(x) is not None:
        pattern = pattern_beside(tensors, x)
        if pattern is not None and pattern.starts is not None:
            tensors.append(pattern.starts)
        if pattern is not None:
            return MaskLeaf(pattern.dtype, pattern.window, None if pattern.starts is None else len(tensors) - 1)
        x = x.read() if type(x) is hf.LazyMask else x
    if isinstance(x, Tensor):
        tensors.append(x)
        return TensorLeaf(len(tensors) - 1)
    if type(x) is Unread:
        return OpenNumber(*name_and_kind(x))
    if x is None or isinstance(x, (bool, int, float, str, torch.dtype)):
        return Constant(x)
    if isinstance(x, UserDict) and is_call and len(path) == 2:
        # Gemma 4 hands keys and values from layer to layer in one: what a module leaves there is part of its results
        return WrittenDict(vars(type(x)).get("_moefx_base", type(x)), path[1])
    if isinstance(x, hf.AttentionWeights):
        raise CaptureError("it returns the weights of eager attention, which a graph does not compute")
    name = f"argument {argument_name(path)}" if is_call else _output_name(path)
    raise CaptureError(f"its {name} is a {type(x).__name__}, neither tensor nor constant")


def pattern_beside(tensors: list[Tensor], mask: Tensor) -> hf.MaskPattern | None:
    """The mask's pattern, if it is [B, 1, S, S] for the call's first tensor [B, S, ...]: a graph makes it from these sizes."""
    fits = bool(tensors) and (*tensors[0].shape[:1], 1, *tensors[0].shape[1:2], *tensors[0].shape[1:2]) == tuple(mask.shape)
    return hf.pattern_of(mask) if fits else None


def call_key(args: tuple, kwargs: dict) -> tuple[tuple, list[Tensor]]:
    """A hashable key that is equal for calls which one graph covers at the same sizes, and the tensors in ``flatten``'s order.

    Runs in each call of a module: quicker than a template, and anything that ``flatten`` refuses has a key too.
    """
    values: list[Any] = []
    parts: list[Any] = [split(args, values), split(kwargs, values)]
    tensors: list[Tensor] = []
    for v in values:
        if type(v) is hf.LazyMask:
            pattern = pattern_beside(tensors, v)
            if pattern is None:
                v = v.read()
            else:
                parts.append(("mask", pattern.dtype, pattern.window, pattern.starts is None))
                v = pattern.starts
        if isinstance(v, Tensor):
            tensors.append(v)
            parts.append((v.shape, v.dtype, v.device))
        elif v is None or isinstance(v, (bool, int, float, str, torch.dtype)):
            parts.append((type(v), v))
        else:
            parts.append(type(v))
    return tuple(parts), tensors
