"""The class of a module under moefx: a subclass of its own class with another forward, and the same name.

Transformers and FSDP wrap by class and by class name, so both must still match. Constructing one, ``type(model)(config)`` or
``type(model).from_pretrained(folder)``, gives a module of the original class. Copies of a module keep its class. A pickled
module is one of the original class, and the pickled class is the original one, so both can be loaded without moefx.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from moefx.internals.functions import calls_method

#: Attributes that moefx sets on modules.
ATTRIBUTES = (
    "_moefx", "_moefx_forward", "_moefx_head", "_moefx_layout", "_moefx_original_implementation", "_moefx_own_attention",
    "_moefx_router_state", "_moefx_state",
)  # fmt: skip


#: That of a module with a forward of its own: its class's forward when it was given that.
_FORMER = "_moefx_former_forward"


@functools.cache
def _metaclass(base: type) -> type:
    """A subclass of ``base``, the type of a class. Its instances are pickled as their original classes."""
    made = type(base.__name__, (base,), {})
    # pickle finds a class by its name, and refuses one that is not what it finds; copy.copy returns its argument, a class
    copyreg.pickle(made, lambda cls: (copy.copy, (own_class(cls),)))  # type: ignore[arg-type]
    return made


def subclass(base: type, **members: Any) -> type:
    """A subclass of ``base``, a module's class, with ``members``."""
    construct: Any = base.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        self.__class__ = base
        construct(self, *args, **kwargs)

    own: dict[str, Any] = {"__init__": __init__, "__reduce_ex__": pickling(base, remove)}
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_moefx_base": base}
    made: type = _metaclass(type(base))(base.__name__, (base,), {**own, **named, **members})
    return made


def forward_around(base: type, run: Callable[..., Any], kept: Callable[..., Any] | None = None, **members: Any) -> type:
    """A subclass of ``base`` with ``members`` and the forward ``run(module, plain, args, kwargs)`` around that of ``base``.

    ``plain`` is the forward that the class has at the time of the call: someone may have given it another one. A module that
    was given a forward of its own before that, around what ``module.forward`` was then, goes on to use the class's former one
    as ``plain``, in ``kept`` (default: ``run``). (A descriptor would know when a method is bound; Dynamo traces none.)
    """
    original, run_kept = own_class(base), kept or run

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self, *args, **kwargs):
        former = getattr(self, _FORMER, None)  # not by vars(self), which would be recorded as a read of all attributes
        if former is not None and "forward" not in vars(self):
            former = None
        if not isinstance(self, made):  # restored, but someone has kept this method
            return (former or original.forward)(self, *args, **kwargs)  # type: ignore[attr-defined]
        if former is None or former is original.forward:  # type: ignore[attr-defined]
            return run(self, functools.partial(base.forward, self), args, kwargs)  # type: ignore[attr-defined]
        return run_kept(self, functools.partial(former, self), args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and name not in self.__dict__:
            keeps = calls_method(value, self, type(self).forward)
            self.__dict__[_FORMER] = original.forward if keeps else None  # type: ignore[attr-defined]
        base.__setattr__(self, name, value)  # type: ignore[call-arg]

    made = subclass(base, forward=forward, __setattr__=__setattr__, **{_FORMER: None}, **members)
    return made


with_forward = functools.cache(forward_around)


def pickling(base: type, undo: Callable[[Any], None]) -> Callable:
    """A ``__reduce_ex__`` that pickles a copy of the module after ``undo``; parameters and buffers are not copied for it.

    Parts that are pickled in a way of their own, such as a Transformers model inside a PEFT model, are undone in that way.

    ``copy`` calls it as well, and gets the module as it is. A ``__deepcopy__`` would not do: PEFT's wrappers pass attributes
    that they lack on to the model inside, and copying a wrapper would copy that model only.
    """

    def __reduce_ex__(self, protocol):
        if sys._getframe(1).f_code in (copy.copy.__code__, copy.deepcopy.__code__):
            return own_class(base).__reduce_ex__(self, protocol)
        kept = {id(t): t for m in self.modules() for t in (*m._parameters.values(), *m._buffers.values())}
        copied = copy.deepcopy(self, kept)
        for m in [*copied.modules()][1:]:
            own = getattr(type(m).__reduce_ex__, "undo", undo)
            if own is not undo:
                own(m)
        undo(copied)
        return copied.__reduce_ex__(1)  # from protocol 2 on, pickle compares its class with type(self)

    __reduce_ex__.undo = undo  # type: ignore[attr-defined]
    return __reduce_ex__


def remove(module: nn.Module) -> None:
    """Restores the original classes of ``module`` and of all modules in it."""
    for m in module.modules():
        m.__class__ = _parametrized_since(type(m)) if _is_parametrized_since(m) else own_class(type(m))
        for name in (*ATTRIBUTES, *(() if "forward" in m.__dict__ else (_FORMER,))):
            m.__dict__.pop(name, None)


def _is_parametrized_since(module: nn.Module) -> bool:
    """Has torch.nn.utils.parametrize put a class of its own before moefx's?"""
    cls = type(module)
    return is_parametrized(module) and hasattr(cls, "_moefx_base") and "_moefx_base" not in vars(cls)


def _parametrized_since(cls: type) -> type:
    """The same class of parametrize's on top of the original class. (A copy of the module may have ``cls`` too.)"""
    own = {name: x for name, x in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(map(own_class, cls.__bases__)), own)


def own_class(cls: type) -> type:
    """The original class of a module, before moefx changed it."""
    while hasattr(cls, "_moefx_base"):
        cls = cls._moefx_base
    return cls
