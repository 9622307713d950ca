"""The head of an optimized model: lm_head returns lazy logits, the loss function computes the loss from hidden states."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefx.errors import CaptureError, MoefxError
from moefx.frontend.call_signature import Call
from moefx.frontend.head import capture_head_call, head_call, split_logits
from moefx.frontend.lazy_logits import LazyLogits
from moefx.integrations import fsdp
from moefx.integrations import transformers as hf
from moefx.internals.subclass import with_forward
from moefx.ir.program import Function
from moefx.runtime.block import BlockForward


@dataclass(eq=False)
class HeadForward(BlockForward):
    """Runs lm_head and the loss as one captured function; ``module`` is lm_head."""

    model_loss: Callable | None = None

    def __deepcopy__(self, memo: dict) -> HeadForward:
        return type(self)(
            self.path, self.state, self.functions, copy.deepcopy(self.router_state, memo), model_loss=self.model_loss
        )

    def consequence(self, module: nn.Module, args: tuple) -> str:
        """The memory that the logits of this call take."""
        numbers = args[0].numel() // args[0].shape[-1] * module.out_features
        return f"it runs in plain PyTorch, which stores all logits: {4 * numbers / 2**30:.2g} GiB in fp32"

    def _export(self, module: nn.Module, call: Call, routers: dict[str, nn.Module]) -> Function:
        assert isinstance(module, nn.Linear) and self.model_loss is not None
        return capture_head_call(self.model_loss, module, self.path, call)


class FusedLoss:
    """The model's loss function: computed from hidden states if nothing has read the logits, else from the logits."""

    def __init__(self, head: HeadForward, loss: Callable):
        self.head, self.loss = head, loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The loss [], for the arguments of the model's loss function."""
        logits, rest, named = split_logits(args, kwargs)
        if not isinstance(logits, LazyLogits):
            return self.loss(*args, **kwargs)
        lm_head: Any = logits.project

        def original(*_: Any, **__: Any) -> Any:
            return self.loss(logits.materialize(), *rest, **named)

        if logits.logits is not None:
            return original()
        try:
            tensors, template = head_call(logits.hidden, rest, named, logits.steps)
        except CaptureError as error:
            consequence = self.head.consequence(lm_head.module, (logits.hidden,))
            self.head._fell_back(lm_head.module, str(error), consequence=consequence)
            return original()
        args, kwargs = template.fill(tensors)
        return self.head(lm_head.module, args, kwargs, original)


class _Projection:
    """lm_head's original forward, and the module whose parameters the fused loss reads."""

    def __init__(self, module: nn.Module, forward: Callable):
        self.module, self.forward = module, forward

    def __call__(self, hidden: Tensor) -> Tensor:
        if isinstance(self.module.weight, DTensor) and not isinstance(hidden, DTensor):
            raise MoefxError("the logits are read after FSDP has resharded lm_head's weight: read them before loss.backward()")
        return self.forward(hidden)


def _lm_head_forward(base: type) -> Callable:
    plain = base.forward  # type: ignore[attr-defined]

    def forward(self, hidden):
        if not self._moefx_active or hf.is_emitting() or hf.is_traced() or fsdp.reshards_after_forward(self):
            return plain(self, hidden)
        return LazyLogits(hidden, _Projection(self, functools.partial(plain, self)), self.out_features, hidden.dtype)

    return forward


def take_head(lm_head: Any, head: HeadForward) -> None:
    """Makes ``lm_head`` return lazy logits. For a head that was put there after optimize, the loss is captured again."""
    if not isinstance(lm_head, nn.Linear):
        what = f"lm_head was replaced after optimize by a {type(lm_head).__name__}, which is not linear: its logits are stored"
        head.state.report.fell_back(head.path, what, warn=torch.is_grad_enabled())
        return
    lm_head.__dict__["_moefx_active"] = False
    lm_head.__class__ = with_forward(type(lm_head), _lm_head_forward)  # type: ignore[arg-type]
    head.forget()
