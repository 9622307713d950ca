"""Transformers' attention interface: emits ``moefx.attention`` during capture, and gives other calls their original masks."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moefx import ops
from moefx.errors import CaptureError
from moefx.integrations.transformers import recording
from moefx.integrations.transformers.masks import LazyMask, _lazy, attention_kind, original_masks, pattern_of
from moefx.integrations.transformers.recording import AttentionWeights, OwnAttention, _Callers
from moefx.internals import transformers_patches
from moefx.internals.functions import home, is_of, names_in


def attention_forward(
    own: Callable,
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention of a module: emits ``moefx.attention`` while it is recorded or captured, else calls ``own``.

    Args:
        own: the implementation that the module looked up.
        kind: of it, "eager", "sdpa", "flash" or "flex", which decides what a call without a mask means.
        module: that calls.
        query: [B, A, S, D].
        key: [B, K, S, D].
        value: [B, K, S, Dv].
        attention_mask: a mask of ``kind``.
        args: further arguments of the interface.
        kwargs: further arguments of the interface.

    Returns:
        The output [B, S, A, Dv], and attention weights: those of ``own``; in a capture None, or what stands for them.
    """
    callers = recording.callers()
    if callers is not None and not getattr(module, "_moefx_own_attention", False) and not is_patched(own, type(module)):
        unknown = next((k for k in ("position_bias", "cache", "block_indices") if kwargs.get(k) is not None), None)
        if unknown == "block_indices" and callers.lenient:
            raise OwnAttention("it attends to selected blocks of keys, which moefx.attention cannot express", module)
        if unknown and not callers.lenient:
            raise CaptureError(f"{type(module).__name__} passes {unknown} to attention: moefx.attention has no such input")
        # eager attention adds any mask, and a query whose keys are all masked attends to all of them: no kernel does so
        says_more = kind == "eager" and attention_mask is not None and pattern_of(attention_mask) is None
        if not unknown and not says_more:
            out = _emit(callers, kind, module, query, key, value, attention_mask, *args, **kwargs)
            return out, AttentionWeights() if kind == "eager" and not callers.lenient else None
    return own(module, query, key, value, original_masks(attention_mask), *args, **kwargs)


def is_patched(f: Any, asking: type) -> bool:
    """Has someone replaced the attention function ``f``, or a function that it names, by one of another package?

    ``asking``: the class that looked ``f`` up. ``moefx.attention`` stands for Transformers' functions as they are; another one
    is captured as what it computes.
    """
    known = ("transformers", "torch", "moefx", asking.__module__.partition(".")[0])
    seen: set[int] = set()

    def replaced(f: Any) -> bool:
        if not isinstance(f, types.FunctionType) or id(f) in seen:
            return False
        seen.add(id(f))
        if not is_of(home(f), known) or replaced(getattr(f, "__wrapped__", None)):
            return True
        if not home(f).startswith(("transformers.", asking.__module__)):
            return False
        return any(replaced(f.__globals__[name]) for name in names_in(f.__code__) if name in f.__globals__)

    return replaced(f)


def _emit(
    callers: _Callers,
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    indices: Tensor | None = None,
    **_: Any,
) -> Tensor:
    if key.shape[1] != value.shape[1]:
        said = f"it has {key.shape[1]} heads of keys and {value.shape[1]} of values, which moefx.attention cannot express"
        raise OwnAttention(said, module) if callers.lenient else CaptureError(f"{type(module).__name__}: {said}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if callers.lenient and causal and query.shape[2] != key.shape[2]:
        # DeepSeek-V4 appends compressed keys: a boolean mask, or none, would show them to the wrong queries
        raise OwnAttention(
            f"it attends {query.shape[2]} queries to {key.shape[2]} keys, which moefx.attention cannot express",
            module,
        )
    pattern = pattern_of(mask) if query.shape[2] == key.shape[2] else None
    window = None
    if pattern is not None:
        if kind == "sdpa" and not causal and pattern.starts is None and not callers.lenient:
            raise CaptureError(
                f"{type(module).__name__} is not causal, its mask is a causal one with a window of {pattern.window}: shorter "
                "sequences would get no mask"
            )
        mask, window, causal = pattern.starts, pattern.window, True  # the pattern, and causality with it, is all of the mask
    elif mask is not None:
        mask, causal = mask.read() if type(mask) is LazyMask else mask, False
    elif kind in ("eager", "flex"):
        causal = False  # only the mask decides
    elif kind == "flash":
        window = sliding_window
    if indices is not None:
        mask, causal, window = _only(indices, mask, query, key, causal, window), False, None
    callers.append(("attention", module))
    return ops.attention(
        query,
        key,
        value,
        mask,
        s_aux,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        is_causal=causal,
        window=window,
        softcap=float(softcap or 0.0),
        dropout=float(dropout),
    )


def _only(indices: Tensor, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, window: int | None) -> Tensor:
    """The mask restricted to the keys ``indices`` [B, S, n] of sparse attention (DeepSeek-V3.2, arXiv 2512.02556).

    Its models do this in the mask themselves, but only for implementations named "eager" and "sdpa".
    """
    none = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=indices.device)
    chosen = none.scatter(-1, indices.long(), True).unsqueeze(1)
    if causal:
        seen = ops.visible(query.shape[2], key.shape[2], window, mask, query.device)
        mask = seen if seen.dim() == 4 else seen[None, None]
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _with_own_masks(own: Callable, *args: Any, **kwargs: Any) -> Any:
    return own(*original_masks(args), **original_masks(kwargs))


def _now(own: Callable, kind: str | None) -> Callable:
    """The function that a look-up of ``own`` returns."""
    # Dynamo cannot read a ContextVar, and never traces a capture of moefx
    if torch.compiler.is_dynamo_compiling():
        return own
    if kind is not None and recording.callers() is not None:
        return functools.partial(attention_forward, own, kind)
    return functools.partial(_with_own_masks, own) if _lazy.get() else own


transformers_patches.intercept_attention(lambda _, own: _now(own, attention_kind(own)), lambda own: _now(own, "eager"))
