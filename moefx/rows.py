"""The moves of rows within a rank: from tokens to experts' rows, and from experts' rows to one row per token.

Sums are taken in float32 (float64 for float64) in a fixed order and rounded once. On CUDA one Triton kernel each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .transports import wide


def sort_by_expert(experts: Tensor, local: int, rows: int) -> tuple[Tensor, Tensor]:
    """experts [N, K]: numbers from 0 to ``local`` - 1, or -1 for none. -> counts [local] int64, and entries [rows] int64: which
    flattened (token, k) each row is, expert by expert, in the order of the tokens; -1 for rows after the last.

    ``rows`` is the number of experts wanted, or more.
    """
    flat = experts.reshape(-1)
    key = torch.where(flat < 0, local, flat)
    counts = torch.zeros(local + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, key.long(), torch.ones_like(key, dtype=torch.int64))
    entries = torch.argsort(key, stable=True)[:rows]
    counts = counts[:local].clone()
    return counts, torch.where(key[entries] < local, entries, -1)


def places(entries: Tensor, tokens: int, top_k: int) -> Tensor:
    """The inverse: which row each (token, k) is, -1 for none. [N, K] int64."""
    found = torch.full((tokens * top_k + 1,), -1, dtype=torch.int64, device=entries.device)
    at = torch.where(entries < 0, tokens * top_k, entries)
    found.scatter_(0, at, torch.arange(entries.shape[0], device=entries.device))
    return found[:-1].view(tokens, top_k)


def sum_rows(rows: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows [R, H] (strided), place [N, K]: which rows make up each result, -1 for none; weights [R] or None. -> [N, H]:

    ``out[n] = sum_k weights[place[n, k]] * rows[place[n, k]]``, in the rows' dtype.
    """
    if rows.is_cuda:
        from .kernels.rows import sum_rows as kernel

        return kernel(rows, place, weights)
    here = place >= 0
    picked = rows[place[here]].to(wide(rows.dtype))
    if weights is not None:
        picked = picked * weights[place[here]].to(picked.dtype).unsqueeze(1)
    token = torch.arange(place.shape[0], device=rows.device).unsqueeze(1).expand_as(place)[here]
    total = picked.new_zeros(place.shape[0], rows.shape[1])
    return total.index_add_(0, token, picked).to(rows.dtype)


def pick(values: Tensor, place: Tensor) -> Tensor:
    """``values[place]``, zeros where place is -1. values [R] -> [N, K]."""
    if not values.shape[0]:
        return values.new_zeros(place.shape)
    return torch.where(place >= 0, values[place.clamp_min(0)], 0)


def weighted_backward(grad: Tensor, rows: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``sum_rows``'s rows [R, H] and weights [R] from its result's [N, H]; zeros for a row without token."""
    # the token of each row, -1 for none
    here = torch.where(place < 0, rows.shape[0], place).reshape(-1)
    token = torch.full((rows.shape[0] + 1,), -1, dtype=torch.int64, device=rows.device)
    token.scatter_(0, here, torch.arange(here.shape[0], device=rows.device) // max(place.shape[1], 1))
    token = token[:-1]
    if rows.is_cuda:
        from .kernels.rows import weighted_backward as kernel

        return kernel(grad, rows, weights, token)
    if not grad.shape[0]:
        return torch.zeros_like(rows), torch.zeros_like(weights)
    there = (token >= 0).unsqueeze(1)
    picked = grad[token.clamp_min(0)].to(wide(rows.dtype))
    to_rows = torch.where(there, picked * weights.to(picked.dtype).unsqueeze(1), 0).to(rows.dtype)
    to_weights = torch.where(there, picked * rows.to(picked.dtype), 0).sum(dim=1).to(weights.dtype)
    return to_rows, to_weights
