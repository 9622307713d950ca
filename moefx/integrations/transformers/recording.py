"""Contexts in which a model is recorded, captured or called: emitting semantic operations, and handling of packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import PreTrainedConfig, masking_utils
from transformers.utils.output_capturing import _active_collector

from moefx.errors import CaptureError
from moefx.internals.assumptions import assumed
from moefx.internals.transformers_patches import EXPORTING, PACKED_SEQUENCES


class _Callers(list[tuple[str, nn.Module]]):
    """(kind, module) of each emitted call. ``lenient``: a call that no operation expresses runs the model's own code."""

    lenient = False


#: Set while a model is recorded or captured: the interfaces then emit semantic operations and append their callers.
_emitting: ContextVar[_Callers | None] = ContextVar("moefx_emitting", default=None)


@contextmanager
def emitting(lenient: bool = False) -> Iterator[list[tuple[str, nn.Module]]]:
    """Context in which calls of experts and attention become ``moefx.experts`` and ``moefx.attention``; yields the callers.

    A call that these cannot express raises CaptureError, or runs the model's own code if ``lenient`` (while recording).
    """
    callers = _Callers()
    callers.lenient = lenient
    token = _emitting.set(callers)
    collecting = _active_collector.set(None)  # type: ignore[func-returns-value]  # traced values do not belong to the user's collected outputs
    try:
        yield callers
    finally:
        _active_collector.reset(collecting)
        _emitting.reset(token)


@assumed("mask functions call masking_utils.find_packed_sequence_indices", "transformers 5.23 to 5.24")
def packing_is_looked_for() -> bool:
    """A causal mask for position ids."""
    asked, config = [], PreTrainedConfig()
    config._attn_implementation = "sdpa"
    with PACKED_SEQUENCES.by(lambda look, position_ids: asked.append(position_ids)):
        masking_utils.create_causal_mask(config, torch.ones(1, 3, 1), None, None, torch.arange(3)[None])
    return len(asked) == 1


def unpacked_on_meta() -> AbstractContextManager[None]:
    """Context in which Transformers does not read position ids on the meta device to find packed sequences."""
    return PACKED_SEQUENCES.by(lambda look, position_ids: None if position_ids.is_meta else look(position_ids))


def without_packages() -> AbstractContextManager[None]:
    """Context in which Transformers uses its own PyTorch code, as in an export, instead of kernels of other packages.

    Kernels for Mamba's scan and causal convolutions read memory, which does not exist on the meta device.
    """
    return EXPORTING.by(lambda exporting: True)


def unpacked() -> AbstractContextManager[None]:
    """Context in which Transformers does not look for packed sequences.

    For calls without position ids, which the model then numbers itself: reading them would make the host wait for the device
    in each step.
    """
    return PACKED_SEQUENCES.by(lambda look, position_ids: None)


def noticing_packing(asked: list) -> AbstractContextManager[None]:
    """Context in which Transformers does not look for packed sequences; the position ids are appended to ``asked``."""
    return PACKED_SEQUENCES.by(lambda look, position_ids: asked.append(position_ids))


def packed() -> AbstractContextManager[None]:
    """Context in which position ids of a call are taken to be those of packed sequences, without reading their values."""

    def number(_: Callable, position_ids: Tensor) -> Tensor:
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)

    packing_is_looked_for()
    return PACKED_SEQUENCES.by(number)


class AttentionWeights:
    """Stands in a graph for the weights that eager attention returns beside its output, and that ``moefx.attention`` does not.

    Nothing can be done with it. A module that returns it has no graph.
    """


class OwnAttention(CaptureError):
    """The model's attention computes more than its arguments to Transformers' interface tell."""

    def __init__(self, reason: str, module: nn.Module):
        super().__init__(reason)
        self.module = module


def callers() -> _Callers | None:
    """The callers so far while a model is recorded or captured, else None.

    Also None under Dynamo, which cannot read a ContextVar and never traces a capture of moefx.
    """
    return None if torch.compiler.is_dynamo_compiling() else _emitting.get()


def is_emitting() -> bool:
    """Is a model being recorded or captured?"""
    return callers() is not None


def is_traced() -> bool:
    """Is this call traced by torch.compile, torch.export, torch.jit.trace or make_fx, other than by a capture of moefx?

    Or transformed: then the model's own forward runs as well.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None or is_transformed()
    return followed and not is_emitting()


def is_transformed() -> bool:
    """Does a transform of torch.func or a level of forward-mode AD run? Kernels have no rules for these."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # type: ignore[attr-defined]


@assumed("transforms of torch.func and forward-mode AD are seen while they run", "torch 2.11 to 2.14")
def transforms_are_seen() -> bool:
    """Each of them, and none afterwards."""
    found: list[bool] = []

    def tried(x: Tensor) -> Tensor:
        found.append(is_transformed())
        return x.sum()

    x = torch.ones(3)
    torch.func.grad(tried)(x)
    torch.func.vmap(tried)(torch.ones(2, 3))
    torch.func.vjp(tried, x)
    torch.func.jvp(tried, (x,), (x,))
    with forward_ad.dual_level():
        tried(x)
    return found == [True] * 5 and not is_transformed()
