"""The head: lm_head and loss as one function of the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moefx.errors import CaptureError
from moefx.frontend.call_signature import Call
from moefx.frontend.call_template import Template, flatten
from moefx.frontend.export import capture_module
from moefx.frontend.lazy_logits import LazyLogits, Projection, Steps, after
from moefx.frontend.module_state import foreign_hooks, global_hooks, of_class
from moefx.integrations import transformers as hf
from moefx.ir.program import Function

#: The forward whose loss can be computed without it; someone may replace it.
_LINEAR = nn.Linear.forward


def split_logits(args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """The logits in a call of a loss function, which takes them first or by name, and the other arguments."""
    if "logits" in kwargs:
        rest = dict(kwargs)
        return rest.pop("logits"), args, rest
    return (args[0] if args else None), args[1:], kwargs


class Head(nn.Module):
    """The module that is captured: lm_head, then the model's loss function."""

    def __init__(self, lm_head: nn.Module, loss: Callable):
        super().__init__()
        self.lm_head, self.loss = lm_head, loss

    def forward(self, hidden: Tensor, *args: Any, logits_steps: Steps = (), **kwargs: Any) -> Tensor:
        """The loss [] of ``hidden`` [B, S, H]; other arguments go to the loss function."""
        return self.loss(after(self.lm_head(hidden), logits_steps), *args, **kwargs)


class _Watched:
    """How the example forward used its logits."""

    def __init__(self) -> None:
        self.call: tuple[Tensor, tuple, dict, Steps] | None = None
        self.reason = "the forward did not pass lm_head's logits to the model's loss_function"


def lm_head_of(model: Any) -> nn.Linear | None:
    """The output embedding, if it is a linear layer."""
    found = model.get_output_embeddings()
    return found if isinstance(found, nn.Linear) else None


def why_stored(lm_head: nn.Module) -> str | None:
    """Why the logits of ``lm_head`` must be computed in each call; None if they need not be."""
    for hook, backward in foreign_hooks(lm_head):
        what = "backward hook" if backward else "forward hook"
        return f"lm_head has the {what} {getattr(hook, '__qualname__', hook)}, which is called with its logits"
    for name in global_hooks():
        return f"the hook {name} on all modules is called with lm_head's logits"
    own = vars(lm_head).get("forward", of_class(type(lm_head), "forward"))
    if own is not _LINEAR:
        return f"lm_head has a forward of its own, {getattr(own, '__qualname__', own)}"
    computed = [n for n in ("weight", "bias") if n not in lm_head._parameters]
    return f"lm_head's {computed[0]} is computed in each call" if computed else None


@contextmanager
def watching_head(model: Any) -> Iterator[_Watched]:
    """Context in which lm_head returns lazy logits; yields whether the loss function got them unread."""
    watched, lm_head = _Watched(), lm_head_of(model)
    if lm_head is None:
        what = "linear output embedding" if hf.is_language_model(model) else "output embedding: it is not a language model"
        watched.reason = f"{type(model).__name__} has no {what}"
        yield watched
        return
    stored = why_stored(lm_head)
    if stored is not None:
        watched.reason = stored
        yield watched
        return
    had, loss = "_loss_function" in vars(model), model.loss_function

    def watch(*args: Any, **kwargs: Any) -> Any:
        logits, rest, named = split_logits(args, kwargs)
        if isinstance(logits, LazyLogits):
            if logits.logits is None:
                watched.call = (logits.hidden, rest, named, logits.steps)
            else:
                watched.reason = "the model reads the logits between lm_head and the loss"
            logits = logits.materialize()
        return loss(logits, *rest, **named)

    lm_head.forward = lambda h: LazyLogits(h, Projection(lm_head))  # type: ignore[method-assign,assignment]
    model.loss_function = watch
    try:
        yield watched
    finally:
        del lm_head.forward
        if had:
            model.loss_function = loss
        else:
            del model._loss_function


def head_call(hidden: Tensor, args: tuple, kwargs: Mapping[str, Any], steps: Steps) -> tuple[list[Tensor], Template]:
    """Tensors and template of a head's call. ``num_items_in_batch`` becomes a tensor: each number would be another graph."""
    kwargs = hf.count_as_tensor((hidden,), kwargs)
    if steps:
        kwargs["logits_steps"] = steps
    return flatten((hidden, *args), kwargs)


def capture_head_call(loss: Callable, lm_head: nn.Linear, path: str, call: Call) -> Function:
    """The function "head" for one kind of call. Raises CaptureError as :func:`capture_module`."""
    head = Head(lm_head, loss)
    head.train(call.training)
    try:
        function = capture_module(head, call, {}, "head")
    except CaptureError as error:
        error.reads = error.reads and error.reads.inside("lm_head")
        raise
    function.parameters = [p.removeprefix("lm_head.") for p in function.parameters]
    function.reads = function.reads.inside("lm_head")
    function.expects = {"linear_cross_entropy": 1}
    return function
