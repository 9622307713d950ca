"""Makes a model call moefx for its experts, and restores its original implementations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from moefx.errors import CaptureError
from moefx.integrations import peft as adapters
from moefx.integrations.transformers import loop_experts as loops
from moefx.integrations.transformers.experts import _activation_of_loop, _emitter, experts_forward, experts_layout, is_experts
from moefx.integrations.transformers.masks import lazy_masks
from moefx.integrations.transformers.recording import is_emitting
from moefx.internals import transformers_patches
from moefx.internals.subclass import own_class

ExpertsInterface.register("moefx", experts_forward)
transformers_patches.intercept_experts(experts_forward)

#: The names of a model's implementations of experts, one for each configuration in it.
Names = list[str | None]


@contextmanager
def activated(model: PreTrainedModel, attention: bool = True) -> Iterator[None]:
    """Context in which the model calls moefx for its experts, and for its attention if ``attention``."""
    before = _names(model)
    activate(model, attention)
    try:
        with lazy_masks() if attention else contextlib.nullcontext():
            yield
    finally:
        restore(model, before)


#: Original implementation -> the string "moefx" that replaces it in a configuration, an object of its own. Configurations are
#: shared by models, and copied: ``copy.deepcopy`` keeps string objects, so a copy shows the original as well.
_marks: dict[str | None, str] = {}


def _mark(before: str | None) -> str:
    if before not in _marks:
        _marks[before] = "".join(("moe", "fx"))  # a literal would be the same object each time
    return _marks[before]


def _before(name: str | None, default: str) -> str | None:
    """The implementation that ``name`` replaced in a configuration; ``default`` if that is lost, as it is by pickling."""
    return next((b for b, mark in _marks.items() if mark is name), default) if name == "moefx" else name


def _configurations(model: PreTrainedModel) -> list[Any]:
    """The configurations of the model and of its parts, and those in them, each once."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if config is not None and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            add(module.config)
    return list(found.values())


def original_implementations(model: PreTrainedModel) -> Names:
    """The experts implementations of a model without moefx, also while it or one that shares its configuration is optimized."""
    return [_before(name, "grouped_mm") for name in _names(model)]


def _names(model: PreTrainedModel) -> Names:
    return [c._experts_implementation for c in _configurations(model)]


def activate(model: PreTrainedModel, attention: bool = True) -> None:
    """Makes the model call moefx for its experts, and for its attention if ``attention``."""
    names = original_implementations(model)
    by_config = {id(c): name for c, name in zip(_configurations(model), names, strict=True)}
    for module in model.modules():
        if not attention:
            module.__dict__["_moefx_own_attention"] = True
        if is_experts(module):
            module.__dict__.setdefault(
                "_moefx_original_implementation", by_config.get(id(getattr(module, "config", None)), names[0])
            )
            with contextlib.suppress(CaptureError):  # said again, with its reason, where the module is called
                experts_layout(module)  # found on numbers: not while tracing
        elif loops.is_loop(module) and not hasattr(type(module), "_moefx_base"):
            module.__dict__["_moefx_layout"] = _activation_of_loop(module)
            module.__class__ = loops.emitting_class(type(module), _emitter)  # type: ignore[arg-type]
        elif adapters.is_wrapper(module) and not hasattr(type(module), "_moefx_base"):
            module.__class__ = adapters.adapting(type(module), is_emitting)  # type: ignore[arg-type]
    model.set_experts_implementation("moefx")
    _set_names(model, [_mark(name) for name in names])


def restore(model: PreTrainedModel, before: Names) -> None:
    """Undoes :func:`activate`; ``before``: the names to restore where nobody has chosen another one since."""
    for module in model.modules():
        for name in ("_moefx_original_implementation", "_moefx_layout", "_moefx_own_attention"):
            module.__dict__.pop(name, None)
        if adapters.is_wrapper(module) or loops.is_loop(module):
            module.__class__ = own_class(type(module))  # type: ignore[assignment]
    now = _names(model)
    _set_names(model, [old if name == "moefx" else name for old, name in zip(before, now, strict=True)])


def _set_names(model: PreTrainedModel, names: Names) -> None:
    # not by set_experts_implementation, which checks again whether packages can be imported
    for config, name in zip(_configurations(model), names, strict=True):
        config._experts_implementation_internal = name


@contextmanager
def named(model: PreTrainedModel, names: Names) -> Iterator[None]:
    """Context in which the model's configurations name these experts implementations."""
    before = _names(model)
    _set_names(model, names)
    try:
        yield
    finally:
        _set_names(model, before)
