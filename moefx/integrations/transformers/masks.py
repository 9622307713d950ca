"""Transformers' mask interface: masks that know their pattern, and are only made when they are read."""

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
from moefx.internals.functions import home

#: Set in the forward of an optimized model and while a model is recorded: Transformers then makes :class:`LazyMask` objects.
_lazy: ContextVar[bool] = ContextVar("moefx_saying_masks", default=False)
#: Set beside it while code of the user sees the masks.
_seen: ContextVar[bool] = ContextVar("moefx_masks_are_seen", default=False)


#: Implementations of attention that compute what ``moefx.attention`` does. They differ in what a call without a mask means.
_KINDS = {sdpa_attention_forward: "sdpa", flash_attention_forward: "flash", flex_attention_forward: "flex"}


def attention_kind(function: Any) -> str | None:
    """The kind of an attention function, "sdpa", "flash" or "flex"; None if it is not one of Transformers'."""
    return _KINDS.get(function.func if isinstance(function, functools.partial) else function)


@contextmanager
def lazy_masks(seen: bool = False) -> Iterator[None]:
    """Context in which Transformers' mask functions return a :class:`LazyMask` where attention in a graph needs no tensor.

    With ``seen``, code of the user is given the masks: None stays None where Transformers' SDPA attention is causal by itself.
    """
    lazy, was_seen = _lazy.set(True), _seen.set(seen)
    try:
        yield
    finally:
        _seen.reset(was_seen)
        _lazy.reset(lazy)


@dataclass(frozen=True)
class MaskPattern:
    """A causal mask: positions see no later ones, none that are ``window`` or more back, and none before ``starts``.

    ``starts`` [B, S] int32 is where the packed sequence of each position begins. ``dtype`` is bool, or the dtype of a mask that
    is added to the scores.
    """

    dtype: torch.dtype
    window: int | None = None
    starts: Tensor | None = None

    def mask(self, rows: int, length: int, device: torch.device) -> Tensor:
        """The mask [rows, 1, length, length]. In a graph it is dead code if only attention reads it."""
        mask = ops.visible(length, length, self.window, self.starts, device).expand(rows, 1, length, length)
        if self.dtype != torch.bool:
            mask = torch.where(mask, torch.zeros((), dtype=self.dtype, device=device), torch.finfo(self.dtype).min)
        mask._moefx_pattern = self  # type: ignore[attr-defined]
        return mask


def pattern_of(mask: Any) -> MaskPattern | None:
    """The pattern that describes all of ``mask``; None if there is none."""
    if not isinstance(mask, Tensor):
        return None
    return mask.pattern if type(mask) is LazyMask else getattr(mask, "_moefx_pattern", None)


_LOOKS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__, Tensor.is_meta.__get__, Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point,
}  # fmt: skip


class LazyMask(Tensor):
    """A mask [B, 1, S, S] that is made when it is first read: graphs use its pattern, or take it in a form of their own.

    ``pattern`` describes all of it, or is None. ``make`` makes the mask that graphs read. ``own`` makes what the model's own
    attention implementation expects, which may be of another kind (flash attention takes [B, S], or None).
    """

    pattern: MaskPattern | None
    make: Callable[[], Tensor]
    own: Callable[[], Any]
    made: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        pattern: MaskPattern | None,
        make: Callable,
        own: Callable,
    ):
        """A mask that ``make()`` returns when it is first read."""
        out = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        out.pattern, out.make, out.own, out.made = pattern, make, own, None
        return out

    def read(self) -> Tensor:
        """The mask as a plain tensor."""
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
        # only C++ that skips __torch_function__ gets here
        args, kwargs = _read((tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _read(x: Any) -> Any:
    if type(x) is LazyMask:
        return x.read()
    if type(x) in (tuple, list):
        return type(x)(map(_read, x))
    return {k: _read(v) for k, v in x.items()} if type(x) is dict else x


def original_masks(x: Any) -> Any:
    """Arguments of a call with each :class:`LazyMask` replaced by the mask that Transformers would have made without moefx."""
    if type(x) is LazyMask:
        return x.own()
    if type(x) in (tuple, list):
        return type(x)(map(original_masks, x))
    return {k: original_masks(v) for k, v in x.items()} if type(x) is dict else x


def attention_mask(own: Callable, **kwargs: Any) -> Any:
    """``own(**kwargs)``, a mask function of Transformers, as a :class:`LazyMask` where that helps graphs."""
    if own is sdpa_mask:
        pattern = _pattern(torch.bool, kwargs)
        if pattern is None or (pattern.window is None and pattern.starts is None):
            return own(**kwargs)  # None, where attention is causal by itself
        if _seen.get() and own(**kwargs) is None:
            return None
        # a sequence shorter than its window needs no mask, but would then be another kind of call than a longer one
        return _mask(pattern, lambda: own(**kwargs | {"allow_is_causal_skip": False}), lambda: own(**kwargs), kwargs)
    if own is eager_mask:
        pattern = _pattern(kwargs.get("dtype", torch.float32), kwargs)
        return own(**kwargs) if pattern is None else _mask(pattern, lambda: own(**kwargs), lambda: own(**kwargs), kwargs)
    if own is flash_attention_mask:
        return _flash(kwargs)
    if own is flex_attention_mask:
        pattern = _pattern(torch.bool, kwargs)
        mask = sdpa_mask(**kwargs | {"allow_is_causal_skip": False}) if pattern is None else None
        if pattern is None and mask is None:  # every position sees every position
            return own(**kwargs)
        make = functools.partial(sdpa_mask, **kwargs | {"allow_is_causal_skip": False}) if mask is None else lambda: mask
        return _mask(pattern, make, lambda: own(**kwargs), kwargs)
    return own(**kwargs)


def _mask(pattern: MaskPattern | None, make: Callable, own: Callable, kwargs: dict) -> LazyMask:
    shape = kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"]
    return LazyMask(shape, torch.bool if pattern is None else pattern.dtype, torch.device(kwargs["device"]), pattern, make, own)


def _flash(kwargs: dict) -> Any:
    """The mask of flash attention: only padding, and outputs at padded positions are zero.

    The window, and the starts of packed sequences in a batch of 1, are arguments of their own.
    """
    padding = flash_attention_mask(**kwargs)
    pattern = _pattern(torch.bool, kwargs)
    if padding is None and (pattern is None or pattern.starts is None or kwargs["batch_size"] != 1):
        return None
    own = lambda: padding  # noqa: E731
    if padding is None:
        return _mask(pattern, lambda: sdpa_mask(**kwargs | {"allow_is_causal_skip": False}), own, kwargs)

    def make() -> Tensor:
        mask = sdpa_mask(**kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None
        return mask & padding[:, None, -kwargs["q_length"] :, None]

    return _mask(None, make, own, kwargs)


def _pattern(dtype: torch.dtype, kwargs: dict) -> MaskPattern | None:
    """The pattern of the mask that a mask function makes of these arguments; None if no pattern describes all of it."""
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
    return MaskPattern(dtype, local_size, None if packed is None else _starts(packed["packed_sequence_mask"]))


_CAUSAL = "causal_mask_function"
_SLIDING = "sliding_window_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"


def _parts(mask_function: Callable) -> dict[str, dict[str, Any]]:
    """The functions that a mask function of Transformers joins by "and": their names, and what each closes over."""
    if not inspect.isfunction(mask_function) or home(mask_function) != masking_utils.__name__:
        return {repr(mask_function): {}}  # a partial or an object: a user's own
    name, known = mask_function.__qualname__, dict(inspect.getclosurevars(mask_function).nonlocals)
    if name == "and_masks.<locals>.and_mask":
        return {n: what for part in known["mask_functions"] for n, what in _parts(part).items()}
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _parts(known["mask_function"])  # differences of positions within a sequence are those within the row
    return {name: known}


def _starts(sequence: Tensor) -> Tensor:
    """Index of each position's packed sequence [B, S], ascending -> where that sequence begins [B, S] int32."""
    position = torch.arange(sequence.shape[1], device=sequence.device)
    begins = torch.diff(sequence, prepend=sequence[:, :1] - 1) != 0
    return torch.where(begins, position, 0).cummax(1).values.to(torch.int32)


def _looked_up(name: str, own: Callable) -> Callable:
    # Dynamo cannot read a ContextVar
    if torch.compiler.is_dynamo_compiling() or not _lazy.get():
        return own
    callers = recording.callers()
    if recording.is_traced() or (callers is not None and not callers.lenient):
        return own  # it is made in a graph: another tool's, or a block's
    attention = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name, ALL_ATTENTION_FUNCTIONS._global_mapping.get(name))
    if name != "eager" and attention_kind(attention) is None:
        return own  # a user's attention gets the masks that it got before: no operation describes it
    return functools.partial(attention_mask, own)


transformers_patches.intercept_masks(_looked_up)
