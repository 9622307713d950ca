"""Capture: one forward on a small example records what each block is called with, torch.export turns each distinct block
into a graph.
"""

from __future__ import annotations

import itertools
import threading
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from moefx.errors import CaptureError, MoefxError
from moefx.frontend.custom_gradients import (
    custom_gradients_are_seen,
    no_grad_is_seen,
    refuse_no_grad_values,
    refusing_custom_gradients,
)
from moefx.frontend.functionalize import functionalize
from moefx.frontend.length_guards import questions_are_seen, refuse_limits, refusing_questions
from moefx.frontend.readings import OWN, Sizes, readings
from moefx.frontend.unread import Unread, name_and_kind
from moefx.frontend.untraceable import untraceable
from moefx.integrations import fsdp
from moefx.integrations import peft as adapters
from moefx.integrations import transformers as hf
from moefx.integrations.unsharded_view import unsharded_view
from moefx.internals import surroundings
from moefx.internals.patches import silent
from moefx.ir.graph import aten
from moefx.ir.program import Function, Left, Program

# --- calls -----------------------------------------------------------------------------------------------------------


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


#: Held while modules are captured and their graphs rewritten: torch.export and fx keep notes that are of all threads.
CAPTURING = threading.RLock()


# --- one module ------------------------------------------------------------------------------------------------------


class _Entry(nn.Module):
    """The module to export, called with its tensors only."""

    def __init__(self, module: nn.Module, call: Call, routers: dict[str, nn.Module], outputs: Callable):
        super().__init__()
        # `outputs` is told the template: torch.export undoes what a forward writes to the module
        self.block, self.template, self.routers, self.outputs = module, call.template, list(routers.items()), outputs
        self.sizes = call.sizes

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        seen: dict[str, Any] = {}  # in the order in which they run, as Transformers collects them
        hooks = [m.register_forward_hook(lambda _, __, out, path=p: seen.__setitem__(path, out)) for p, m in self.routers]
        written: dict[str, dict] = {}
        try:
            args, kwargs = self.template.fill(tensors, written)
            _, before = flatten(args, kwargs)
            out = self.block(*args, **kwargs)
        except RuntimeError as error:  # of one that depends on data torch.export would print the graph so far, a screen or ten
            raise untraceable(error, self.template.names(), self.sizes) from error
        finally:
            for h in hooks:
                h.remove()
        after, template = flatten(args, kwargs)
        if template != before or any(a is not b for a, b in zip(after, tensors, strict=True)):
            raise CaptureError("it writes into a dictionary or list that it is given")
        left = tuple(tuple(w.items()) for w in written.values())
        flat, template = flatten((out, left, *seen.values()), {})
        self.outputs((tuple(written), tuple(seen), template.args[1]))
        return tuple(flat)


@contextmanager
def _without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Activation checkpointing wraps a block's call from outside: it is no part of the graph."""
    before = [(m, m.gradient_checkpointing) for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    for m, _ in before:
        m.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for m, value in before:
            m.gradient_checkpointing = value


def foreign_hooks(module: nn.Module) -> str | None:
    """The first forward hook inside that neither Transformers' output recording nor a parallel wrapper put there."""
    for path, m in module.named_modules():
        if path == "":
            continue  # its own hooks run around the call, captured or not
        for hook in itertools.chain(m._forward_hooks.values(), m._forward_pre_hooks.values()):
            if "output_capturing_hook" not in getattr(hook, "__qualname__", "") and not fsdp.is_fsdp_hook(hook):
                return f"{getattr(hook, '__qualname__', hook)} on {path}"
        for hook in itertools.chain(m._backward_hooks.values(), m._backward_pre_hooks.values()):
            return f"{getattr(hook, '__qualname__', hook)} (backward) on {path}"
    return None


def capture_module(module: nn.Module, call: Call, routers: dict[str, nn.Module], name: str) -> Function:
    """Exports ``module`` for the calls that ``call`` describes.

    Raises CaptureError, with the reason, if the graph would not be exact: a size or a value of data decides the Python
    control flow, a custom backward would be lost, a buffer is written, a hook would be baked in.
    """
    for assumption in (custom_gradients_are_seen, no_grad_is_seen, questions_are_seen):
        assumption()
    hook = foreign_hooks(module)
    if hook:
        raise CaptureError(f"the forward hook {hook} would be baked into the graph")
    if any(disabled and merged for disabled, _, merged, _ in call.adapters):
        raise CaptureError("PEFT takes merged adapters out of the weights in this call, since they are switched off")
    tensors = call.example(sizes_of(module))
    returned: list[Any] = []
    entry = _Entry(module, call, routers, returned.append)
    entry.training = module.training
    try:
        with (
            # what fails is not logged with its stack as well: it becomes a sentence of the report
            silent("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"),
            CAPTURING,
            _without_checkpointing(module),
            unsharded_view(module),
            hf.emitting() as callers,
            refusing_custom_gradients(),
            refusing_questions(),
            torch.enable_grad(),
            torch._dynamo.config.patch(fake_tensor_cache_enabled=False),  # with symbolic sizes it costs more than it saves
            torch.autocast(call.device.type if call.device.type != "meta" else "cpu", enabled=False),
        ):
            exported = _export(entry, tensors, call)
            refuse_no_grad_values(exported.graph_module)
            if not functionalize(exported.graph):
                exported = exported.run_decompositions({})
    except CaptureError:
        raise
    except Exception as error:
        raise untraceable(error, call.template.names(), call.sizes) from error
    names, paths, (outputs, left, *of_routers) = returned[-1]
    written = tuple((name, what) for name, what in zip(names, left[1], strict=True) if what[1])
    call = replace(call, outputs=outputs, routers=tuple(zip(paths, of_routers, strict=True)), written=written)
    return _function(module, exported, call, name, callers)


def _export(entry: _Entry, tensors: list[Tensor], call: Call) -> Any:
    """torch.export with every lettered size dynamic; an error if one would become a constant."""

    def export(names: Callable[[str], Any]) -> Any:
        shapes = tuple({i: names(n) for i, n in enumerate(size) if isinstance(n, str)} for size in call.sizes)
        return torch.export.export(entry, tuple(tensors), dynamic_shapes=(shapes,), strict=False)

    named = {n: Dim(f"size_{n}") for n in ("a", "b", "c", "d", "e", "f", "g", *OWN)}
    try:
        # one name, one symbol: batch and sequence are the same in every input
        return export(lambda n: named.get(n, Dim.DYNAMIC))
    except torch._dynamo.exc.UserError:
        # named sizes must satisfy every guard for all numbers; torch 2.11 writes guards, always true, that it cannot prove so
        exported = export(lambda n: Dim.DYNAMIC)
        refuse_limits(exported)
        return exported


def _first_sentence(error: BaseException) -> str:
    lines = [x.strip() for x in str(error).splitlines() if x.strip()] or [type(error).__name__]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


def _function(module: nn.Module, exported: Any, call: Call, name: str, callers: list) -> Function:
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"it writes {spec.target or 'an input'} ({spec.kind.name.lower().replace('_', ' ')})")
    parameters: list[str] = []
    constants: list[Tensor] = []
    inputs: list[str] = []
    kinds: list[int] = []
    for spec in signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            parameters.append(spec.target.removeprefix("block."))
            kinds.append(0)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants.append(exported.constants[spec.target])
            kinds.append(1)
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
            kinds.append(2)
        else:
            raise CaptureError(f"it has an input of kind {spec.kind.name.lower().replace('_', ' ')}")
    graph = fx.Graph()
    old = [n for n in exported.graph.nodes if n.op == "placeholder"]
    copied: dict[fx.Node, fx.Node] = {}
    # parameters, then constants, then inputs, whatever the order of the export
    for kind in (0, 1, 2):
        for node, k in zip(old, kinds, strict=True):
            if k == kind:
                copied[node] = graph.node_copy(node)
                copied[node].name = node.name.removeprefix("p_block_").removeprefix("b_block_")
                copied[node].target = copied[node].name
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op not in ("call_function", "output"):
            if node.op == "call_module" and "guards" in str(node.target) and not node.users:
                continue
            raise CaptureError(f"its graph has a {node.op} of {node.target}")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"it uses the higher-order operator {node.target.name()}")
        if node.target is aten._assert_scalar.default or node.target is torch._C._set_grad_enabled:
            continue
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.eliminate_dead_code()  # what computed the assertions
    fake = next(n.meta["val"].fake_mode for n in copied.values() if isinstance(n.meta.get("val"), Tensor))
    graph_module = fx.GraphModule(nn.Module(), graph)
    made = Function(
        name, type(module).__name__, graph_module, [], parameters, constants, inputs, call, fake, promises(module, callers)
    )
    made.captured = made.copy() if made.expects.get("experts") else None
    return made


def promises(module: nn.Module, callers: list[tuple[str, nn.Module]]) -> dict[str, int]:
    """How many of each semantic operation the module's own structure promises."""
    inside = {id(m) for m in module.modules()}
    counts = {"rms_norm": sum(hf.is_norm(m) for m in module.modules())}
    counts["dense_experts"] = sum(hf.is_dense_experts(m) for m in module.modules())
    for kind in ("experts", "attention"):
        counts[kind] = len({id(m) for k, m in callers if k == kind and id(m) in inside})
    return {k: v for k, v in counts.items() if v}


# --- the whole model -------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """A module of the model that may get a captured function, and what it was called with."""

    path: str
    module: nn.Module
    call: Call
    structure: tuple
    routers: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        return self.structure, self.call


@dataclass
class Recording:
    """What one forward on an example showed."""

    calls: dict[str, tuple[tuple, dict]]
    head: tuple[Any, tuple, dict, tuple] | None
    device: torch.device  #: where the model's calls take place: not where a model that is spread over ranks was recorded
    head_reason: str = ""
    like: dict[str, str] = field(default_factory=dict)  #: a block that was not run -> the equal one that was
    structures: dict[str, tuple] = field(default_factory=dict)
    packs_beside_cache: bool | None = None  #: see :func:`_packs_beside_cache`

    def call(self, path: str) -> tuple[tuple, dict] | None:
        """What the module was called with; of a part of a block that was not run, what the equal part was called with."""
        block = next((up for up in _above(path) if up in self.like), None)
        return self.calls.get(path if block is None else self.like[block] + path[len(block) :])


def default_example(model: nn.Module, batch: int, sequence: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    ids = torch.arange(batch * sequence).remainder(vocabulary).view(batch, sequence).to(device)
    return {"input_ids": ids, "labels": ids} if hf.is_language_model(model) else {"input_ids": ids}


def resize(example: Mapping[str, Any], batch: int, sequence: int) -> dict[str, Any]:
    """The user's example at another batch and sequence length, rows and columns repeated or dropped."""
    first = next((v for v in example.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
    if first is None:
        raise MoefxError(f"example has no tensor [batch, sequence]: got {', '.join(example) or 'nothing'}; pass input_ids")
    b, s = first.shape[:2]

    def fit(v: Any) -> Any:
        if not isinstance(v, Tensor) or v.dim() < 2 or tuple(v.shape[:2]) not in ((b, s), (1, s)):
            return v
        rows = torch.arange(batch if v.shape[0] == b else 1, device=v.device) % v.shape[0]
        return v[rows][:, torch.arange(sequence, device=v.device) % s]

    return {k: fit(v) for k, v in example.items()}


def _besides_text(example: Mapping[str, Any]) -> str:
    """What to do about an example with images, say: its rows are made as long as capture wants, its images are not."""
    ids = example.get("input_ids")
    more = [k for k, v in example.items() if isinstance(v, Tensor) and isinstance(ids, Tensor) and v.shape[:2] != ids.shape]
    return f"; leave {', '.join(more)} out: calls with more than text are captured as they come" if more else ""


def record(model: Any, example: Mapping[str, Any] | None) -> Recording:
    """Runs the model once, without gradients, at sizes that tell batch and sequence from everything else."""
    from moefx.frontend.head import watching_head

    batch, sequence = distinct_sizes(sizes_of(model))
    if example is not None and not isinstance(example, Mapping):
        raise MoefxError(f"example is a {type(example).__name__}: pass the keyword arguments of the model's forward, as a dict")
    given = default_example(model, batch, sequence) if example is None else resize(example, batch, sequence)
    calls: dict[str, tuple[tuple, dict]] = {}
    handles = []

    def remember(path: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(path, (args, kwargs))

        return hook

    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(remember(path), with_kwargs=True))
    recording = Recording(calls, None, next(model.parameters()).device)
    # what is spread over ranks is recorded on meta, whole: no rank holds it, and no rank waits for another
    meta = torch.device("meta") if fsdp.is_sharded(model) else None
    if meta is not None:
        given = {k: v.to(meta) if isinstance(v, Tensor) else v for k, v in given.items()}
    given.setdefault("use_cache", False)  # type: ignore[arg-type]
    given = hf.count_as_tensor((), given)
    if "labels" not in given and "input_ids" in given and hf.is_language_model(model):
        given["labels"] = given["input_ids"]
    try:
        with (
            torch.no_grad(),
            hf.emitting(lenient=True),
            hf.unpacked_on_meta(),
            unsharded_view(model, meta),
            hf.without_packages() if meta is not None else nullcontext(),
            watching_head(model) as head,
            _once(model, recording),
        ):
            model(**given)
            recording.packs_beside_cache = _packs_beside_cache(model, given.get("input_ids"))
    except CaptureError:
        raise
    except Exception as error:
        what = "the default example" if example is None else "the example batch"
        raise MoefxError(
            f"{type(model).__name__} rejects {what} ({', '.join(given)}; resized to batch {batch}, sequence {sequence}): "
            f"{_first_sentence(error)}{_besides_text(example or {})}"
        ) from error
    finally:
        for h in handles:
            h.remove()
    recording.head, recording.head_reason = head.call, head.reason
    return recording


class _Enough(Exception):
    """A forward has shown what was asked of it."""


def _packs_beside_cache(model: nn.Module, ids: Any) -> bool | None:
    """Does the model keep packed sequences apart in a call that fills a cache? Most do not; Gemma 4's class with images makes
    its masks before there is one. Tried up to the first block; None: the model does not take such a call, nobody knows.
    """
    asked: list[Tensor] = []

    def stop(*_: Any) -> None:
        raise _Enough

    handles = [block.register_forward_pre_hook(stop) for block in hf.blocks(model).values()]
    try:
        with hf.noticing_packing(asked), suppress(_Enough):
            model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape), use_cache=True)
    except Exception:  # it takes no positions, say: see ``run`` of the model's forward for what comes of None
        return None
    finally:
        for handle in handles:
            handle.remove()
    return bool(asked)


@contextmanager
def _once(model: nn.Module, recording: Recording) -> Iterator[None]:
    """Within: of blocks with equal structure and equal calls one runs, the others return its output: depth costs nothing."""
    outputs: dict[tuple, tuple[str, Any]] = {}
    blocks = hf.blocks(model)

    def run(path: str, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        structure = recording.structures[path] = hf.structure(block)
        try:
            tensors, template = flatten(args, kwargs)
        except CaptureError:
            return type(block).forward(block, *args, **kwargs)
        key = (structure, template, tuple((t.shape, t.dtype) for t in tensors))
        if key not in outputs:
            outputs[key] = path, type(block).forward(block, *args, **kwargs)
        else:
            recording.like[path] = outputs[key][0]
        return outputs[key][1]

    changed = {p: b for p, b in blocks.items() if "forward" not in vars(b)}
    for path, block in changed.items():
        block.forward = partial(run, path, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in changed.values():
            del block.forward


def _above(path: str) -> list[str]:
    """The paths of the modules that hold a module: "model.layers", "model" for "model.layers.0"."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def sites(model: Any, recording: Recording, left: list[Left]) -> list[Site]:
    """Where functions can go: blocks, and modules with parameters outside of blocks (the final norm); in model order."""
    blocks, routers = hf.blocks(model), hf.routers(model)
    found: list[Site] = []
    heads = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    around = {"", *(up for b in blocks for up in _above(b))}
    for path, module in model.named_modules():
        outside = path not in around and path not in blocks and not any(up in blocks for up in _above(path))
        own = any(True for _ in module.parameters(recurse=False)) and not type(module).__module__.startswith("torch.nn")
        alone = outside and path in recording.calls and id(module) not in heads and own
        if path in blocks and path not in recording.calls:
            left.append(Left(path, type(module).__name__, "the example forward did not call it"))
        elif path in blocks or alone:
            site = site_of(path, module, recording, routers, left)
            if site:
                found.append(site)
    return found


def site_of(path: str, module: nn.Module, recording: Recording, routers: dict, left: list[Left]) -> Site | None:
    args, kwargs = recording.call(path) or ((), {})
    inner = {p: m for p, m in module.named_modules() if p and (at := f"{path}.{p}") in routers and recording.call(at)}
    try:
        tensors, template = flatten(args, kwargs)
        structure = recording.structures.get(path) or hf.structure(module)
        call = Call.of(tensors, template, module.training, sizes_of(module))
        call = replace(call, device=recording.device, adapters=adapters.switches(adapters.layers(module)))
        return Site(path, module, call, structure, inner)
    except CaptureError as error:
        left.append(Left(path, type(module).__name__, str(error)))
        return None


def capture_sites(model: Any, recording: Recording, program: Program) -> None:
    """One function per distinct site; where a block cannot be captured whole, its largest capturable children."""
    done: dict[tuple, Function | CaptureError] = {}
    routers = hf.routers(model)

    def take(site: Site) -> None:
        key = site.key
        if key not in done:
            done[key] = _try(site)
        result = done[key]
        if isinstance(result, Function):
            if not result.instances:
                program.add(result)
            result.instances.append(site.path)
            return
        kind = type(site.module).__name__
        program.left.append(Left(site.path, kind, str(result), hf.is_recurrent(site.module), result.detail))
        for name, child in site.module.named_children():
            path = f"{site.path}.{name}"
            worth = any(True for _ in child.parameters()) and not type(child).__module__.startswith("torch.nn")
            if worth and recording.call(path) and not hf.is_recurrent(child):
                inner = site_of(path, child, recording, routers, program.left)
                if inner:
                    take(inner)

    for site in sites(model, recording, program.left):
        take(site)


def _try(site: Site) -> Function | CaptureError:
    if hf.is_recurrent(site.module):
        mixers = [type(m).__name__ for m in site.module.modules() if m is not site.module and hf.is_recurrent(m)]
        what = mixers[0] if mixers else type(site.module).__name__
        return CaptureError(f"the recurrent mixer {what} would be unrolled over the sequence, its length baked in")
    try:
        return capture_module(site.module, site.call, site.routers, type(site.module).__name__)
    except CaptureError as error:
        return error


@surroundings.none_of_them()
def capture(model: Any, example: Mapping[str, Any] | None = None) -> Program:
    """Captures ``model``'s training graph, one function per distinct block plus the head, without changing the model.

    Works on a model on the meta device. ``example``: keyword arguments of the model's forward (default: input_ids and
    labels); only what kinds of inputs it has matters, not its sizes.

    Raises:
        MoefxError: the model is dense, quantized or on two devices, or rejects the example.
    """
    hf.check(model)
    if getattr(model, "_moefx", None) is not None:
        raise MoefxError(
            f"{type(model).__name__} is already optimized: read moefx.report(model).program, or moefx.restore(model) first"
        )
    hf.outputs_are_collected()
    program = Program(type(model).__name__, {}, [])
    try:
        _fill(program, model, example)
    except hf.OwnAttention as error:
        path = next(p for p, m in model.named_modules() if m is error.module)
        program.left.append(Left(path, type(error.module).__name__, str(error)))
        program.own_attention = True
        _fill(program, model, example)
    return program


def _fill(program: Program, model: Any, example: Mapping[str, Any] | None) -> None:
    from moefx.frontend.head import capture_head

    with hf.implementations(model, not program.own_attention):
        recording = record(model, example)
        program.packs_beside_cache = recording.packs_beside_cache
        capture_sites(model, recording, program)
        capture_head(model, recording, program)
