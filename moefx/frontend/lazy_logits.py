"""Lazy logits: a tensor that is computed when it is first read, as it would have been in the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefx.errors import MoefxError
from moefx.frontend.deferred import Modes, Stamp
from moefx.integrations import fsdp

_LOOKS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__, Tensor.is_sparse.__get__, Tensor.size, Tensor.dim, Tensor.numel,  # type: ignore[attr-defined]
    Tensor.is_floating_point, Tensor.is_complex, Tensor.ndimension, Tensor.__len__, torch.is_floating_point, torch.is_complex,
}  # fmt: skip


#: Elementwise operations of models on logits before the loss: scaling (Granite, Cohere), capping (Gemma), casts.
_STEPS: dict[str, Callable[..., Tensor]] = {"mul": torch.mul, "div": torch.div, "tanh": torch.tanh, "to": Tensor.to}
_STEP_OF = {
    Tensor.mul: "mul", Tensor.__mul__: "mul", Tensor.__rmul__: "mul", torch.mul: "mul", torch.multiply: "mul",
    Tensor.div: "div", Tensor.__truediv__: "div", torch.div: "div", Tensor.tanh: "tanh", torch.tanh: "tanh",
}  # fmt: skip
#: What needs a gradient to arrive at the logits.
_WATCHES = {Tensor.register_hook, Tensor.retain_grad}
Steps = tuple[tuple, ...]  #: (name, operands) each


def after(logits: Tensor, steps: Steps) -> Tensor:
    """``logits`` with ``steps`` applied."""
    for name, *operands in steps:
        logits = _STEPS[name](logits, *operands)
    return logits


class Projection:
    """lm_head's product with hidden states, to be computed later with the parameters that it has now."""

    def __init__(self, module: nn.Linear):
        """``module`` is lm_head, with the forward of a linear layer: weight [V, H], bias [V] or None."""
        self.module, self.vocabulary = module, module.weight.shape[0]
        # nothing trains a frozen weight, so nobody writes into it silently
        self.stamps = {n: Stamp(p, p.requires_grad) for n, p in module._parameters.items() if p is not None}

    @property
    def requires_grad(self) -> bool:
        """Does a parameter of lm_head require a gradient?"""
        return any(s.requires_grad for s in self.stamps.values())

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits of ``hidden``. Raises MoefxError if a parameter is not what it was."""
        if isinstance(self.module.weight, DTensor) and not isinstance(hidden, DTensor):
            raise MoefxError("the logits are read after FSDP has resharded lm_head's weight: read them before loss.backward()")
        for name, stamp in self.stamps.items():
            change = stamp.change()
            if change is not None:
                raise MoefxError(
                    f"the logits of a forward are first read after lm_head's {name} {change}: they are computed when they are "
                    "read, and would be those of other weights; read them before optimizer.step()"
                )
        return F.linear(hidden, self._parameter("weight"), self._parameter("bias"))  # type: ignore[arg-type]

    def _parameter(self, name: str) -> Tensor | None:
        """The parameter as the forward had it: without a gradient if it required none then."""
        stamp = self.stamps.get(name)
        return None if stamp is None else stamp.tensor if stamp.requires_grad else stamp.tensor.detach()


class LazyLogits(Tensor):
    """``project(hidden)`` [B, S, V] after ``steps``, computed when a value of it is first read.

    Shape and dtype are known before. A loss that reads the hidden states instead never computes it, so the V floats of each
    token are not stored. It is computed in the modes in which it was made, whatever they are where it is read.
    """

    hidden: Tensor
    project: Projection
    steps: Steps
    modes: Modes
    logits: Tensor | None
    skipped: bool  #: a loss was computed without it
    _source: LazyLogits | None  #: whose hooks come before the last step
    _hidden: Stamp
    hooks: list[Callable]  #: that FSDP registers on outputs, for when the logits are computed

    @staticmethod
    def __new__(cls, hidden: Tensor, project: Projection, dtype: torch.dtype | None = None, steps: Steps = ()):
        """``project`` maps [..., H] to [..., V]; ``dtype`` is that of the logits after ``steps``, if these cast."""
        shape, modes = (*hidden.shape[:-1], project.vocabulary), Modes.now(hidden.device)
        dtype = modes.dtype_of(hidden) if dtype is None else dtype
        out = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)  # type: ignore[attr-defined]
        out.hidden, out.project, out.steps, out.modes, out.logits, out.hooks = hidden, project, steps, modes, None, []
        out.skipped, out._source, out._hidden = False, None, Stamp(hidden, False)
        return out

    def materialize(self) -> Tensor:
        """The logits as a plain tensor.

        Raises:
            MoefxError: lm_head, or ``hidden``, is not what it was when this was made.
        """
        if self.logits is None:
            change = self._hidden.change()
            if change is not None:
                raise MoefxError(
                    f"the logits of a forward are first read after lm_head's input {change}: they are computed when they are "
                    "read; read them before the model's hidden states are changed"
                )
            with self.modes.on(self.hidden.device):
                if self._source is not None:
                    self.logits = after(self._source.materialize(), self.steps[len(self._source.steps) :])
                else:
                    self.logits = after(self.project(self.hidden), self.steps)
            for hook in self.hooks if self.logits.requires_grad else ():
                self.logits.register_hook(hook)
        return self.logits

    def _then(self, name: str, *operands: Any) -> LazyLogits:
        dtype = operands[0] if name == "to" else self.dtype
        out = LazyLogits(self.hidden, self.project, dtype, (*self.steps, (name, *operands)))
        # no step depends on autocast, so it may be another here: Accelerate casts outputs outside of it
        out.modes, out._hidden, out.skipped = self.modes, self._hidden, self.skipped
        out._source = self if self.hooks else None
        return out

    def _as(self, dtype: torch.dtype) -> LazyLogits:
        return self if dtype == self.dtype else self._then("to", dtype)

    def _is_grad_mode(self) -> bool:
        """Would a step that is taken here be part of the same graph of autograd?"""
        now = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return now == (self.modes.grad, self.modes.inference)

    def _refuse_unused(self, what: str) -> None:
        if self.skipped:
            raise MoefxError(
                f"{what}, and the loss of this forward was computed from hidden states, so no gradient reaches the logits: "
                "call the model without labels and compute the loss from its logits, or call moefx.restore(model)"
            )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        me = args[0] if args else None
        if isinstance(me, LazyLogits):
            if func is Tensor.register_hook and not kwargs and me.logits is None and fsdp.is_fsdp_hook(args[1]):
                return me.hooks.append(args[1])
            if func in _WATCHES:
                me._refuse_unused(f"{func.__name__} was called on logits")
        if isinstance(me, LazyLogits) and me.logits is None:
            if func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]  # ==: each access makes a new object
                return me.modes.grad and (me.hidden.requires_grad or me.project.requires_grad)
            if func == Tensor._base.__get__:  # type: ignore[attr-defined]  # FSDP checks whether it is a view
                return None
            if me._is_grad_mode():
                if func is Tensor.float and not kwargs and len(args) == 1:
                    return me._as(torch.float32)
                if func is Tensor.to and not kwargs and len(args) == 2 and isinstance(args[1], torch.dtype):
                    return me._as(args[1])
                if func in _STEP_OF and not kwargs and all(type(x) in (int, float) for x in args[1:]):
                    return me._then(_STEP_OF[func], *args[1:])
        if func is torch.autograd.grad:
            given = args[1] if len(args) > 1 else kwargs.get("inputs")
            for x in given if isinstance(given, (tuple, list)) else (given,):
                if isinstance(x, LazyLogits):
                    x._refuse_unused("torch.autograd.grad was asked for the gradient of logits")
        return func(*_real(tuple(args)), **{k: _real(v) for k, v in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # only C++ that skips __torch_function__ gets here
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(LazyLogits, lambda x: x.materialize(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _real(x: Any) -> Any:
    if isinstance(x, LazyLogits):
        return x.materialize()
    if isinstance(x, (tuple, list)):
        return type(x)(map(_real, x))
    return x
