"""Transformers' attention interface: what its modules call under moefx."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from ..errors import CaptureError
from . import recording
from .masks import _known_window, packed_of
from .recording import OwnAttention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The "moefx" entry of Transformers' attention interface; query [B, A, S, D] -> [B, S, A, Dv]."""
    callers = recording.callers()
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    indices = kwargs.pop("indices", None)
    if indices is not None:
        attention_mask = _only(indices, attention_mask, query, key, causal)
    unknown = [k for k in ("position_bias", "cache", "block_indices") if kwargs.get(k) is not None]
    if callers is not None and callers.lenient and "block_indices" in unknown:
        raise OwnAttention("it attends to blocks of keys that it chose: only the model's own attention knows how", module)
    if callers is not None and callers.lenient and causal and query.shape[2] != key.shape[2]:
        # DeepSeek-V4 appends compressed keys: with a boolean mask, or none, they would be seen by the wrong queries
        raise OwnAttention(
            f"it attends {query.shape[2]} queries to {key.shape[2]} keys: who may see which only the model's own attention "
            "knows",
            module,
        )
    if callers is not None and not (unknown and callers.lenient):
        if unknown:
            raise CaptureError(f"{type(module).__name__} passes {unknown[0]} to attention: moefx.attention has no such input")
        callers.append(("attention", module))
        known, packed = _known_window.get(), None if attention_mask is None else packed_of(attention_mask)
        if packed is not None and causal and query.shape[2] == key.shape[2]:
            attention_mask, sliding_window = packed  # together they say everything, as boolean masks do
        elif attention_mask is None and known is not None:
            if sliding_window not in (None, known):
                raise CaptureError(f"{type(module).__name__} has a sliding window of {sliding_window}, its mask one of {known}")
            sliding_window = known
        out = ops.attention(
            query, key, value, attention_mask, s_aux,
            scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            is_causal=causal,
            window=sliding_window, softcap=float(softcap or 0.0), dropout=float(dropout),
        )  # fmt: skip
        return out, None
    given = dict(
        dropout=dropout, scaling=scaling, is_causal=is_causal, sliding_window=sliding_window, s_aux=s_aux,
        softcap=softcap, **kwargs,
    )  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if module.__dict__.get("_moefx_previous") != "eager" and s_aux is None and softcap is None or own is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **given)
    return own(module, query, key, value, _additive(attention_mask, query, key, causal), **given)


def _only(indices: Tensor, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """The mask with no keys but those of ``indices`` [B, S, n], which sparse attention chose (DeepSeek-V3.2, arXiv 2512.02556).

    Its models say so in the mask themselves, but only to the implementations "eager" and "sdpa", by name.
    """
    none = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=indices.device)
    chosen = none.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None and causal:
        mask = _causal(query, key)
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """[1, 1, S, T]: the last query sees all keys."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """The mask as eager attention of Transformers wants it: added to the scores; causal where SDPA would take it as said."""
    if mask is None:
        if query.shape[2] == 1 or not causal:
            return None
        mask = _causal(query, key)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
