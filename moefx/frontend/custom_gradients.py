"""Refuses what a captured graph would lose of autograd: custom backwards, hooks, parameters from elsewhere, code that asks.

A graph has operations and PyTorch's derivatives of these. ``torch.export`` silently drops a custom backward and hooks on
gradients; its inputs require no gradient, and tensors that belong neither to the module nor to its call become constants.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from moefx.errors import CaptureError
from moefx.internals.assumptions import assumed, exported
from moefx.internals.torch_patches import AUTOGRAD_FUNCTION

_OURS = ("torch", "moefx")


def _refuse_function(init: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
    cls = type(self)._forward_cls
    # a custom operator keeps its registered backward
    if not cls.__module__.startswith("torch._library"):
        name = f"{cls.__module__}.{cls.__qualname__}"
        raise CaptureError(f"it calls the autograd.Function {name}, whose backward a captured graph would lose")
    init(self, *args, **kwargs)


class _Watching(TorchFunctionMode):
    """A mode is thread-local in PyTorch: other threads do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.saving = _saving()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            raise CaptureError("it puts a hook on a gradient (Tensor.register_hook), which a captured graph would lose")
        what = _ASKED.get(func)
        if what is not None:
            frame = sys._getframe(1)
            # torch.export has a mode of its own inside this one
            while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
                frame = frame.f_back
            if frame.f_globals.get("__name__", "").partition(".")[0] not in _OURS:
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise CaptureError(
                    f"its Python asks for {what} ({where}): a captured graph has one path for tensors with gradients and "
                    "without, and no hooks on them"
                )
        saving = _saving()
        if saving is not self.saving and saving is not None:
            module = getattr(saving, "__module__", None) or ""
            if module.partition(".")[0] != "torch":  # PyTorch's own recompute or move what is saved: the same values
                raise CaptureError(
                    f"it saves tensors for the backward by hooks of {module} (saved_tensors_hooks), which a captured graph "
                    "would lose"
                )
        return func(*args, **(kwargs or {}))


_ASKED = {vars(torch._C.TensorBase)[name].__get__: name for name in ("requires_grad", "grad_fn")}


def _saving() -> Any:
    """The innermost pack hook for tensors that autograd saves; None if there is none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


@contextmanager
def refusing_custom_gradients() -> Iterator[None]:
    """Context in which ``autograd.Function``, hooks on gradients, and Python that asks for gradients raise CaptureError."""
    with AUTOGRAD_FUNCTION.by(_refuse_function), _Watching():
        yield


class _Foreign(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.arg_tree_leaves(*args, **(kwargs or {})):
            if isinstance(x, Tensor) and not is_fake(x) and (x.requires_grad or isinstance(x, nn.Parameter)):
                what = "parameter" if isinstance(x, nn.Parameter) else "tensor that requires a gradient"
                raise CaptureError(
                    f"it computes with a {what} {list(x.shape)} from outside, of another module perhaps, which would become a "
                    "constant without a gradient"
                )
        return func(*args, **(kwargs or {}))


def refusing_foreign_parameters() -> TorchFunctionMode:
    """Context, inside an export, in which parameters that are not the module's own raise CaptureError when they are used."""
    return _Foreign()


def refuse_no_grad_values(graph_module: fx.GraphModule) -> None:
    """Raises CaptureError for ``torch.no_grad()`` regions with floating-point results: decomposition inlines the regions."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and "wrap_with_set_grad_enabled" in str(node.target):
            vals = node.meta.get("val", ())
            floats = [
                v
                for v in (vals if isinstance(vals, (tuple, list)) else (vals,))
                if isinstance(v, Tensor) and v.dtype.is_floating_point
            ]
            if floats and not node.args[0]:
                raise CaptureError("a torch.no_grad() region in it computes floating-point values")


def _refused(attempt: Callable[[], Any]) -> bool:
    try:
        with refusing_custom_gradients(), refusing_foreign_parameters():
            attempt()
    except CaptureError:
        return True
    return False


@assumed(
    "an autograd.Function, hooks on gradients and on saved tensors, and foreign parameters are seen when they are used",
    "torch 2.11 to 2.14",
)
def custom_gradients_are_seen() -> bool:
    """Each of the refused uses, on a parameter and on an input."""

    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * 3

    class WithSetup(Known):
        @staticmethod
        def forward(x: Tensor) -> Tensor:  # type: ignore[override]
            return x * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    bound, weight = Known.apply, nn.Parameter(torch.ones(3))
    frozen, computed, data = nn.Parameter(torch.ones(3), requires_grad=False), weight * 2, torch.ones(3)
    theirs: Any = eval("lambda t: t", {"__name__": "moefx_tried"})
    asks = eval("lambda x: x.requires_grad", {"__name__": "moefx_tried"})
    found: list[bool] = []

    def saves(x: Tensor) -> None:
        with torch.autograd.graph.saved_tensors_hooks(theirs, theirs):
            x.sin()

    def tries(x: Tensor, own: Tensor) -> Tensor:
        attempts: list[Callable[[], Any]] = [
            lambda: bound(x),
            lambda: WithSetup.apply(x),
            lambda: bound(x * own),  # type: ignore[no-untyped-call]
            lambda: (x * own).register_hook(theirs),
            lambda: saves(x * own),
            lambda: asks(x),
            lambda: x * weight,
            lambda: torch.stack([x, frozen]),
            lambda: x + computed,
        ]
        found.extend(map(_refused, attempts))
        found.append(not _refused(lambda: (x * own * data).sin()))
        return x * 1

    exported(tries, nn.Parameter(torch.ones(3)))
    return all(found)


@assumed("export puts what runs under torch.no_grad() into a node of its own", "torch 2.11 to 2.14")
def no_grad_is_seen() -> bool:
    """A ``no_grad`` region with a floating-point result."""

    def hides(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return x + y

    try:
        refuse_no_grad_values(exported(hides).graph_module)
    except CaptureError:
        return True
    return False
