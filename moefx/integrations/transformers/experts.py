"""Transformers' experts interface: which modules are experts, what they compute, and the "moefx" implementation."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface

from moefx import ops
from moefx.errors import CaptureError
from moefx.integrations.transformers import loop_experts as loops
from moefx.integrations.transformers import recording
from moefx.integrations.transformers.layout import ExpertsLayout
from moefx.integrations.transformers.sharded_experts import experts_over_ranks
from moefx.ops.activations import ACTIVATIONS


def is_experts(module: nn.Module) -> bool:
    """Is it made by Transformers' ``use_experts_implementation``, or does it run all experts on every token?"""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    return all(hasattr(module, a) for a in flags) or is_dense_experts(module)


def is_dense_experts(module: nn.Module) -> bool:
    """Does it multiply all experts with all tokens (Llama 4)? See ``passes/dense_experts.py``.

    Such a module gets hidden states without routes, and has gate_up_proj [E, H, 2I] and down_proj [E, I, H].
    """
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(up, Tensor) and isinstance(down, Tensor) and up.dim() == down.dim() == 3 and hasattr(module, "act_fn")):
        return False
    fits = up.shape == (down.shape[0], down.shape[2], 2 * down.shape[1])
    return fits and list(inspect.signature(type(module).forward).parameters) == ["self", "hidden_states"]


def experts_layout(module: nn.Module) -> ExpertsLayout:
    """The layout of an experts module. Raises CaptureError if ``moefx.experts`` cannot express what it computes."""
    if "_moefx_layout" not in module.__dict__:  # before it is exported: values can be compared
        try:
            found: ExpertsLayout | str = _experts_layout(module)
        except CaptureError as error:
            found = str(error)
        module.__dict__["_moefx_layout"] = found
    found = module.__dict__["_moefx_layout"]
    if isinstance(found, str):
        raise CaptureError(found)
    return found


def find_layouts(module: nn.Module) -> None:
    """Finds the layouts of the experts in ``module`` anew, before it is traced: what they compute may have changed."""
    for m in module.modules():
        if m.__dict__.pop("_moefx_layout", None) is not None:
            if is_experts(m):
                with contextlib.suppress(CaptureError):  # said again, with its reason, where the module is called
                    experts_layout(m)
            elif loops.is_loop(m):
                m.__dict__["_moefx_layout"] = _activation_of_loop(m)


def _experts_layout(module: nn.Module) -> ExpertsLayout:
    name = type(module).__name__
    if is_dense_experts(module):
        if not isinstance(module.act_fn, nn.SiLU | type(ACT2FN["silu"])):
            raise CaptureError(f"{name} runs on every token with {type(module.act_fn).__name__}: only SiLU is known here")
        return ExpertsLayout("gate_up_proj", "down_proj", False, "swiglu", 0.0, 0.0, True, False)
    if module.has_post_expert_norm:
        raise CaptureError(f"{name} normalises after each expert (has_post_expert_norm): moefx.experts has no such form")
    up = "gate_up_proj" if module.has_gate else "up_proj"
    missing = [p for p in (up, "down_proj") if not isinstance(getattr(module, p, None), nn.Parameter)]
    if missing:
        raise CaptureError(f"{name} has no parameter {missing[0]}: not the layout of Transformers' experts interface")
    interleaved = bool(module.has_gate and not module.is_concatenated)
    activation, alpha, limit = _activation(module, interleaved)
    return ExpertsLayout(
        up, "down_proj", bool(module.has_bias), activation, alpha, limit, bool(module.is_transposed), interleaved
    )


def _activation(module: nn.Module, interleaved: bool) -> tuple[str, float, float]:
    """The activation of a module, its alpha and its limit, found by comparing it with the known ones.

    Run in fp64 over six decades of magnitudes; in fp32 if the module computes in fp32 for all inputs.
    """
    generator = torch.Generator().manual_seed(0)
    magnitude = 10 ** (torch.rand(64, 64, generator=generator, dtype=torch.float64) * 6 - 3)
    h = torch.where(torch.rand(64, 64, generator=generator) < 0.5, -magnitude, magnitude)
    wanted = module._apply_gate(h) if module.has_gate else module.act_fn(h)  # type: ignore[operator]
    near = 1e-12
    if torch.equal(wanted, wanted.float().double()):
        h, wanted, near = h.float(), wanted.float(), 1e-5
    parts = [vars(m).items() for m in module.modules()]
    numbers = sorted({float(v) for part in parts for k, v in part if type(v) is float and not k.startswith("_")} | {0.0})
    for name, candidate in ACTIVATIONS.items():
        if candidate.gated != bool(module.has_gate):
            continue
        for alpha in numbers:
            for limit in numbers:
                with contextlib.suppress(ValueError):  # it is not defined for these numbers
                    found = candidate.forward(h, alpha, limit, interleaved)
                    if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=near, atol=1e-14):
                        return name, alpha, limit
    kind = "_apply_gate" if module.has_gate else "act_fn"
    raise CaptureError(
        f"{type(module).__name__}.{kind} is none of the activations that moefx.experts knows ({', '.join(ACTIVATIONS)})"
    )


def _expressible(module: nn.Module) -> bool:
    try:
        experts_layout(module)
    except CaptureError:
        return False
    return True


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, own: Callable | None = None
) -> Tensor:
    """The "moefx" entry of Transformers' experts interface; ``own``: the forward that the experts' class was written with.

    Emits ``moefx.experts`` during capture. Otherwise no captured graph covers this call (generation with a cache, for
    instance), and the original implementation runs, or for sharded experts dispatch, grouped MLP and combine.
    """
    callers = recording.callers()
    if callers is not None and callers.lenient and not _expressible(self):
        callers = None
    layout = experts_layout(self) if callers is not None or isinstance(next(self.parameters(), None), DTensor) else None
    if callers is not None and layout is not None:
        callers.append(("experts", self))
        return ops.experts(hidden_states, top_k_index, top_k_weights, *layout.weights(self), **layout.options)
    if layout is not None:
        return experts_over_ranks(hidden_states, top_k_index, top_k_weights, self, layout)
    original = self.__dict__.get("_moefx_original_implementation") or "grouped_mm"
    own = own or inspect.unwrap(type(self).forward)
    return ExpertsInterface().get(original, own)(self, hidden_states, top_k_index, top_k_weights)


def _activation_of_loop(module: nn.Module) -> tuple[str, float, float] | str:
    """The activation, alpha and limit of experts of :mod:`loops`, or the reason why it is unknown."""
    applied = loops.LOOPS[type(module).__name__].activation
    try:
        return _activation(loops.Gated(applied(module)), False) if applied else ("", 0.0, 0.0)
    except CaptureError as error:
        return f"{type(module).__name__}: {error}"


def _emitter(module: nn.Module) -> Callable[..., Tensor] | None:
    """During capture, a function that emits ``moefx.experts`` for a module of :mod:`loops`; else None."""
    callers, known = recording.callers(), module.__dict__.get("_moefx_layout")
    if callers is None or known is None or (isinstance(known, str) and callers.lenient):
        return None
    if isinstance(known, str):
        raise CaptureError(known)
    activation, alpha, limit = known

    def emit(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, transposed: bool) -> Tensor:
        callers.append(("experts", module))
        options = {"activation": activation, "alpha": alpha, "limit": limit, "transposed": transposed}
        return ops.experts(x, index, weights, up, None, down, None, **options)

    return emit
