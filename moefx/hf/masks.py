"""Transformers' mask interface: masks that note what they say, so that attention can say it instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

from .. import ops
from .recording import is_traced

#: Set while a block is captured whose mask says nothing but this causal sliding window: attention says it instead.
_known_window: ContextVar[int | None] = ContextVar("moefx_known_window", default=None)


@contextmanager
def windowed(window: int | None) -> Iterator[None]:
    """Within: attention without a mask is limited to ``window`` positions, itself included (None: to nothing)."""
    token = _known_window.set(window)
    try:
        yield
    finally:
        _known_window.reset(token)


def window_of(mask: Tensor) -> int | None:
    """The window of a mask that says nothing but a causal sliding window."""
    return getattr(mask, "_moefx_window", None)


def packed_of(mask: Tensor) -> tuple[Tensor, int | None] | None:
    """Of a mask that says nothing but causal attention within packed sequences: where each position's sequence begins [B, S]
    (int32), and the sliding window."""
    return getattr(mask, "_moefx_packed", None)


def packed_mask(starts: Tensor, window: int | None) -> Tensor:
    """The mask that says so, boolean [B, 1, S, S]. In a graph it is dead code where nobody but attention reads it."""
    length = starts.shape[1]
    mask = ops.visible(length, length, window, starts, starts.device)
    mask._moefx_packed = starts, window  # type: ignore[attr-defined]
    return mask


def attention_mask(
    *,
    mask_function: Callable = masking_utils.causal_mask_function,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The "moefx" entry of Transformers' mask interface: SDPA's boolean mask, which notes if it is only a sliding window, or
    only that of packed sequences."""
    if is_traced():  # such a mask is an input of the graph: nobody asks what it says
        return sdpa_mask(
            mask_function=mask_function, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs
        )
    said = _said(mask_function)
    sliding, packed = said.pop(_SLIDING, None), said.pop(_PACKED, None)
    plain = (
        said.keys() == {_CAUSAL} and (sliding is None) == (local_size is None) and kwargs["q_length"] == kwargs["kv_length"]
        and (sliding or packed) and (packed or allow_is_causal_skip)
        and (kwargs.get("attention_mask") is None or bool(kwargs["attention_mask"].all()))
    )  # fmt: skip
    # a sequence shorter than its window needs no mask, but would be another kind of call than a longer one
    skip = allow_is_causal_skip and not plain
    mask = sdpa_mask(mask_function=mask_function, local_size=local_size, allow_is_causal_skip=skip, **kwargs)
    if plain and mask is not None:
        if packed:
            mask._moefx_packed = _starts(packed["packed_sequence_mask"]), local_size  # type: ignore[attr-defined]
        else:
            mask._moefx_window = local_size  # type: ignore[attr-defined]
    return mask


_CAUSAL = "causal_mask_function"
_SLIDING = "sliding_window_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"


def _said(mask_function: Callable) -> dict[str, dict[str, Any]]:
    """What Transformers' mask says: the names of the functions that it joins by "and", and what each knows."""
    if not inspect.isfunction(mask_function):  # a partial, an object: something of the user's
        return {repr(mask_function): {}}
    name, known = mask_function.__qualname__, dict(inspect.getclosurevars(mask_function).nonlocals)
    if name == "and_masks.<locals>.and_mask":
        return {n: what for part in known["mask_functions"] for n, what in _said(part).items()}
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _said(known["mask_function"])  # of positions that begin anew, which differ within a sequence as those of the row
    return {name: known}


def _starts(sequence: Tensor) -> Tensor:
    """The number [B, S] of each position's sequence, ascending -> where that sequence begins [B, S] (int32)."""
    position = torch.arange(sequence.shape[1], device=sequence.device)
    begins = torch.diff(sequence, prepend=sequence[:, :1] - 1) != 0
    return torch.where(begins, position, 0).cummax(1).values.to(torch.int32)
