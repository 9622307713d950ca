"""The moves of rows within a rank: where each token goes, from tokens to rows, and from rows to sums per token.

A table of places [T, K] (int32) says which row each (token, k) is, -1 for none; all moves read such a table, made once.
Sums are taken in float32 (float64 for float64) in a fixed order and rounded once. On CUDA each move is one Triton kernel, a
table three; nothing waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefx.transports import FP8, fp8_rows, unpack, wide


def _fused(x: Tensor) -> Any:
    """The module of kernels for tensors on a CUDA device, None elsewhere."""
    return _kernels() if x.is_cuda else None


@functools.cache
def _kernels() -> Any:
    from moefx.kernels import rows

    return rows


# --- tables of places ------------------------------------------------------------------------------------------------


def ways(index: Tensor, ep: int, local: int) -> tuple[Tensor, Tensor]:
    """Where tokens go that want the experts index [T, K] (int64; -1: none), ``local`` of which live on each of ``ep`` ranks.

    -> sizes [2, ep, 2] int64: of the first, the tokens and the (token, k) for each rank; the second is left for what the other
    ranks say. And tables [2, T, K]: the row, rank by rank, then by token, that (token, k) is sent in; the same with
    -1 where an earlier k of the token is sent in that row.
    """
    sizes = torch.empty(2, ep, 2, dtype=torch.int64, device=index.device)
    tables = torch.empty(2, *index.shape, dtype=torch.int32, device=index.device)
    kernels = _fused(index)
    if kernels:
        kernels.places(index.contiguous(), 0, local, ep, sizes[0], tables[0], tables[1])
        return sizes, tables
    tokens = index.shape[0]
    rank = torch.where(index < 0, ep, index // local)
    here = torch.zeros(tokens, ep + 1, dtype=torch.int64, device=index.device).scatter_(1, rank, 1)[:, :ep]
    torch.sum(here, 0, out=sizes[0, :, 0])
    sizes[0, :, 1] = torch.bincount(rank.view(-1), minlength=ep + 1)[:ep]
    row = here.t().reshape(-1).cumsum(0).sub_(1).view(ep, tokens)
    tables[0] = row.t().gather(1, rank.clamp_max(ep - 1)).masked_fill_(index < 0, -1)
    again = (rank.unsqueeze(2) == rank.unsqueeze(1)).tril_(-1).any(dim=2)
    tables[1] = tables[0].masked_fill(again, -1)
    return sizes, tables


def by_expert(experts: Tensor, first: int, local: int) -> tuple[Tensor, Tensor]:
    """experts [N, K] int32 (rows may be strided), of which those from ``first`` to ``first + local - 1`` are meant.

    -> counts [local] int64, and the table of places in the order of the experts, within one in the order of the tokens.
    """
    counts = torch.empty(local, dtype=torch.int64, device=experts.device)
    place = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    kernels = _fused(experts)
    if kernels:
        kernels.places(experts, first, 1, local, counts, place, None)
        return counts, place
    flat = experts.reshape(-1).long() - first
    flat = torch.where((flat < 0) | (flat >= local), local, flat)
    counts.copy_(torch.bincount(flat, minlength=local + 1)[:local])
    order = torch.argsort(flat, stable=True)
    place.view(-1).scatter_(0, order, torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device))
    return counts, place.masked_fill_((flat == local).view(place.shape), -1)


def _entries(place: Tensor, rows: int) -> Tensor:
    """The inverse of a table: which flattened (token, k) each of ``rows`` rows is, -1 for none."""
    found = torch.full((rows + 1,), -1, dtype=torch.int64, device=place.device)
    flat = place.reshape(-1).long()
    found.scatter_(0, torch.where(flat < 0, rows, flat), torch.arange(flat.shape[0], device=flat.device))
    return found[:rows]


# --- from tokens to rows ---------------------------------------------------------------------------------------------


def spread(x: Tensor, place: Tensor, rows: int, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [T, H] and values [T, K] (both may be strided) -> each token in its rows [rows, H], each value in its row [rows].

    Rows that the table does not name (a dispatch with a capacity has such, at the end) hold anything.
    """
    kernels = _fused(x)
    if kernels:
        out = torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
        row_values = torch.empty(rows if values is not None else 0, dtype=torch.float32, device=x.device)
        kernels.spread(x, place, out, values, row_values)
        return out, row_values
    if not place.numel():
        return x.new_zeros(rows, x.shape[1]), x.new_zeros(0 if values is None else rows, dtype=wide(x.dtype))
    at = _entries(place, rows).clamp_min(0)
    return x[at // place.shape[1]], x.new_empty(0, dtype=wide(x.dtype)) if values is None else values.reshape(-1)[at]


def arrived(tokens: Tensor, hidden: int, host: Tensor) -> Tensor:
    """The tokens [N, H] of H = ``hidden`` numbers in what a transport brought, as :class:`moefx.transports.Dispatched` says."""
    if not tokens.shape[0]:
        return tokens.new_empty(0, hidden)
    if int(host[FP8]):
        return fp8_rows.decode(unpack(tokens, (fp8_rows.width(hidden, tokens.dtype), tokens.dtype))[0], hidden)
    return tokens if tokens.shape[1] == hidden else unpack(tokens, (hidden, tokens.dtype))[0]


class Kept(NamedTuple):
    """What a backward keeps to have rows [R, H] again: the rows, or what they were spread from, which is less."""

    rows: Tensor | None
    tokens: Tensor | None = None  #: as they arrived
    place: Tensor | None = None
    host: Tensor | None = None

    @staticmethod
    def least(rows: Tensor, tokens: Tensor | None, place: Tensor | None, host: Tensor | None) -> Kept:
        return Kept(rows) if tokens is None else Kept(None, tokens, place, host)

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens.dtype if self.rows is None else self.rows.dtype  # type: ignore[union-attr]

    def again(self, many: int, hidden: int) -> Tensor:
        """[R, H] of R = ``many`` and H = ``hidden``."""
        if self.rows is not None:
            return self.rows
        assert self.tokens is not None and self.place is not None and self.host is not None
        return spread(arrived(self.tokens, hidden, self.host), self.place, many)[0]


class Row(NamedTuple):
    """Views of the parts of rows that travel."""

    hidden: Tensor  #: [S, W]
    weights: Tensor  #: [S, K] float32 (float64)
    experts: Tensor  #: [S, K] int32: numbered from 0 on the rank that the row goes to, -1: not there


def pack(x: Tensor, index: Tensor, weights: Tensor, once: Tensor, local: int, out: Row) -> None:
    """Writes each token's x [T, W], weights [T, K] and experts index [T, K] to its rows by the table ``once``."""
    kernels = _fused(x)
    if kernels:
        kernels.pack(x.contiguous(), index.contiguous(), weights.contiguous(), once, local, out)
        return
    top_k = index.shape[1]
    at = _entries(once, out.hidden.shape[0])
    token = at // top_k
    out.hidden.copy_(x[token])
    out.weights.copy_(weights[token])
    there, rank = index[token], index.view(-1)[at].unsqueeze(1) // local
    out.experts.copy_(torch.where((there >= 0) & (there // local == rank), there - rank * local, -1))


# --- from rows to tokens ---------------------------------------------------------------------------------------------


class Picked(NamedTuple):
    """``out[n, k] = values[place[n, k]]``, or ``values[place[n, k], k]`` where they have a column for each k; 0 for none."""

    values: Tensor  #: [R] or [R, K]
    place: Tensor  #: [N, K]
    out: Tensor  #: [N, K]


def sum_rows(rows: Tensor, place: Tensor, *, out: Tensor | None = None, picked: Picked | None = None) -> Tensor:
    """rows [R, H], place [N, K]: which rows make up each result, -1 for none. -> [N, H]:

    ``out[n] = sum_k rows[place[n, k]]``, in the rows' dtype. rows and ``out`` may have strided rows.
    ``picked``: single values are picked besides.
    """
    if out is None:
        out = rows.new_empty(place.shape[0], rows.shape[1])
    kernels = _fused(rows)
    if kernels:
        kernels.sum_rows(rows, place, out, picked)
        return out
    if picked is not None:
        picked.out.copy_(_pick(picked.values, picked.place))
    token, _ = torch.nonzero(place >= 0, as_tuple=True)
    at = place[place >= 0].long()
    terms = rows[at].to(wide(rows.dtype))
    total = terms.new_zeros(place.shape[0], rows.shape[1])
    return out.copy_(total.index_add_(0, token, terms))


def _pick(values: Tensor, place: Tensor) -> Tensor:
    if not values.shape[0]:
        return values.new_zeros(place.shape)
    at = place.clamp_min(0).long()
    found = values[at] if values.dim() == 1 else values[at, torch.arange(place.shape[1], device=at.device)]
    return found.masked_fill_(place < 0, 0)
