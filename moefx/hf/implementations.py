"""Making a model call moefx for its experts and attention, and giving it back what it called before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from .. import adapters, loops
from ..errors import CaptureError
from ..subclass import own_class
from .attention import attention_forward
from .experts import _activation_of_loop, _emitter, experts_forward, experts_layout, is_experts
from .masks import attention_mask
from .recording import is_emitting

AttentionInterface.register("moefx", attention_forward)
AttentionMaskInterface.register("moefx", attention_mask)
ExpertsInterface.register("moefx", experts_forward)


@contextmanager
def implementations(model: PreTrainedModel, attention: bool = True) -> Iterator[None]:
    """Within: the model calls moefx for its experts and attention; what it called before comes back afterwards."""
    before = _names(model)
    use(model, attention)
    try:
        yield
    finally:
        restore(model, before)


#: By what a configuration named before moefx came: the "moefx" that it names since, an object of its own. Configurations are
#: shared by models, and copied; ``copy.deepcopy`` keeps strings, so that a copy knows too what stood there.
_marks: dict[str | None, str] = {}


def _mark(before: str | None) -> str:
    if before not in _marks:
        _marks[before] = "".join(("moe", "fx"))  # a literal would be the same object each time
    return _marks[before]


def _before(name: str | None, usual: str) -> str | None:
    """What a configuration said before it said ``name``; ``usual`` if that is lost: it was pickled, say."""
    return next((b for b, mark in _marks.items() if mark is name), usual) if name == "moefx" else name


def previous(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """What the model calls for its attention and experts; where its configuration says "moefx", for this model or another that
    shares or copied it, what it said before."""
    attention, experts = _names(model)
    return _before(attention, "sdpa" if model._supports_sdpa else "eager"), _before(experts, "grouped_mm")


def _names(model: PreTrainedModel) -> tuple[str | None, str | None]:
    return model.config._attn_implementation, model.config._experts_implementation


def use(model: PreTrainedModel, attention: bool = True) -> None:
    """Makes the model call moefx for its experts, and for its attention if ``attention``."""
    attention_before, experts = previous(model)
    for module in model.modules():
        if is_experts(module):
            module.__dict__.setdefault("_moefx_previous", experts)
            with contextlib.suppress(CaptureError):  # said again, with its reason, where the module is called
                experts_layout(module)  # found on numbers: not while tracing
        elif hasattr(module, "is_causal"):
            module.__dict__.setdefault("_moefx_previous", attention_before)
        elif loops.is_loop(module) and not hasattr(type(module), "_moefx_base"):
            module.__dict__["_moefx_layout"] = _activation_of_loop(module)
            module.__class__ = loops.saying(type(module), _emitter)  # type: ignore[arg-type]
        elif adapters.is_wrapper(module) and not hasattr(type(module), "_moefx_base"):
            module.__class__ = adapters.adapting(type(module), is_emitting)  # type: ignore[arg-type]
    if attention:
        model.set_attn_implementation("moefx")
    model.set_experts_implementation("moefx")
    _set_names(model, (_mark(attention_before) if attention else attention_before, _mark(experts)))


def restore(model: PreTrainedModel, before: tuple[str | None, str | None]) -> None:
    for module in model.modules():
        module.__dict__.pop("_moefx_previous", None)
        module.__dict__.pop("_moefx_layout", None)
        if adapters.is_wrapper(module) or loops.is_loop(module):
            module.__class__ = own_class(type(module))  # type: ignore[assignment]
    _set_names(model, before)


def _set_names(model: PreTrainedModel, names: tuple[str | None, str | None]) -> None:
    # not through set_attn_implementation: it checks again that, say, flash attention can be imported
    for module in model.modules():
        config = getattr(module, "config", None) if isinstance(module, PreTrainedModel) else None
        if config is not None:
            config._attn_implementation_internal, config._experts_implementation_internal = names


@contextmanager
def named(model: PreTrainedModel, names: tuple[str | None, str | None]) -> Iterator[None]:
    """Within: the model's implementations of attention and experts go by these names, which models look at."""
    before = _names(model)
    _set_names(model, names)
    try:
        yield
    finally:
        _set_names(model, before)
