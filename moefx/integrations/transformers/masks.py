"""Transformers' mask interface: masks that say what they hide, so that attention can do without them, and that exist only when
somebody reads them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moefx import ops
from moefx.integrations.transformers import recording
from moefx.internals import transformers_patches

#: Set within the forward of an optimized model, and while a model is recorded: masks then say what they hide.
_saying: ContextVar[bool] = ContextVar("moefx_saying_masks", default=False)


#: Implementations of attention that compute what ``moefx.attention`` does. Each has its own idea of a call without a mask.
_KINDS = {sdpa_attention_forward: "sdpa", flash_attention_forward: "flash", flex_attention_forward: "flex"}


def kind_of(function: Any) -> str | None:
    """Of an attention function: "sdpa", "flash" or "flex"; None for one that is not Transformers'."""
    return _KINDS.get(function.func if isinstance(function, functools.partial) else function)


@contextmanager
def saying_masks() -> Iterator[None]:
    """Within: Transformers makes masks that attention in a graph can do without, where they say nothing but who comes before
    whom (:class:`SaidMask`).
    """
    token = _saying.set(True)
    try:
        yield
    finally:
        _saying.reset(token)


@dataclass(frozen=True)
class Said:
    """All that a mask hides: what comes later, what is ``window`` positions back or more, what lies before where each
    position's sequence begins (``starts`` [B, S], int32). ``dtype``: bool, or that of a mask that is added to the scores.
    """

    dtype: torch.dtype
    window: int | None = None
    starts: Tensor | None = None

    def mask(self, rows: int, length: int, device: torch.device) -> Tensor:
        """The mask [rows, 1, length, length]. In a graph it is dead code where nobody but attention reads it."""
        mask = ops.visible(length, length, self.window, self.starts, device).expand(rows, 1, length, length)
        if self.dtype != torch.bool:
            mask = torch.where(mask, torch.zeros((), dtype=self.dtype, device=device), torch.finfo(self.dtype).min)
        mask._moefx_said = self  # type: ignore[attr-defined]
        return mask


def said_of(mask: Any) -> Said | None:
    """What the mask says, if it says nothing else."""
    if not isinstance(mask, Tensor):
        return None
    return mask.said if type(mask) is SaidMask else getattr(mask, "_moefx_said", None)


_LOOKS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__, Tensor.is_meta.__get__, Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point,
}  # fmt: skip


class SaidMask(Tensor):
    """A mask [B, 1, S, S] that graphs can do without, or that they take in another form than the model's own attention.

    ``said`` is all that it says, None if it says more. ``make`` makes it as graphs read it, the first time that somebody looks;
    ``own`` gives what the model's attention implementation is to get instead, and may differ in kind (flash attention takes
    [B, S], or None).
    """

    said: Said | None
    make: Callable[[], Tensor]
    own: Callable[[], Any]
    made: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, said: Said | None, make: Callable, own: Callable
    ):
        out = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        out.said, out.make, out.own, out.made = said, make, own, None
        return out

    def read(self) -> Tensor:
        if self.made is None:
            self.made = self.make()
        return self.made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = _read((tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # reached only from C++ that skipped __torch_function__
        args, kwargs = _read((tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _read(x: Any) -> Any:
    if type(x) is SaidMask:
        return x.read()
    if type(x) in (tuple, list):
        return type(x)(map(_read, x))
    return {k: _read(v) for k, v in x.items()} if type(x) is dict else x


def own_masks(x: Any) -> Any:
    """Arguments of a call as the model's own attention is to get them: masks as they would have been without moefx."""
    if type(x) is SaidMask:
        return x.own()
    if type(x) in (tuple, list):
        return type(x)(map(own_masks, x))
    return {k: own_masks(v) for k, v in x.items()} if type(x) is dict else x


def attention_mask(own: Callable, **kwargs: Any) -> Any:
    """What the mask function ``own`` of Transformers makes of ``kwargs``, as a :class:`SaidMask` where that helps graphs."""
    if own is sdpa_mask:
        said = _said(torch.bool, kwargs)
        if said is None or (said.window is None and said.starts is None):
            return own(**kwargs)  # None, where attention is causal by itself
        # a sequence shorter than its window needs no mask, but would be another kind of call than a longer one
        return _mask(said, lambda: own(**kwargs | {"allow_is_causal_skip": False}), lambda: own(**kwargs), kwargs)
    if own is eager_mask:
        said = _said(kwargs.get("dtype", torch.float32), kwargs)
        return own(**kwargs) if said is None else _mask(said, lambda: own(**kwargs), lambda: own(**kwargs), kwargs)
    if own is flash_attention_mask:
        return _flash(kwargs)
    if own is flex_attention_mask:
        said = _said(torch.bool, kwargs)
        mask = sdpa_mask(**kwargs | {"allow_is_causal_skip": False}) if said is None else None
        if said is None and mask is None:  # everybody sees everybody
            return own(**kwargs)
        make = functools.partial(sdpa_mask, **kwargs | {"allow_is_causal_skip": False}) if mask is None else lambda: mask
        return _mask(said, make, lambda: own(**kwargs), kwargs)
    return own(**kwargs)


def _mask(said: Said | None, make: Callable, own: Callable, kwargs: dict) -> SaidMask:
    shape = kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"]
    return SaidMask(shape, torch.bool if said is None else said.dtype, torch.device(kwargs["device"]), said, make, own)


def _flash(kwargs: dict) -> Any:
    """Flash attention is told the window, and where sequences begin if there is one row of them, beside the mask: that is of
    padding alone, in which queries give zeros.
    """
    padding = flash_attention_mask(**kwargs)
    said = _said(torch.bool, kwargs)
    if padding is None and (said is None or said.starts is None or kwargs["batch_size"] != 1):
        return None
    own = lambda: padding  # noqa: E731
    if padding is None:
        return _mask(said, lambda: sdpa_mask(**kwargs | {"allow_is_causal_skip": False}), own, kwargs)

    def make() -> Tensor:
        mask = sdpa_mask(**kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None
        return mask & padding[:, None, -kwargs["q_length"] :, None]

    return _mask(None, make, own, kwargs)


def _said(dtype: torch.dtype, kwargs: dict) -> Said | None:
    """All that a mask of these arguments says; None if it says more than :class:`Said` can."""
    parts = _parts(kwargs.get("mask_function", masking_utils.causal_mask_function))
    local_size, padding = kwargs.get("local_size"), kwargs.get("attention_mask")
    sliding, packed = parts.pop(_SLIDING, None), parts.pop(_PACKED, None)
    if (
        parts.keys() != {_CAUSAL}
        or (sliding is None) != (local_size is None)
        or kwargs["q_length"] != kwargs["kv_length"]
        or not (isinstance(q := kwargs.get("q_offset", 0), int) and isinstance(k := kwargs.get("kv_offset", 0), int) and q == k)
        or not (packed or kwargs.get("allow_is_causal_skip", True))
        or (padding is not None and not bool(padding.all()))
    ):
        return None
    return Said(dtype, local_size, None if packed is None else _starts(packed["packed_sequence_mask"]))


_CAUSAL = "causal_mask_function"
_SLIDING = "sliding_window_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"


def _parts(mask_function: Callable) -> dict[str, dict[str, Any]]:
    """What Transformers' mask says: the names of the functions that it joins by "and", and what each knows."""
    if not inspect.isfunction(mask_function) or mask_function.__module__ != masking_utils.__name__:
        return {repr(mask_function): {}}  # a partial, an object: something of the user's
    name, known = mask_function.__qualname__, dict(inspect.getclosurevars(mask_function).nonlocals)
    if name == "and_masks.<locals>.and_mask":
        return {n: what for part in known["mask_functions"] for n, what in _parts(part).items()}
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _parts(known["mask_function"])  # positions that begin anew differ within a sequence as those of the row do
    return {name: known}


def _starts(sequence: Tensor) -> Tensor:
    """The number [B, S] of each position's sequence, ascending -> where that sequence begins [B, S] (int32)."""
    position = torch.arange(sequence.shape[1], device=sequence.device)
    begins = torch.diff(sequence, prepend=sequence[:, :1] - 1) != 0
    return torch.where(begins, position, 0).cummax(1).values.to(torch.int32)


def _looked_up(name: str, own: Callable) -> Callable:
    # Dynamo cannot read a ContextVar
    if torch.compiler.is_dynamo_compiling() or not _saying.get():
        return own
    callers = recording.callers()
    if recording.is_traced() or (callers is not None and not callers.lenient):
        return own  # it is made within a graph, somebody else's or a block's
    attention = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name, ALL_ATTENTION_FUNCTIONS._global_mapping.get(name))
    if name != "eager" and kind_of(attention) is None:
        return own  # attention of somebody else's gets what it always got: no operation says what it does
    return functools.partial(attention_mask, own)


transformers_patches.intercept_masks(_looked_up)
