"""Opaque operations, as ``torch.library.custom_op`` makes them, with less around each call.

``custom_op`` reads the schema back from C++ in each call that needs a gradient, looks for functorch's transforms, and goes
through the dispatcher a second time. To a call with 16 arguments it adds 113 us with gradients and 18 without, these 24 and 5
(torch 2.13, a core of an EPYC). Its check that no result is an input or shares memory with one is left out: the caller
guarantees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from moefx.errors import MoefxError
from moefx.ops.registry import LIBRARY
from moefx.ops.spec import Flattening, spec_of

_BELOW = torch._C._after_autograd_keyset  # type: ignore[attr-defined]
#: In a backward, ``ctx.needs_input_grad[FIRST_INPUT:]`` says of which of the operator's arguments a gradient is wanted.
FIRST_INPUT = 2
#: With no keys below autograd but these, the dispatcher would call the function itself next.
_DEVICES = (DispatchKey.CPU, DispatchKey.CUDA)


def _on_a_device(keys: DispatchKeySet) -> bool:
    """Are the tensors with these keys plain ones, outside of any mode that intercepts operations?"""
    left = (keys & _BELOW).remove(DispatchKey.ADInplaceOrView).remove(DispatchKey.BackendSelect)
    return left.highestPriorityTypeId() in _DEVICES


def refuse_second_derivatives(name: str) -> None:
    """For the backward of an operation that computes first derivatives only: raises MoefxError under ``create_graph=True``.

    Here, not where a gradient is differentiated: one that has no graph would silently be left out of a second derivative.
    """
    if torch.is_grad_enabled():
        raise MoefxError(
            f"a backward through moefx::{name} is to be differentiated (create_graph=True), and it has first derivatives only: "
            "call moefx.restore(model) before you compute second derivatives"
        )


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, x):  # type: ignore[override]
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        refuse_second_derivatives(ctx.name)
        return None, gradient


def first_order(name: str, x: Tensor) -> Tensor:
    """x, for an operation of PyTorch that has first derivatives only, and does not say so."""
    return _FirstOrder.apply(name, x)  # type: ignore[no-untyped-call,no-any-return]


class Opaque:
    """``torch.ops.moefx.<name>``, called like the function that it was made of.

    A parameter ``spec`` of that function is flattened: the operator has an argument for each of its fields.
    """

    def __init__(self, name: str, function: Callable, once: bool):
        self.flattening = Flattening(function)
        self.name, self.function = name, self.flattening.packed(function)
        schema = torch.library.infer_schema(self.flattening.prototype(function), mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self.function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.moefx, name).default
        if once:
            self._register(self._refuse)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Calls the operator."""
        return self.overload(*args, **keywords)

    def register_fake(self, function: Callable) -> Callable:
        """Registers what gives the shapes of the results, as ``torch.library.register_fake`` does."""
        torch.library.register_fake(f"moefx::{self.name}", self.flattening.packed(function), lib=LIBRARY)
        return function

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """``setup_context(ctx, inputs, keyword_only_inputs, output)``; ``backward(ctx, *grads)`` gives a gradient per input.

        That is: one for each positional input, of which ``spec`` is one. Inputs at the end that have their default, and
        keyword-only ones, may be missing.
        """
        overload, below, flattening, name = self.overload, _BELOW, self.flattening, self.name

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, keys, keywords, *args):  # type: ignore[override]
                out = overload.redispatch(keys & below, *args, **keywords)
                setup_context(ctx, flattening.pack(args), keywords, out)
                return out

            @staticmethod
            def backward(ctx, *grads):  # type: ignore[override]
                refuse_second_derivatives(name)
                found = backward(ctx, *grads)
                return *[None] * FIRST_INPUT, *flattening.gradients(found)

        Function.__name__ = f"moefx_{self.name}"

        self._register(Function.apply)

    def _refuse(self, *_: Any) -> Any:
        raise MoefxError(f"moefx::{self.name} belongs to a backward, and cannot be differentiated again: call it under no_grad")

    def _register(self, with_gradients: Callable) -> None:
        """``with_gradients(keys, keywords, *args)`` is what is called where an input needs a gradient."""
        overload, function = self.overload, self.function
        direct: dict[int, bool] = {}  # by the keys of the tensors and of the modes around

        def autograd(keys: DispatchKeySet, *args: Any, **keywords: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                return with_gradients(keys, keywords, *args)
            which = keys.raw_repr()
            if which not in direct:
                direct[which] = _on_a_device(keys)
            return function(*args, **keywords) if direct[which] else overload.redispatch(keys & _BELOW, *args, **keywords)

        LIBRARY.impl(self.name, autograd, "Autograd", with_keyset=True)


class OpaqueOfSpec(Opaque):
    """Called with a spec in place of its fields."""

    def __init__(self, name: str, function: Callable, once: bool):
        super().__init__(name, function, once)
        self.flatten: Any = self.flattening.flatten

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Calls the operator with the fields of the spec."""
        return self.overload(*self.flatten(*args, **keywords))


def opaque(name: str, *, once: bool = False) -> Callable[[Callable], Opaque]:
    """Registers the decorated function as an operator ``moefx::<name>``, with the schema of its annotations.

    The function mutates no argument, and no result shares memory with an argument or another result. ``once``: it is part of a
    backward, and cannot be differentiated itself.
    """
    return lambda function: (OpaqueOfSpec if spec_of(function) else Opaque)(name, function, once)
