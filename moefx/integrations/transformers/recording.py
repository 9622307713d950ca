"""What holds while a model is recorded, captured or called: who calls what, and what Transformers does not look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import PreTrainedConfig, masking_utils
from transformers.utils.output_capturing import _active_collector

from moefx.errors import CaptureError
from moefx.internals.assumptions import assumed
from moefx.internals.transformers_patches import EXPORTING, PACKED_SEQUENCES


class _Callers(list[tuple[str, nn.Module]]):
    """Who called what; ``lenient``: a call that no operation can express runs as it is."""

    lenient = False


#: Set while a model is recorded or captured: the interfaces below then emit semantic operations and note who called.
_emitting: ContextVar[_Callers | None] = ContextVar("moefx_emitting", default=None)


@contextmanager
def emitting(lenient: bool = False) -> Iterator[list[tuple[str, nn.Module]]]:
    """Within: experts and attention calls become ``moefx.experts`` and ``moefx.attention``; yields who called what.

    A call that these cannot express raises CaptureError, or runs as the model wrote it if ``lenient`` (while recording).
    """
    callers = _Callers()
    callers.lenient = lenient
    token = _emitting.set(callers)
    collecting = _active_collector.set(None)  # type: ignore[func-returns-value]  # nothing traced belongs to the user's outputs
    try:
        yield callers
    finally:
        _active_collector.reset(collecting)
        _emitting.reset(token)


@assumed("masks are made after asking masking_utils.find_packed_sequence_indices", "transformers 5.23 to 5.24")
def packing_is_looked_for() -> bool:
    asked, config = [], PreTrainedConfig()
    config._attn_implementation = "sdpa"
    with PACKED_SEQUENCES.by(lambda look, position_ids: asked.append(position_ids)):
        masking_utils.create_causal_mask(config, torch.ones(1, 3, 1), None, None, torch.arange(3)[None])
    return len(asked) == 1


def unpacked_on_meta() -> AbstractContextManager[None]:
    """Within: Transformers does not look at the values of position ids on the meta device for packed sequences."""
    return PACKED_SEQUENCES.by(lambda look, position_ids: None if position_ids.is_meta else look(position_ids))


def without_packages() -> AbstractContextManager[None]:
    """Within: what Transformers takes from other packages where they are installed (Mamba's scan, causal convolutions) is its
    own PyTorch code, as in an export: their kernels read memory, which there is none of on the meta device.
    """
    return EXPORTING.by(lambda exporting: True)


def unpacked() -> AbstractContextManager[None]:
    """Within: no packed sequences are looked for. For a call without position ids, whose positions the model numbers
    itself: reading them back would make the host wait, once a step, until the device has done all that is queued.
    """
    return PACKED_SEQUENCES.by(lambda look, position_ids: None)


def noticing_packing(asked: list) -> AbstractContextManager[None]:
    """Within: packed sequences are not looked for; the position ids that would have been looked at go to ``asked``."""
    return PACKED_SEQUENCES.by(lambda look, position_ids: asked.append(position_ids))


def packed() -> AbstractContextManager[None]:
    """Within: position ids that a call has are taken to be those of packed sequences, without reading them back to see."""

    def number(_: Callable, position_ids: Tensor) -> Tensor:
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)

    packing_is_looked_for()
    return PACKED_SEQUENCES.by(number)


class OwnAttention(CaptureError):
    """Attention of the model's own kind: what it gives Transformers' interface is not all that it says."""

    def __init__(self, reason: str, module: nn.Module):
        super().__init__(reason)
        self.module = module


def callers() -> _Callers | None:
    """Who has called what so far, while a model is recorded or captured; else None. Dynamo cannot read a ContextVar, and what
    it traces is never a capture of ours.
    """
    return None if torch.compiler.is_dynamo_compiling() else _emitting.get()


def is_emitting() -> bool:
    return callers() is not None


def is_traced() -> bool:
    """Does torch.compile, torch.export, torch.jit.trace or make_fx of somebody else's follow this call?"""
    if torch.compiler.is_dynamo_compiling():
        return True
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None
    return followed and not is_emitting()
