"""The head of an optimized model: lm_head returns lazy logits, the loss function computes the loss from hidden states."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from moefx.errors import CaptureError
from moefx.frontend.call_signature import Call
from moefx.frontend.captured import Captured
from moefx.frontend.head import capture_head_call, head_call, split_logits, why_stored
from moefx.frontend.lazy_logits import LazyLogits, Projection
from moefx.frontend.module_state import Values
from moefx.frontend.reads import Reads
from moefx.integrations import fsdp
from moefx.integrations import transformers as hf
from moefx.internals.functions import home, is_of, names_in
from moefx.internals.subclass import with_forward
from moefx.ir.program import Function
from moefx.runtime.block import MAX_VARIANTS, BlockForward

#: Packages whose functions are taken to compute what they always do.
_LIBRARIES = ("torch", "transformers", "numpy", "moefx")


@dataclass(eq=False)
class HeadForward(BlockForward):
    """Runs lm_head and the loss as one captured function; ``module`` is lm_head."""

    active: bool = False  #: a forward with labels runs, whose logits are lazy
    stored: str | None = None  #: why the logits of this forward are not lazy
    loss: Callable | None = None  #: the loss function of ``functions``
    loss_value: Any = None  #: it, comparable
    #: the functions of each loss function, and what captures read that failed; by the loss function's value
    by_loss: dict[Any, tuple[list[Function], list[Reads]]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> HeadForward:
        router_state = copy.deepcopy(self.router_state, memo)
        by_loss = {value: (list(functions), list(failed)) for value, (functions, failed) in self.by_loss.items()}
        made = type(self)(self.path, self.state, [], router_state, by_loss=by_loss)
        if self.loss is not None:
            made.use(self.loss)
        return made

    @contextmanager
    def lazily(self, lm_head: nn.Module) -> Iterator[None]:
        """Context, around a forward with labels, in which ``lm_head`` returns lazy logits."""
        self.stored = why_stored(lm_head)
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def use(self, loss: Callable) -> None:
        """Makes ``functions`` those of ``loss``. Raises CaptureError if it is no function, or one of too many."""
        value = value_of(loss)
        if value == self.loss_value:
            self.loss = loss
            return
        if value not in self.by_loss and len(self.by_loss) >= MAX_VARIANTS:
            raise CaptureError(f"it was captured with {MAX_VARIANTS} other loss functions already")
        self.loss, self.loss_value = loss, value
        self.functions, self.failed = self.by_loss.setdefault(value, ([], []))
        self.snapshots = []

    @property
    def shared(self) -> Captured:
        """What was captured with this loss function."""
        return self.state.heads.setdefault(self.loss_value, Captured())

    def forget(self) -> None:
        """Drops the functions of all loss functions."""
        super().forget()
        self.by_loss.clear()
        self.loss = self.loss_value = None

    def consequence(self, module: Any, args: tuple) -> str:
        """The memory that the logits of this call take."""
        return _consequence(args[0].numel() // args[0].shape[-1] * module.weight.shape[0])

    def _export(self, module: nn.Module, call: Call, routers: dict[str, nn.Module]) -> Function:
        assert isinstance(module, nn.Linear) and self.loss is not None
        return capture_head_call(self.loss, module, self.path, call)


def _consequence(numbers: int) -> str:
    return f"it runs in plain PyTorch, which stores all logits: {4 * numbers / 2**30:.2g} GiB in fp32"


def value_of(loss: Callable) -> Any:
    """A loss function as a comparable value: its code, and what it closes over, has as defaults and names outside of itself.

    Raises:
        CaptureError: it is, or it uses, something whose state may change unseen.
    """
    inner: Any = loss
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not isinstance(inner, types.FunctionType):
        raise CaptureError(f"its loss function is a {type(inner).__name__}, not a function: what it computes may change")
    values, found, seen, left = Values(nn.Module()), [], set(), [loss]
    while left:
        x: Any = left.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, types.FunctionType):
            if is_of(home(x), _LIBRARIES):
                found.append(x)
                continue
            left += [c.cell_contents for c in x.__closure__ or () if c != types.CellType()]
            left += [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
            left += [x.__globals__[name] for name in names_in(x.__code__) if name in x.__globals__]
        elif isinstance(x, functools.partial):
            left += [x.func, *x.args, *x.keywords.values()]
        if isinstance(x, types.ModuleType | type):
            if not is_of(x.__name__ if isinstance(x, types.ModuleType) else home(x), _LIBRARIES):
                raise CaptureError(f"its loss function uses {x.__name__}, whose attributes may change")
        elif isinstance(getattr(x, "__self__", x), nn.Module):
            raise CaptureError(f"its loss function uses a {type(x).__name__}: what that computes may change")
        else:
            found.append(values.of(x))
    return tuple(found)


class FusedLoss:
    """The model's loss function, in a forward: computed from hidden states if nothing has read the logits, else from them."""

    def __init__(self, head: HeadForward, lm_head: nn.Module, loss: Callable):
        self.head, self.lm_head, self.loss = head, lm_head, loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The loss [], for the arguments of the model's loss function."""
        logits, rest, named = split_logits(args, kwargs)
        if not isinstance(logits, LazyLogits):
            if self.head.stored is not None and isinstance(logits, torch.Tensor):
                self.head._fell_back(self.lm_head, self.head.stored, consequence=_consequence(logits.numel()))
            return self.loss(*args, **kwargs)
        lm_head: Any = logits.project.module

        def original(*_: Any, **__: Any) -> Any:
            logits.skipped = False
            return self.loss(logits.materialize(), *rest, **named)

        if logits.logits is not None:
            return original()
        try:
            self.head.use(self.loss)
            tensors, template = head_call(logits.hidden, rest, named, logits.steps)
        except CaptureError as error:
            consequence = self.head.consequence(lm_head, (logits.hidden,))
            self.head._fell_back(lm_head, str(error), consequence=consequence)
            return original()
        args, kwargs = template.fill(tensors)
        logits.skipped = True
        return self.head(lm_head, args, kwargs, original)


def loss_function(base: type) -> property:
    """The property ``loss_function`` of an optimized model's class: in a forward with labels, the fused loss.

    The model's own is looked up each time: someone may have set another, or another ``loss_type``.
    """
    plain: Any = base.loss_function  # type: ignore[attr-defined]

    def get(self):
        now = plain if hf.is_traced() else base.loss_function  # type: ignore[attr-defined]  # Dynamo knows the former only
        loss, head = now.fget(self), vars(self).get("_moefx_head")
        return FusedLoss(head, self.get_output_embeddings(), loss) if head is not None and head.active else loss

    return property(get, plain.fset, plain.fdel, plain.__doc__)


def _run_lm_head(module: Any, plain: Callable, args: tuple, kwargs: dict) -> Any:
    """The forward of a head, around its own class's (``plain``): in a forward with labels, lazy logits."""
    head = module._moefx_head
    elsewhere = hf.is_emitting() or hf.is_traced() or fsdp.reshards_after_forward(module)
    if not head.active or head.stored is not None or elsewhere or len(args) != 1 or kwargs:
        return plain(*args, **kwargs)
    (hidden,) = args
    lazy = LazyLogits(hidden, Projection(module))
    autocast = lazy.modes.autocast is not None and lazy.modes.autocast[0]
    return lazy if autocast or hidden.dtype == module.weight.dtype else plain(hidden)  # the latter raises PyTorch's error


def take_head(lm_head: Any, head: HeadForward) -> None:
    """Makes ``lm_head`` return lazy logits. For a head that was put there after optimize, the loss is captured again."""
    if not isinstance(lm_head, nn.Linear):
        name = f"{type(lm_head).__module__}.{type(lm_head).__qualname__}"
        what = f"lm_head was replaced after optimize by a {name}, which is no torch.nn.Linear: its logits are stored"
        head.state.report.fell_back(head.path, what, warn=torch.is_grad_enabled())
        return
    if parametrize.is_parametrized(lm_head):  # PyTorch removes parametrizations only from a class of its own making
        head.state.report.fell_back(head.path, str(why_stored(lm_head)), warn=torch.is_grad_enabled())
        return
    lm_head.__dict__["_moefx_head"] = head
    lm_head.__class__ = with_forward(type(lm_head), _run_lm_head)  # type: ignore[arg-type]
    head.forget()
