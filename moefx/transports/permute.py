"""Permutation of rows within a rank: from tokens to rows in the order of their destinations, and from rows to sums per token.

A ``row_id_map`` [T, K] (int32) holds the row of each (token, k), -1 for none; it is built once by a counting sort and read by
all moves. Sums are taken in float32 (float64 for float64) in a fixed order and rounded once. On CUDA each move is one Triton
kernel, a map takes three; nothing waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefx.transports import fp8_rows
from moefx.transports.base import accumulation_dtype
from moefx.transports.header import Header
from moefx.transports.row_layout import unpack


def _fused(x: Tensor) -> Any:
    """The module of kernels for tensors on a CUDA device, None elsewhere."""
    return _kernels() if x.is_cuda else None


@functools.cache
def _kernels() -> Any:
    from moefx.kernels import rows

    return rows


# --- maps ------------------------------------------------------------------------------------------------------------


def build_send_map(topk_ids: Tensor, ep: int, local: int) -> tuple[Tensor, Tensor]:
    """Which rows are sent to which rank, for topk_ids [T, K] (int64; -1: none) and ``local`` experts on each of ``ep`` ranks.

    Returns:
        sizes [2, ep, 2] int64: ``sizes[0, r]`` is how many tokens and how many (token, k) go to rank r; ``sizes[1]`` is left
        uninitialized, for what the other ranks report. And maps [2, T, K] int32: the row, by rank, then by token, that
        (token, k) is sent in; the same with -1 where the token is sent in that row for an earlier k already.
    """
    sizes = torch.empty(2, ep, 2, dtype=torch.int64, device=topk_ids.device)
    maps = torch.empty(2, *topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    kernels = _fused(topk_ids)
    if kernels:
        kernels.build_row_id_map(topk_ids.contiguous(), 0, local, ep, sizes[0], maps[0], maps[1])
        return sizes, maps
    tokens = topk_ids.shape[0]
    rank = torch.where(topk_ids < 0, ep, topk_ids // local)
    here = torch.zeros(tokens, ep + 1, dtype=torch.int64, device=topk_ids.device).scatter_(1, rank, 1)[:, :ep]
    torch.sum(here, 0, out=sizes[0, :, 0])
    sizes[0, :, 1] = torch.bincount(rank.view(-1), minlength=ep + 1)[:ep]
    row = here.t().reshape(-1).cumsum(0).sub_(1).view(ep, tokens)
    maps[0] = row.t().gather(1, rank.clamp_max(ep - 1)).masked_fill_(topk_ids < 0, -1)
    again = (rank.unsqueeze(2) == rank.unsqueeze(1)).tril_(-1).any(dim=2)
    maps[1] = maps[0].masked_fill(again, -1)
    return sizes, maps


def sort_by_expert(topk_ids: Tensor, first: int, local: int) -> tuple[Tensor, Tensor]:
    """A stable sort of topk_ids [N, K] int32 (rows may be strided) by expert, for experts ``first`` to ``first + local - 1``.

    Returns:
        tokens_per_expert [local] int64; row_id_map [N, K]: rows in the order of the experts, within one in the order of the
        tokens.
    """
    tokens_per_expert = torch.empty(local, dtype=torch.int64, device=topk_ids.device)
    row_id_map = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    kernels = _fused(topk_ids)
    if kernels:
        kernels.build_row_id_map(topk_ids, first, 1, local, tokens_per_expert, row_id_map, None)
        return tokens_per_expert, row_id_map
    flat = topk_ids.reshape(-1).long() - first
    flat = torch.where((flat < 0) | (flat >= local), local, flat)
    tokens_per_expert.copy_(torch.bincount(flat, minlength=local + 1)[:local])
    order = torch.argsort(flat, stable=True)
    row_id_map.view(-1).scatter_(0, order, torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device))
    return tokens_per_expert, row_id_map.masked_fill_((flat == local).view(row_id_map.shape), -1)


def _inverse(row_id_map: Tensor, rows: int) -> Tensor:
    """Which flattened (token, k) each of ``rows`` rows is, -1 for none."""
    found = torch.full((rows + 1,), -1, dtype=torch.int64, device=row_id_map.device)
    flat = row_id_map.reshape(-1).long()
    found.scatter_(0, torch.where(flat < 0, rows, flat), torch.arange(flat.shape[0], device=flat.device))
    return found[:rows]


# --- from tokens to rows ---------------------------------------------------------------------------------------------


def permute(x: Tensor, row_id_map: Tensor, rows: int, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Copies each token of x [T, H] to its rows [rows, H], and each of values [T, K] to its row [rows]. Both may be strided.

    Rows that the map does not name (a dispatch with a capacity leaves such at the end) are undefined.
    """
    kernels = _fused(x)
    if kernels:
        out = torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
        row_values = torch.empty(rows if values is not None else 0, dtype=torch.float32, device=x.device)
        kernels.permute(x, row_id_map, out, values, row_values)
        return out, row_values
    dtype = accumulation_dtype(x.dtype)
    if not row_id_map.numel():
        return x.new_zeros(rows, x.shape[1]), x.new_zeros(0 if values is None else rows, dtype=dtype)
    at = _inverse(row_id_map, rows).clamp_min(0)
    return x[at // row_id_map.shape[1]], x.new_empty(0, dtype=dtype) if values is None else values.reshape(-1)[at]


class PackedRows(NamedTuple):
    """Views of the parts of rows that are sent."""

    hidden: Tensor  #: [S, W]
    topk_weights: Tensor  #: [S, K] float32 (float64)
    topk_ids: Tensor  #: [S, K] int32: experts of the destination rank, numbered from 0; -1: on another rank


def pack(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, send_map: Tensor, local: int, out: PackedRows) -> None:
    """Writes each token's x [T, W], topk_ids [T, K] and topk_weights [T, K] to its rows by ``send_map`` [T, K]."""
    kernels = _fused(x)
    if kernels:
        kernels.pack(x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous(), send_map, local, out)
        return
    top_k = topk_ids.shape[1]
    at = _inverse(send_map, out.hidden.shape[0])
    token = at // top_k
    out.hidden.copy_(x[token])
    out.topk_weights.copy_(topk_weights[token])
    ids, rank = topk_ids[token], topk_ids.view(-1)[at].unsqueeze(1) // local
    out.topk_ids.copy_(torch.where((ids >= 0) & (ids // local == rank), ids - rank * local, -1))


def received_tokens(tokens: Tensor, hidden: int, cpu_metadata: Tensor) -> Tensor:
    """The tokens [N, H] of H = ``hidden`` in the received rows, see :class:`moefx.transports.Dispatched`; FP8 is decoded."""
    if not tokens.shape[0]:
        return tokens.new_empty(0, hidden)
    if Header.read(cpu_metadata).fp8:
        return fp8_rows.decode(unpack(tokens, (fp8_rows.width(hidden, tokens.dtype), tokens.dtype))[0], hidden)
    return tokens if tokens.shape[1] == hidden else unpack(tokens, (hidden, tokens.dtype))[0]


class SavedRows(NamedTuple):
    """What a backward saves of permuted rows [R, H]: the rows, or what they were permuted from, which is less."""

    rows: Tensor | None
    tokens: Tensor | None = None  #: as received
    row_id_map: Tensor | None = None
    cpu_metadata: Tensor | None = None

    @staticmethod
    def smallest(rows: Tensor, tokens: Tensor | None, row_id_map: Tensor | None, cpu_metadata: Tensor | None) -> SavedRows:
        """The received tokens, where they are given, else the rows."""
        return SavedRows(rows) if tokens is None else SavedRows(None, tokens, row_id_map, cpu_metadata)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.tokens.dtype if self.rows is None else self.rows.dtype  # type: ignore[union-attr]

    def restore(self, rows: int, hidden: int) -> Tensor:
        """The permuted rows [R, H] of R = ``rows`` and H = ``hidden``."""
        if self.rows is not None:
            return self.rows
        assert self.tokens is not None and self.row_id_map is not None and self.cpu_metadata is not None
        return permute(received_tokens(self.tokens, hidden, self.cpu_metadata), self.row_id_map, rows)[0]


# --- from rows to tokens ---------------------------------------------------------------------------------------------


class Gather(NamedTuple):
    """``out[n, k] = values[row_id_map[n, k]]``, or ``values[row_id_map[n, k], k]`` of values [R, K]; 0 where the map has -1."""

    values: Tensor  #: [R] or [R, K]
    row_id_map: Tensor  #: [N, K]
    out: Tensor  #: [N, K]


def unpermute(rows: Tensor, row_id_map: Tensor, *, out: Tensor | None = None, gather: Gather | None = None) -> Tensor:
    """``out[n] = sum_k rows[row_id_map[n, k]]`` of rows [R, H]: [N, H] in their dtype.

    rows and ``out`` may have strided rows. ``gather``: single values are gathered in the same kernel.
    """
    if out is None:
        out = rows.new_empty(row_id_map.shape[0], rows.shape[1])
    kernels = _fused(rows)
    if kernels:
        kernels.unpermute(rows, row_id_map, out, gather)
        return out
    if gather is not None:
        gather.out.copy_(_gathered(gather.values, gather.row_id_map))
    token, _ = torch.nonzero(row_id_map >= 0, as_tuple=True)
    at = row_id_map[row_id_map >= 0].long()
    terms = rows[at].to(accumulation_dtype(rows.dtype))
    total = terms.new_zeros(row_id_map.shape[0], rows.shape[1])
    return out.copy_(total.index_add_(0, token, terms))


def _gathered(values: Tensor, row_id_map: Tensor) -> Tensor:
    if not values.shape[0]:
        return values.new_zeros(row_id_map.shape)
    at = row_id_map.clamp_min(0).long()
    found = values[at] if values.dim() == 1 else values[at, torch.arange(row_id_map.shape[1], device=at.device)]
    return found.masked_fill_(row_id_map < 0, 0)
