"""Transformers' attention interface: what its modules call while a block is captured, and the masks of what they call else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moefx import ops
from moefx.errors import CaptureError
from moefx.integrations.transformers import recording
from moefx.integrations.transformers.masks import LazyMask, _lazy, attention_kind, original_masks, pattern_of
from moefx.integrations.transformers.recording import OwnAttention, _Callers
from moefx.internals import transformers_patches


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
    """What a module calls for its attention while it is recorded or captured: ``moefx.attention``, instead of ``own``.

    query [B, A, S, D] -> [B, S, A, Dv]. ``kind``: "eager", "sdpa", "flash" or "flex", which decides what no mask means.
    """
    callers = recording.callers()
    if callers is not None and not module.__dict__.get("_moefx_own_attention"):
        unknown = next((k for k in ("position_bias", "cache", "block_indices") if kwargs.get(k) is not None), None)
        if unknown == "block_indices" and callers.lenient:
            raise OwnAttention("it attends to blocks of keys that it chose: only the model's own attention knows how", module)
        if unknown and not callers.lenient:
            raise CaptureError(f"{type(module).__name__} passes {unknown} to attention: moefx.attention has no such input")
        # eager attention adds its mask, whatever that is, and a query that may see nothing sees everybody: no kernel does so
        says_more = kind == "eager" and attention_mask is not None and pattern_of(attention_mask) is None
        if not unknown and not says_more:
            return _emit(callers, kind, module, query, key, value, attention_mask, *args, **kwargs), None
    return own(module, query, key, value, original_masks(attention_mask), *args, **kwargs)


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
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if callers.lenient and causal and query.shape[2] != key.shape[2]:
        # DeepSeek-V4 appends compressed keys: with a boolean mask, or none, they would be seen by the wrong queries
        raise OwnAttention(
            f"it attends {query.shape[2]} queries to {key.shape[2]} keys: who may see which only the model's own attention "
            "knows",
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
        mask, window, causal = pattern.starts, pattern.window, True  # together they say everything, as masks do
    elif mask is not None:
        mask, causal = mask.read() if type(mask) is LazyMask else mask, False
    elif kind in ("eager", "flex"):
        causal = False  # these see what the mask lets them see, and ask nobody
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
    """The mask with no keys but those of ``indices`` [B, S, n], which sparse attention chose (DeepSeek-V3.2, arXiv 2512.02556).

    Its models say so in the mask themselves, but only to the implementations "eager" and "sdpa", by name.
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
    """What a module is to call that looked ``own`` up."""
    # Dynamo cannot read a ContextVar, and what it traces is never a capture of ours
    if torch.compiler.is_dynamo_compiling():
        return own
    if kind is not None and recording.callers() is not None:
        return functools.partial(attention_forward, own, kind)
    return functools.partial(_with_own_masks, own) if _lazy.get() else own


transformers_patches.intercept_attention(lambda _, own: _now(own, attention_kind(own)), lambda own: _now(own, "eager"))
