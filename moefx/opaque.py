"""Opaque operations, as ``torch.library.custom_op`` makes them, with less around each call.

``custom_op`` reads the schema back from C++ in each call that needs a gradient, and looks for functorch's transforms: around
combine_start it adds 56 us with gradients and 18 without, these 32 and 12 (torch 2.13, two shared cores of an EPYC). What is
left out is its check that no result is an input or shares memory with one: the caller promises it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import MoefxError

_LIBRARY = torch.library.Library("moefx", "FRAGMENT")
_BELOW = torch._C._after_autograd_keyset  # type: ignore[attr-defined]
#: In a backward, ``ctx.needs_input_grad[FIRST_INPUT:]`` says of which positional inputs a gradient is wanted.
FIRST_INPUT = 2


class Opaque:
    """``torch.ops.moefx.<name>``, called like the function that it was made of."""

    def __init__(self, name: str, function: Callable, once: bool):
        self.name = name
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.moefx, name).default
        if once:
            self._register(self._refuse)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.overload(*args, **keywords)

    def register_fake(self, function: Callable) -> Callable:
        torch.library.register_fake(f"moefx::{self.name}", function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """``setup_context(ctx, inputs, keyword_only_inputs, output)``; ``backward(ctx, *grads)`` gives one gradient for each
        positional input. Keyword-only inputs that have their default may be missing."""
        overload, below = self.overload, _BELOW

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, keys, keywords, *args):  # type: ignore[override]
                out = overload.redispatch(keys & below, *args, **keywords)
                setup_context(ctx, args, keywords, out)
                return out

            @staticmethod
            def backward(ctx, *grads):  # type: ignore[override]
                found = backward(ctx, *grads)
                return *[None] * FIRST_INPUT, *found

        Function.__name__ = f"moefx_{self.name}"

        self._register(Function.apply)

    def _refuse(self, *_: Any) -> Any:
        raise MoefxError(f"moefx::{self.name} belongs to a backward, and cannot be differentiated again")

    def _register(self, with_gradients: Callable) -> None:
        """``with_gradients(keys, keywords, *args)`` is what is called where an input needs a gradient."""
        overload = self.overload

        def autograd(keys: Any, *args: Any, **keywords: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                return with_gradients(keys, keywords, *args)
            return overload.redispatch(keys & _BELOW, *args, **keywords)

        _LIBRARY.impl(self.name, autograd, "Autograd", with_keyset=True)


def opaque(name: str, *, once: bool = False) -> Callable[[Callable], Opaque]:
    """Makes the decorated function an operation ``moefx::<name>``, whose schema are its annotations. It changes no argument, no
    result shares memory with an argument or another result. ``once``: it belongs to a backward, and has none itself."""
    return lambda function: Opaque(name, function, once)
