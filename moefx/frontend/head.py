"""The head: lm_head and loss as one function, and logits that exist only when somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import CaptureError
from moefx.frontend.capture import Call, Recording, capture_module, flatten
from moefx.integrations import transformers as hf
from moefx.ir.program import Function, Left, Program

_LOOKS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__, Tensor.is_sparse.__get__, Tensor.size, Tensor.dim, Tensor.numel,  # type: ignore[attr-defined]
    Tensor.is_floating_point, Tensor.is_complex, Tensor.ndimension, Tensor.__len__, torch.is_floating_point, torch.is_complex,
}  # fmt: skip


#: What models do to logits before the loss, element by element: scale them (Granite, Cohere), cap them (Gemma), cast them.
_STEPS: dict[str, Callable[..., Tensor]] = {"mul": torch.mul, "div": torch.div, "tanh": torch.tanh, "to": Tensor.to}
_STEP_OF = {
    Tensor.mul: "mul", Tensor.__mul__: "mul", Tensor.__rmul__: "mul", torch.mul: "mul", torch.multiply: "mul",
    Tensor.div: "div", Tensor.__truediv__: "div", torch.div: "div", Tensor.tanh: "tanh", torch.tanh: "tanh",
}  # fmt: skip
Steps = tuple[tuple, ...]  #: (name, operands) each


def _after(logits: Tensor, steps: Steps) -> Tensor:
    for name, *operands in steps:
        logits = _STEPS[name](logits, *operands)
    return logits


class LazyLogits(Tensor):
    """``project(hidden)`` [B, S, V] after ``steps``, computed the first time that somebody reads a value.

    Shapes and dtypes are known without it. A loss that reads hidden states instead leaves it uncomputed, and V floats a
    token are never stored.
    """

    hidden: Tensor
    project: Callable[[Tensor], Tensor]
    steps: Steps
    logits: Tensor | None
    hooks: list[Callable]  #: what FSDP registers on outputs: for the logits, should there ever be any

    @staticmethod
    def __new__(
        cls, hidden: Tensor, project: Callable[[Tensor], Tensor], vocabulary: int, dtype: torch.dtype, steps: Steps = ()
    ):
        shape = (*hidden.shape[:-1], vocabulary)
        out = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)  # type: ignore[attr-defined]
        out.hidden, out.project, out.steps, out.logits, out.hooks = hidden, project, steps, None, []
        return out

    def materialize(self) -> Tensor:
        if self.logits is None:
            # hidden's dtype first: under autocast lm_head's own is another than what was promised
            self.logits = _after(self.project(self.hidden).to(self.hidden.dtype), self.steps).to(self.dtype)
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
            if func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]  # ==: each look at it makes another object
                return me.hidden.requires_grad
            if func == Tensor._base.__get__:  # type: ignore[attr-defined]  # FSDP asks whether it is a view
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
        # reached only from C++ that skipped __torch_function__
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(LazyLogits, lambda x: x.materialize(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _real(x: Any) -> Any:
    if isinstance(x, LazyLogits):
        return x.materialize()
    if isinstance(x, (tuple, list)):
        return type(x)(map(_real, x))
    return x


def split_logits(args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """The logits, and the rest of a call of a loss function, which takes them first or by name."""
    if "logits" in kwargs:
        rest = dict(kwargs)
        return rest.pop("logits"), args, rest
    return (args[0] if args else None), args[1:], kwargs


class Head(nn.Module):
    """What is captured: the loss of lm_head's logits, as the model computes it."""

    def __init__(self, lm_head: nn.Module, loss: Callable):
        super().__init__()
        self.lm_head, self.loss = lm_head, loss

    def forward(self, hidden: Tensor, *args: Any, logits_steps: Steps = (), **kwargs: Any) -> Tensor:
        return self.loss(_after(self.lm_head(hidden), logits_steps), *args, **kwargs)


class _Watched:
    """What the example forward did with its logits."""

    def __init__(self) -> None:
        self.call: tuple[Tensor, tuple, dict, Steps] | None = None
        self.reason = "the forward did not hand lm_head's logits to the model's loss_function"


def lm_head_of(model: Any) -> nn.Linear | None:
    found = model.get_output_embeddings()
    return found if isinstance(found, nn.Linear) else None


@contextmanager
def watching_head(model: Any) -> Iterator[_Watched]:
    """Within: lm_head gives lazy logits; notes whether the loss gets them unread."""
    watched, lm_head = _Watched(), lm_head_of(model)
    if lm_head is None:
        what = "linear output embedding" if hf.is_language_model(model) else "output embedding: it is no language model"
        watched.reason = f"{type(model).__name__} has no {what}"
        yield watched
        return
    real, had = lm_head.forward, "_loss_function" in vars(model)
    loss = model.loss_function

    def watch(*args: Any, **kwargs: Any) -> Any:
        logits, rest, named = split_logits(args, kwargs)
        if isinstance(logits, LazyLogits):
            if logits.logits is None:
                watched.call = (logits.hidden, rest, named, logits.steps)
            else:
                watched.reason = "the model reads the logits between lm_head and the loss"
            logits = logits.materialize()
        return loss(logits, *rest, **named)

    lm_head.forward = lambda h: LazyLogits(h, real, lm_head.out_features, h.dtype)  # type: ignore[method-assign,assignment]
    model.loss_function = watch
    try:
        yield watched
    finally:
        del lm_head.forward
        if had:
            model.loss_function = loss
        else:
            del model._loss_function


def head_call(hidden: Tensor, args: tuple, kwargs: Mapping[str, Any], steps: Steps) -> tuple[list[Tensor], Any]:
    """The tensors and template of a head's call; a number of items becomes a tensor, or each number would be a new graph."""
    kwargs = hf.count_as_tensor((hidden,), kwargs)
    if steps:
        kwargs["logits_steps"] = steps
    return flatten((hidden, *args), kwargs)


def capture_head(model: Any, recording: Recording, program: Program) -> None:
    """Adds the function "head" to ``program``, or says why there is none."""
    lm_head = lm_head_of(model)
    path = next((p for p, m in model.named_modules() if m is lm_head), "lm_head")
    if recording.head is None or lm_head is None:
        program.left.append(Left(path, "head", recording.head_reason, by_design=not hf.is_language_model(model)))
        return
    try:
        hidden, args, kwargs, steps = recording.head
        tensors, template = head_call(hidden, args, kwargs, steps)
        call = replace(Call.of(tensors, template, model.training), device=recording.device)
        function = capture_head_call(model.loss_function, lm_head, path, call)
    except CaptureError as error:
        program.left.append(Left(path, "head", str(error), detail=error.detail))
        return
    function.instances.append(path)
    program.add(function)


def capture_head_call(loss: Callable, lm_head: nn.Linear, path: str, call: Call) -> Function:
    """The function "head" for one kind of call; it serves ``path``, lm_head."""
    head = Head(lm_head, loss)
    head.train(call.training)
    function = capture_module(head, call, {}, "head")
    function.parameters = [p.removeprefix("lm_head.") for p in function.parameters]
    function.expects = {"linear_cross_entropy": 1}
    return function
