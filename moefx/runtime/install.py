"""Installs captured functions in a model, and removes them: modules get a subclass of their class with another forward."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from moefx.frontend.head import lm_head_of, why_stored
from moefx.integrations import fsdp
from moefx.integrations import transformers as hf
from moefx.internals.subclass import forward_around, own_class, pickling, remove, with_forward
from moefx.ir.program import Function
from moefx.runtime.block import BlockForward, run_block, run_kept_block
from moefx.runtime.head import HeadForward, loss_function, take_head
from moefx.runtime.model import reshard_without_backward, run_model, run_part, sharded_save_pretrained
from moefx.runtime.recomputation import recomputation_is_seen
from moefx.runtime.router_state import RouterState
from moefx.runtime.state import Optimized


@functools.cache
def _model_class(base: type) -> type:
    """The class of an optimized model whose own class is ``base``."""
    return forward_around(
        base,
        run_model,
        save_pretrained=functools.wraps(base.save_pretrained)(sharded_save_pretrained(base)),  # type: ignore[attr-defined]
        loss_function=loss_function(base),
        __reduce_ex__=pickling(base, uninstall),
    )


def install(model: Any, state: Optimized) -> None:
    """Makes each instance of each captured function run it. Names and parameters of the model stay the same."""
    recomputation_is_seen()
    hf.activate(model, not state.program.own_attention)
    routers, router_state = tuple({own_class(type(m)) for m in hf.routers(model).values()}), RouterState()
    by_path: dict[str, list[Function]] = {}
    for function in state.program:
        for path in function.instances:
            by_path.setdefault(path, []).append(function)
    for path, functions in by_path.items():
        module = model.get_submodule(path)
        if functions[0].name == "head":
            continue
        module.__dict__["_moefx_forward"] = BlockForward(path, state, list(functions), router_state, routers)
        module.__class__ = with_forward(type(module), run_block, run_kept_block)  # type: ignore[arg-type]
    _install_head(model, state, router_state)
    for path, functions in by_path.items():
        if functions[0].name != "head":
            module = model.get_submodule(path)
            module._moefx_forward.snapshot(module)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model and not hasattr(type(part), "_moefx_base"):
            part.__dict__["_moefx_state"] = state
            part.__class__ = with_forward(type(part), run_part)  # type: ignore[arg-type]
    model.__dict__["_moefx"], model.__dict__["_moefx_router_state"] = state, router_state
    if fsdp.is_unit(model):
        state.hooks.append(model.register_forward_hook(reshard_without_backward))
    model.__class__ = _model_class(type(model))  # type: ignore[arg-type]


def _install_head(model: Any, state: Optimized, router_state: RouterState) -> None:
    """Makes the loss of the head's function. A head whose logits someone sees is captured once nobody does any more."""
    captured, lm_head = state.program.functions.get("head"), lm_head_of(model)
    if lm_head is None or (captured is None and why_stored(lm_head) is None):
        return
    path = next(p for p, m in model.named_modules() if m is lm_head)
    head = HeadForward(path, state, [], router_state)
    take_head(lm_head, head)
    if captured is not None:
        head.use(model.loss_function)
        head.functions.append(captured)
    model.__dict__["_moefx_head"] = head


def uninstall(model: Any) -> None:
    """Undoes :func:`install`."""
    state: Optimized = model._moefx
    remove(model)
    for hook in state.hooks:
        hook.remove()
    hf.restore(model, state.implementations)
