"""Lazy logits: a tensor that is computed when it is first read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
Steps = tuple[tuple, ...]  #: (name, operands) each


def after(logits: Tensor, steps: Steps) -> Tensor:
    """``logits`` with ``steps`` applied."""
    for name, *operands in steps:
        logits = _STEPS[name](logits, *operands)
    return logits


class LazyLogits(Tensor):
    """``project(hidden)`` [B, S, V] after ``steps``, computed when a value of it is first read.

    Shape and dtype are known before. A loss that reads the hidden states instead never computes it, so the V floats of each
    token are not stored.
    """

    hidden: Tensor
    project: Callable[[Tensor], Tensor]
    steps: Steps
    logits: Tensor | None
    hooks: list[Callable]  #: that FSDP registers on outputs, for when the logits are computed

    @staticmethod
    def __new__(
        cls, hidden: Tensor, project: Callable[[Tensor], Tensor], vocabulary: int, dtype: torch.dtype, steps: Steps = ()
    ):
        """``project`` maps [..., H] to [..., vocabulary]; ``dtype`` is that of the logits after ``steps``."""
        shape = (*hidden.shape[:-1], vocabulary)
        out = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)  # type: ignore[attr-defined]
        out.hidden, out.project, out.steps, out.logits, out.hooks = hidden, project, steps, None, []
        return out

    def materialize(self) -> Tensor:
        """The logits as a plain tensor."""
        if self.logits is None:
            # hidden's dtype first: under autocast lm_head returns another dtype than this tensor declared
            self.logits = after(self.project(self.hidden).to(self.hidden.dtype), self.steps).to(self.dtype)
            for hook in self.hooks if self.logits.requires_grad else ():
                self.logits.register_hook(hook)
        return self.logits

    def _then(self, name: str, *operands: Any) -> LazyLogits:
        dtype = operands[0] if name == "to" else self.dtype
        steps = (*self.steps, (name, *operands))
        return LazyLogits(self.hidden, self.project, self.shape[-1], dtype, steps)

    def _as(self, dtype: torch.dtype) -> LazyLogits:
        return self if dtype == self.dtype else self._then("to", dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        me = args[0] if args else None
        if isinstance(me, LazyLogits) and me.logits is None:
            if func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]  # ==: each access makes a new object
                return me.hidden.requires_grad
            if func == Tensor._base.__get__:  # type: ignore[attr-defined]  # FSDP checks whether it is a view
                return None
            if func is Tensor.float and not kwargs and len(args) == 1:
                return me._as(torch.float32)
            if func is Tensor.to and not kwargs and len(args) == 2 and isinstance(args[1], torch.dtype):
                return me._as(args[1])
            if func in _STEP_OF and not kwargs and all(type(x) in (int, float) for x in args[1:]):
                return me._then(_STEP_OF[func], *args[1:])
            if func is Tensor.register_hook and not kwargs:
                return me.hooks.append(args[1])

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
