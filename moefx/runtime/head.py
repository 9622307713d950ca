"""The head at run time: lm_head gives lazy logits, and the model's loss function computes the loss from hidden states."""

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
    """The runtime of lm_head + loss; ``module`` is lm_head."""

    model_loss: Callable | None = None

    def __deepcopy__(self, memo: dict) -> HeadForward:
        return type(self)(
            self.path, self.state, self.functions, copy.deepcopy(self.router_state, memo), model_loss=self.model_loss
        )

    def comes_of_it(self, module: nn.Module, args: tuple) -> str:
        numbers = args[0].numel() // args[0].shape[-1] * module.out_features
        return f"it runs in plain PyTorch, which stores all logits: {4 * numbers / 2**30:.2g} GiB in fp32"

    def _export(self, module: nn.Module, call: Call, routers: dict[str, nn.Module]) -> Function:
        assert isinstance(module, nn.Linear) and self.model_loss is not None
        return capture_head_call(self.model_loss, module, self.path, call)


class FusedLoss:
    """The model's loss function: reads hidden states where the logits were not read by anybody, else the logits."""

    def __init__(self, site: HeadForward, loss: Callable):
        self.site, self.loss = site, loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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
            comes_of_it = self.site.comes_of_it(lm_head.module, (logits.hidden,))
            self.site._fell_back(lm_head.module, str(error), comes_of_it=comes_of_it)
            return original()
        args, kwargs = template.fill(tensors)
        return self.site(lm_head.module, args, kwargs, original)


class _Projection:
    """lm_head's own forward, and the module whose parameters the fused loss reads."""

    def __init__(self, module: nn.Module, forward: Callable):
        self.module, self.forward = module, forward

    def __call__(self, hidden: Tensor) -> Tensor:
        if isinstance(self.module.weight, DTensor) and not isinstance(hidden, DTensor):
            raise MoefxError(
                "the logits are read when lm_head's weight is spread over the ranks again: read them before loss.backward()"
            )
        return self.forward(hidden)


def _lm_head_forward(base: type) -> Callable:
    plain = base.forward  # type: ignore[attr-defined]

    def forward(self, hidden):
        if not self._moefx_active or hf.is_emitting() or hf.is_traced() or fsdp.reshards_after_forward(self):
            return plain(self, hidden)
        return LazyLogits(hidden, _Projection(self, functools.partial(plain, self)), self.out_features, hidden.dtype)

    return forward


def take_head(lm_head: Any, site: HeadForward) -> None:
    """Makes ``lm_head`` give lazy logits; of a head that came after optimize, the loss is captured anew."""
    if not isinstance(lm_head, nn.Linear):
        what = f"lm_head is a {type(lm_head).__name__}, put there after optimize, and not linear: its logits are stored"
        site.state.report.fell_back(site.path, what, warn=torch.is_grad_enabled())
        return
    lm_head.__dict__["_moefx_active"] = False
    lm_head.__class__ = with_forward(type(lm_head), _lm_head_forward)  # type: ignore[arg-type]
    site.forget()
