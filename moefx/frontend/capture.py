"""Capture: records the calls of a model on a small example and exports each distinct block into a graph of a Program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from moefx.errors import CaptureError, MoefxError
from moefx.frontend.call_signature import Call, sizes_of
from moefx.frontend.call_template import flatten
from moefx.frontend.captured import Captured
from moefx.frontend.export import capture_module
from moefx.frontend.head import capture_head_call, head_call, lm_head_of
from moefx.frontend.record import Recording, above, record
from moefx.integrations import transformers as hf
from moefx.internals import ambient_modes
from moefx.ir.program import Function, NotCaptured, Program


@dataclass
class Site:
    """A module of the model that may get a captured function, and the call that was recorded of it."""

    path: str
    module: nn.Module
    call: Call
    routers: dict[str, nn.Module] = field(default_factory=dict)


def sites(model: Any, recording: Recording, not_captured: list[NotCaptured]) -> list[Site]:
    """Modules that may get functions, in model order: blocks, and those with parameters outside of blocks (the final norm)."""
    blocks, routers = hf.blocks(model), hf.routers(model)
    found: list[Site] = []
    heads = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    around = {"", *(up for b in blocks for up in above(b))}
    for path, module in model.named_modules():
        outside = path not in around and path not in blocks and not any(up in blocks for up in above(path))
        own = any(True for _ in module.parameters(recurse=False)) and not type(module).__module__.startswith("torch.nn")
        alone = outside and path in recording.calls and id(module) not in heads and own
        if path in blocks and path not in recording.calls:
            not_captured.append(NotCaptured(path, type(module).__name__, "the example forward did not call it"))
        elif "forward" in vars(module) and (path in blocks or alone):
            not_captured.append(
                NotCaptured(path, type(module).__name__, "it has a forward of its own, which runs instead of a graph")
            )
        elif path in blocks or alone:
            site = site_of(path, module, recording, routers, not_captured)
            if site:
                found.append(site)
    return found


def site_of(path: str, module: nn.Module, recording: Recording, routers: dict, not_captured: list[NotCaptured]) -> Site | None:
    """The site of a module, or None with the reason in ``not_captured``."""
    args, kwargs = recording.call(path) or ((), {})
    inner = {p: m for p, m in module.named_modules() if p and (at := f"{path}.{p}") in routers and recording.call(at)}
    try:
        tensors, template = flatten(args, kwargs)
        call = Call.of(tensors, template, module.training, sizes_of(module))
        return Site(path, module, replace(call, device=recording.device), inner)
    except CaptureError as error:
        not_captured.append(NotCaptured(path, type(module).__name__, str(error)))
        return None


def capture_sites(model: Any, recording: Recording, program: Program) -> None:
    """Captures one function per distinct site. Of a block that cannot be captured, its largest children that can."""
    done = Captured()
    routers = hf.routers(model)

    def take(site: Site) -> None:
        result = done.find(site.module, site.call)
        if result is None:
            result = done.add(site.module, site.call, _try(site))
        if isinstance(result, Function):
            if not result.instances:
                program.add(result)
            result.instances.append(site.path)
            return
        kind = type(site.module).__name__
        program.not_captured.append(NotCaptured(site.path, kind, str(result), hf.is_recurrent(site.module), result.detail))
        for name, child in site.module.named_children():
            path = f"{site.path}.{name}"
            worth = any(True for _ in child.parameters()) and not type(child).__module__.startswith("torch.nn")
            if worth and recording.call(path) and not hf.is_recurrent(child):
                inner = site_of(path, child, recording, routers, program.not_captured)
                if inner:
                    take(inner)

    for site in sites(model, recording, program.not_captured):
        take(site)


def _try(site: Site) -> Function | CaptureError:
    if hf.is_recurrent(site.module):
        mixers = [type(m).__name__ for m in site.module.modules() if m is not site.module and hf.is_recurrent(m)]
        what = mixers[0] if mixers else type(site.module).__name__
        return CaptureError(f"the recurrent mixer {what} would be unrolled over the sequence, its length baked in")
    try:
        return capture_module(site.module, site.call, site.routers, type(site.module).__name__)
    except CaptureError as error:
        return error


def capture_head(model: Any, recording: Recording, program: Program) -> None:
    """Adds the function "head" to ``program``, or the reason why there is none."""
    lm_head = lm_head_of(model)
    path = next((p for p, m in model.named_modules() if m is lm_head), "lm_head")
    if recording.head is None or lm_head is None:
        program.not_captured.append(NotCaptured(path, "head", recording.head_reason, by_design=not hf.is_language_model(model)))
        return
    try:
        hidden, args, kwargs, steps = recording.head
        tensors, template = head_call(hidden, args, kwargs, steps)
        call = replace(Call.of(tensors, template, model.training), device=recording.device)
        function = capture_head_call(model.loss_function, lm_head, path, call)
    except CaptureError as error:
        program.not_captured.append(NotCaptured(path, "head", str(error), detail=error.detail))
        return
    function.instances.append(path)
    function.state = function.reads.state(lm_head)
    program.add(function)


@ambient_modes.disabled()
def capture(model: Any, example: Mapping[str, Any] | None = None) -> Program:
    """Captures the training graph of a model, one function per distinct block and one for the head; the model is not changed.

    Args:
        model: a ``PreTrainedModel`` with experts, also on the meta device.
        example: keyword arguments of the model's forward (default: ``input_ids`` and ``labels``). Which inputs there are
            matters, their sizes do not.

    Returns:
        The program, with the reason for each module that was not captured.

    Raises:
        MoefxError: the model is dense, quantized, on two devices or already optimized, or rejects the example.
    """
    hf.check(model)
    if getattr(model, "_moefx", None) is not None:
        raise MoefxError(
            f"{type(model).__name__} is already optimized: read moefx.report(model).program, or moefx.restore(model) first"
        )
    hf.outputs_are_collected()
    hf.transforms_are_seen()
    program = Program(type(model).__name__, {}, [])
    try:
        _fill(program, model, example)
    except hf.OwnAttention as error:
        path = next(p for p, m in model.named_modules() if m is error.module)
        program.not_captured.append(NotCaptured(path, type(error.module).__name__, str(error)))
        program.own_attention = True
        _fill(program, model, example)
    return program


def _fill(program: Program, model: Any, example: Mapping[str, Any] | None) -> None:
    with hf.activated(model, not program.own_attention):
        recording = record(model, example)
        program.packs_beside_cache = recording.packs_beside_cache
        capture_sites(model, recording, program)
        capture_head(model, recording, program)
