"""Experts that a model runs one by one in a loop of its own, outside of Transformers' experts interface.

A loop reads from the device which experts were chosen, so it cannot be captured, and makes the host wait. During capture such a
module emits ``moefx.experts`` instead; otherwise its own forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moefx import ops
from moefx.errors import CaptureError
from moefx.integrations import peft as adapters
from moefx.integrations.transformers.attention import is_patched
from moefx.internals.subclass import forward_around


class Loop(NamedTuple):
    """How a class of Transformers is expressed by ``moefx.experts``."""

    #: (module, emit, *its forward's arguments) -> what its forward gives. ``emit(x, index, weights, up, down, transposed)`` is
    #: ``moefx.experts`` with the module's activation.
    forward: Callable[..., Any]
    #: The module that its experts apply to the gates; None if it has no activation.
    activation: Callable[[Any], nn.Module] | None = None


def _parameter(module: Any, holder: str, name: str, kind: str) -> Tensor:
    """The parameter of a module's submodule ``holder``, of class ``kind``, whose forward is not called; with its adapters."""
    inside = getattr(module, holder)
    found = adapters.adapted_parameter(inside, name)
    if found is None or type(adapters.without_wrappers(inside)).__name__ != kind:
        raise CaptureError(
            f"{type(module).__name__}.{holder} is a {type(inside).__name__}: moefx reads its {name} as that of {kind}"
        )
    return found


def _dbrx(module: Any, emit: Callable, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Flat w1 (gates), v1 and w2 [E * I, H]: the first two are concatenated into a copy, w2 is used in place."""
    experts = module.num_experts, module.ffn_hidden_size, module.hidden_size
    gate, up, down = (_parameter(module, "mlp", name, "DbrxExpertGLU").view(experts) for name in ("w1", "v1", "w2"))
    x = hidden_states.reshape(-1, module.hidden_size)
    both = torch.cat((gate.transpose(1, 2), up.transpose(1, 2)), 2)
    return emit(x, index, weights, both, down, True).view(hidden_states.shape)


def _longcat_flash(module: Any, emit: Callable, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """gate_up_proj [E + Z, 2I, H], down_proj [E, H, I]: the last Z (zero-computation) experts return their input."""
    own = torch.where(index >= module.num_routed_experts, weights, 0.0).sum(-1, keepdim=True)
    return emit(hidden_states, index, weights, module.gate_up_proj, module.down_proj, False) + (hidden_states * own).to(
        hidden_states.dtype
    )


def _jetmoe(module: Any, emit: Callable, layer_input: Tensor) -> Tensor:
    """The block with its router, which already sorts rows by expert: weights [E, 2I, H] and [E, H, I] of two modules."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    *_, logits = module.router(x)
    scores, index = logits.topk(module.router.top_k, dim=1)
    weights = torch.softmax(scores, dim=1).type_as(x)
    up, down = (_parameter(module, name, "weight", "JetMoeParallelExperts") for name in ("input_linear", "output_linear"))
    out = emit(x, index, weights, up, down, False)
    return out.view(layer_input.shape) + module.bias


def _jetmoe_router(module: Any, emit: Callable, hidden_states: Tensor) -> tuple[Tensor, ...]:
    """Rows in the experts' order, their tokens and weights, the experts' counts, which stay a tensor, and logits [T, E]."""
    logits = module.layer(hidden_states).float()
    scores, index = logits.topk(module.top_k, dim=1)
    weights = torch.softmax(scores, dim=1).type_as(hidden_states).flatten()
    flat = index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(module.num_experts, dtype=flat.dtype, device=flat.device).scatter_add(0, flat, torch.ones_like(flat))
    return order, order // module.top_k, weights[order], counts, logits


def _jetmoe_linear(module: Any, emit: Callable, inputs: Tensor, counts: Tensor) -> Tensor:
    """The projections of attention's queries and output."""
    return ops.grouped_linear(inputs, module.weight, counts)


#: By the name of the class.
LOOPS = {
    "DbrxExperts": Loop(_dbrx, lambda m: adapters.without_wrappers(m.mlp).activation_fn),
    "LongcatFlashExperts": Loop(_longcat_flash, lambda m: m.act_fn),
    "JetMoeMoE": Loop(_jetmoe, lambda m: m.activation),
    "JetMoeTopKGating": Loop(_jetmoe_router),
    "JetMoeParallelExperts": Loop(_jetmoe_linear),
}


def is_loop(module: nn.Module) -> bool:
    """Is the module of a class in :data:`LOOPS`?"""
    known = type(module).__name__ in LOOPS and type(module).__module__.startswith("transformers.")
    # a LongCat-Flash layer may have only zero-computation experts
    return known and getattr(module, "gate_up_proj", module) is not None


class Gated(nn.Module):
    """An activation with the attributes that Transformers' experts have."""

    has_gate = True

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def _apply_gate(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, -1)
        return self.act(gate) * up


@functools.cache
def emitting_class(base: type, emitter: Callable[[nn.Module], Callable | None]) -> type:
    """A subclass of such a module's class. ``emitter(module)`` returns how to emit, or None for its own forward."""
    loop = LOOPS[base.__name__]

    def run(module: nn.Module, plain: Callable, args: tuple, kwargs: dict) -> Any:
        emit = emitter(module)
        if emit is None or is_patched(plain.func, base):  # type: ignore[attr-defined]
            return plain(*args, **kwargs)
        return loop.forward(module, emit, *args, **kwargs)

    return forward_around(base, run)
