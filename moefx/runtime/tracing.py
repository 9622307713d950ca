"""An optimized model under another tool: torch.compile, torch.export, torch.jit.trace, torch.func and nn.DataParallel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from moefx.errors import MoefxError
from moefx.integrations import transformers as hf
from moefx.runtime.router_state import RouterState
from moefx.runtime.state import Optimized

#: Why a call under ``torch.func.grad``, ``vmap``, ``jvp`` or a level of forward-mode AD runs the original forward.
TRANSFORMED = "torch.func or forward-mode AD transforms it, which kernels have no rules for"


def _compute_more(state: Optimized, router_state: RouterState, training: bool) -> bool:
    """Do the graphs compute something that the original forward does not?"""
    plan = state.plan
    always = plan.ep_size > 1 or plan.balanced_routing or plan.check_numerics
    asked = router_state.recorded_routes is not None or router_state.replayed_routes is not None
    return always or asked or (training and (plan.router_z_loss > 0 or state.global_aux_loss))


def only_graphs(state: Optimized, router_state: RouterState, training: bool) -> bool:
    """Must the graphs run, since the original forward does less? Then a tracer must not see the original forward."""
    return _compute_more(state, router_state, training) or (training and router_state.tracks_load)


@torch.compiler.disable(
    reason="an optimized model with ep_size above 1, router_z_loss, balanced_routing, check_numerics, or whose routes are "
    "recorded, replayed or counted, runs moefx's graphs, which are compiled already: call it without torch.compile, or without "
    "fullgraph"
)
def untraced(run: Callable, *args: Any) -> Any:
    """``run(*args)``, after a graph break of Dynamo. Raises MoefxError under other tools."""
    if hf.is_traced():
        raise MoefxError(
            "torch.export, torch.jit.trace and torch.func see the model's own forward, which has no ep_size above 1, "
            "router_z_loss, balanced_routing or check_numerics, and does not record, replay or count routes: call "
            "moefx.restore(model) first"
        )
    return run(*args)


@torch._dynamo.assume_constant_result
def warn_compiled() -> None:
    """Warns, while Dynamo traces, once for each graph that it makes."""
    warnings.warn(
        "torch.compile sees an optimized model: it compiles the model's own forward, not moefx's graphs, which are compiled "
        "already and faster; call the model without torch.compile",
        stacklevel=2,
    )


def refuse_replica(state: Optimized, router_state: RouterState, training: bool) -> None:
    """Raises MoefxError if replicas of nn.DataParallel would compute something else than the model.

    Replicas have no parameters of their own and share all else in threads, so they run the original forward.
    """
    if _compute_more(state, router_state, training):
        raise MoefxError(
            "nn.DataParallel runs replicas of the model without ep_size above 1, router_z_loss, balanced_routing, "
            "check_numerics, recorded or replayed routes: start one process per GPU with torchrun"
        )
    state.report.runs_replicas()
