"""Which calls of a module a captured graph covers: the call with its tensors taken out, and what the tensors' sizes count."""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import CaptureError
from moefx.frontend.readings import OWN, Sizes, readings
from moefx.frontend.unread import Unread, name_and_kind
from moefx.integrations import transformers as hf


@dataclass(frozen=True)
class Template:
    """A call's arguments with its tensors taken out: nested tuples of ("t", position), constants, ("any", (name, type)) for a
    number that the module does not read, ("said", (dtype, window, position)) for a mask that says nothing but who comes before
    whom (:class:`hf.Said`), the tensor being where packed sequences begin if any are, and ("written", (class, name)) for a
    dictionary that takes results.
    """

    args: Any
    kwargs: Any

    def fill(self, tensors: tuple | list, written: dict[str, dict] | None = None) -> tuple[tuple, dict]:
        """The arguments; what they leave in dictionaries for others goes to ``written``, by the argument's name."""
        return _filled(self.args, tensors, written), _filled(self.kwargs, tensors, written)

    def names(self) -> dict[int, str]:
        """What the call names its tensors, by position: of ``block(hidden, position_embeddings=(cos, sin))`` "input",
        "position_embeddings 0", "position_embeddings 1".
        """
        places = ((name, what if kind == "t" else what[2]) for name, (kind, what) in self._leaves() if kind in ("t", "said"))
        return {place: name for name, place in places if place is not None}

    def numbers(self) -> dict[str, float]:
        """The numbers in the call, by the argument's name."""
        return {name: what for name, (kind, what) in self._leaves() if kind == "c" and type(what) in (int, float)}

    def _leaves(self) -> Iterator[tuple[str, Any]]:
        for i, part in enumerate(self.args[1]):
            yield from _leaves(part, f"input {i}" if i else "input")
        for key, part in self.kwargs[1]:
            yield from _leaves(part, key)

    def covers(self, other: Template) -> bool:
        """Is ``other`` the same but for numbers that this one leaves open?"""
        return self == other or self.opened(other) == self

    def opened(self, other: Template) -> Template | None:
        """This one with the numbers left open in which ``other``, the same in all else, differs; None if more differs."""
        args, kwargs = _opened(self.args, other.args), _opened(self.kwargs, other.kwargs)
        return None if args is None or kwargs is None else Template(args, kwargs)


# Functions that call themselves stand here: one inside another function is a cycle, which keeps the tensors that it knows, and
# with them a step's graph, until the collector comes.


def _filled(part: Any, tensors: tuple | list, written: dict[str, dict] | None) -> Any:
    kind, what = part
    if kind == "t":
        return tensors[what]
    if kind == "said":
        dtype, window, starts = what
        rows, length = tensors[0].shape[:2]
        return hf.Said(dtype, window, None if starts is None else tensors[starts]).mask(rows, length, tensors[0].device)
    if kind == "any":
        return Unread(*what)
    if kind == "written":
        cls, name = what
        return _written_only(cls, name, {} if written is None else written.setdefault(name, {}))
    if kind == "dict":
        return {k: _filled(v, tensors, written) for k, v in what}
    if kind in ("tuple", "list"):
        made = [_filled(v, tensors, written) for v in what]
        return tuple(made) if kind == "tuple" else made
    return what


def _inside(part: Any) -> list[tuple[Any, Any]]:
    """The parts of a part, each with its key or number."""
    kind, what = part
    return list(what) if kind == "dict" else list(enumerate(what)) if kind in ("tuple", "list") else []


def _leaves(part: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What has no parts, each with its name."""
    if part[0] not in ("tuple", "list", "dict"):
        yield name, part
    for key, inner in _inside(part):
        yield from _leaves(inner, f"{name} {key}")


def _number(part: Any) -> str:
    """Of a number, also one that is left open: "int" or "float"; else ""."""
    kind, what = part
    return what[1] if kind == "any" else type(what).__name__ if kind == "c" and type(what) in (int, float) else ""


def _opened(part: Any, other: Any, name: str = "") -> Any:
    """``part`` with the numbers left open in which ``other`` differs; None if that is not numbers of the same type."""
    if part == other:
        return part
    if _number(part) or _number(other):
        open_ = part if part[0] == "any" else ("any", (name, _number(part)))
        return open_ if _number(part) == _number(other) else None
    mine, theirs = _inside(part), _inside(other)
    if part[0] != other[0] or not mine or [k for k, _ in mine] != [k for k, _ in theirs]:
        return None
    made = [(k, _opened(v, w, f"{name} {k}".strip())) for (k, v), (_, w) in zip(mine, theirs, strict=True)]
    if any(v is None for _, v in made):
        return None
    return part[0], tuple(made) if part[0] == "dict" else tuple(v for _, v in made)


def _written_only(cls: type, name: str, into: dict) -> Any:
    """An instance of the dictionary ``cls`` that takes what is put in and refuses to be looked into: a graph captured with it
    holds whatever is in there.
    """

    def refuse(*_: Any, **__: Any) -> Any:
        raise CaptureError(f"it reads its argument {name}, a {cls.__name__}: neither tensor nor constant")

    def put(_: Any, key: Any, value: Any) -> None:
        into[key] = value

    methods: dict[str, Any] = {n: refuse for n in dir(cls) if callable(getattr(cls, n)) and n not in vars(object)}
    methods |= {"__eq__": refuse, "__hash__": refuse, "__getattr__": refuse, "__setitem__": put, "_moefx_base": cls}
    return object.__new__(type(cls.__name__, (cls,), methods))


def said_beside(tensors: list[Tensor], mask: Tensor) -> hf.Said | None:
    """What the mask says, if its sizes are those of a call's first tensor [B, S, ...]: a graph makes it again by them."""
    fits = bool(tensors) and (*tensors[0].shape[:1], 1, *tensors[0].shape[1:2], *tensors[0].shape[1:2]) == tuple(mask.shape)
    return hf.said_of(mask) if fits else None


def flatten(args: tuple, kwargs: dict) -> tuple[list[Tensor], Template]:
    """Separates tensors from constants; raises CaptureError for an argument that is neither (a cache, say).

    In a ``UserDict`` Gemma 4 hands keys and values from layer to layer: what a module leaves there is part of its results.
    """
    tensors: list[Tensor] = []
    a = ("tuple", tuple(_taken(v, f"number {i}", tensors) for i, v in enumerate(args)))
    k = ("dict", tuple((n, _taken(v, n, tensors)) for n, v in kwargs.items()))
    return tensors, Template(a, k)


def _taken(x: Any, name: str, tensors: list[Tensor]) -> Any:
    if type(x) is hf.SaidMask or hf.said_of(x) is not None:
        said = said_beside(tensors, x)
        if said is not None and said.starts is not None:
            tensors.append(said.starts)
        if said is not None:
            return ("said", (said.dtype, said.window, None if said.starts is None else len(tensors) - 1))
        x = x.read() if type(x) is hf.SaidMask else x
    if isinstance(x, Tensor):
        tensors.append(x)
        return ("t", len(tensors) - 1)
    if type(x) is Unread:
        return ("any", name_and_kind(x))
    if x is None or isinstance(x, (bool, int, float, str, torch.dtype)):
        return ("c", x)
    if type(x) in (tuple, list):
        return (type(x).__name__, tuple(_taken(v, f"{name}[{i}]", tensors) for i, v in enumerate(x)))
    if type(x) is dict:
        return ("dict", tuple((k, _taken(v, f"{name}[{k!r}]", tensors)) for k, v in x.items()))
    if isinstance(x, UserDict) and "[" not in name:
        return ("written", (vars(type(x)).get("_moefx_base", type(x)), name))
    raise CaptureError(f"its argument {name} is a {type(x).__name__}, neither tensor nor constant")


@dataclass(frozen=True)
class Call:
    """Which calls a captured graph covers: the template, and of each tensor its dtype, device and sizes.

    A size is an int, or a letter: "a", "b", ... are the leading sizes of the first tensor (batch, sequence), "ab" their
    product, "s", "t", ... are lengths of other tensors' own. A graph captured with a letter covers every number, 1 included;
    one captured with 1 covers only 1.
    """

    template: Template
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    sizes: tuple[Sizes, ...]
    training: bool
    outputs: Any = None  #: template of what the module returns
    routers: tuple[tuple[str, Any], ...] = ()  #: path inside the block, template of what it returned
    written: tuple[tuple[str, Any], ...] = ()  #: argument, template of what the module leaves in this dictionary
    adapters: tuple = ()  #: how PEFT's layers inside are switched

    @staticmethod
    def of(tensors: list[Tensor], template: Template, training: bool, known: Set[int] = frozenset()) -> Call:
        """The likeliest of ``Call.readings``: the only one where no two sizes are equal, and none is 1."""
        return next(Call.readings(tensors, template, training, known))

    @staticmethod
    def readings(
        tensors: list[Tensor], template: Template, training: bool, known: Set[int] = frozenset(), others: Iterable[Call] = ()
    ) -> Iterator[Call]:
        """The kinds of calls that this one can be of: see :mod:`moefx.frontend.readings`. ``known``: sizes of the module;
        ``others``: other kinds of calls of it.
        """
        if not tensors:
            raise CaptureError("it is called without tensors")
        before: dict[str, list[Sizes]] = {}
        for other in others:
            for i, name in other.template.names().items():
                before.setdefault(name, []).append(other.sizes[i])
        dtypes = tuple(t.dtype for t in tensors)
        for sizes in readings(tensors, known, template.names(), before):
            yield Call(template, dtypes, tensors[0].device, sizes, training)

    def covers(self, tensors: list[Tensor], template: Template, training: bool, adapters: tuple = ()) -> bool:
        if (
            not self.template.covers(template)
            or training != self.training
            or adapters != self.adapters
            or len(tensors) != len(self.dtypes)
            or tensors[0].device != self.device
        ):
            return False
        known: dict[str, int] = {}
        for t, dtype, sizes in zip(tensors, self.dtypes, self.sizes, strict=True):
            if t.dtype != dtype or len(sizes) != t.dim():
                return False
            for n, s in zip(t.shape, sizes, strict=True):
                if s == "ab":
                    s_value = known["a"] * known["b"]
                elif isinstance(s, str):
                    s_value = known.setdefault(s, n)
                else:
                    s_value = s
                if n != s_value:
                    return False
        return True

    def example(self, taken: set[int]) -> list[Tensor]:
        """Tensors of this call at sizes that are unlike each other, the call's own numbers and those in ``taken``."""
        sizes = distinct_sizes(taken | {n for shape in self.sizes for n in shape if isinstance(n, int)})
        letters = {"a": sizes[0], "b": sizes[1], "ab": sizes[0] * sizes[1], "c": sizes[1] + 2, "d": sizes[1] + 4}
        unlike = (n for n in itertools.count(sizes[1] + 6) if n not in taken and n != letters["ab"])
        letters |= dict(zip(OWN, unlike))
        shapes = [[letters[n] if isinstance(n, str) else n for n in shape] for shape in self.sizes]
        return [torch.zeros(shape, dtype=d, device=self.device) for shape, d in zip(shapes, self.dtypes, strict=True)]


def distinct_sizes(taken: set[int]) -> tuple[int, int]:
    """A batch and a sequence length that no other size of the model equals: so that sizes say what they are."""
    for batch, sequence in itertools.product((3, 5, 7, 11, 13), (17, 19, 23, 29, 31, 37, 41)):
        if not {batch, sequence, batch * sequence} & taken:
            return batch, sequence
    raise CaptureError("no example sizes are unlike all sizes of the model")


def sizes_of(module: nn.Module) -> set[int]:
    found = {int(n) for p in itertools.chain(module.parameters(), module.buffers()) for n in p.shape}
    for m in module.modules():
        found |= {v for k, v in vars(m).items() if type(v) is int and k not in hf.INDEX_NAMES}
    return found | {1, 2}
