"""All-to-all: sizes first (the only time that the host waits), then the rows, each with its experts and weights, in one piece.

Any device, dtype and backend of torch.distributed (NCCL, gloo).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import rows as rows_
from . import (
    KIND,
    LAYER,
    NAMES,
    PAIRS,
    RECEIVED,
    ROWS,
    TOKENS,
    TOP_K,
    Call,
    Dispatched,
    Host,
    Shapes,
    Wait,
    empty_rows,
    make_host,
    row_bytes,
    unpack,
    wide,
)  # fmt: skip


def all_to_all(rows: Tensor, send: list[int], receive: list[int], call: Call) -> tuple[Tensor, Wait]:
    """Starts the exchange of ``rows``, ``send[r]`` of them to rank r in order."""
    out = rows.new_empty(sum(receive), rows.shape[1])
    work = dist.all_to_all_single(out, rows, receive, send, group=call.group, async_op=True)
    return out, (lambda: None) if work is None else work.wait


class AllToAll:
    name = "all_to_all"

    def exchange_sizes(self, sizes: Tensor, call: Call) -> Tensor:
        """sizes [ep, 2], a row for each rank -> a row from each rank."""
        arriving = torch.empty_like(sizes)
        dist.all_to_all_single(arriving, sizes, group=call.group)
        return arriving

    def exchange(self, rows: Tensor, send: list[int], receive: list[int], call: Call) -> tuple[Tensor, Wait]:
        """Starts to send ``send[r]`` of the rows to each rank r, in order."""
        return all_to_all(rows, send, receive, call)

    def shapes(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        tokens, top_k, pairs = x.shape[0], index.shape[1], size("pairs")
        there, back = self._parts(x, top_k, weights.dtype), self._parts(x, top_k, weights.dtype)[:2]
        return Shapes(
            (size("received"), row_bytes(*there) // x.dtype.itemsize),
            (0, top_k),
            (8 * (pairs + tokens * top_k),),
            (pairs, row_bytes(*back) // x.dtype.itemsize),
            (0, top_k),
        )

    @staticmethod
    def _parts(x: Tensor, top_k: int, dtype: torch.dtype) -> list[tuple[int, torch.dtype]]:
        return [(x.shape[1], x.dtype), (top_k, wide(dtype)), (top_k, torch.int32)]

    def send(
        self, x: Tensor, index: Tensor, weights: Tensor, call: Call, kept: Dispatched | None
    ) -> tuple[Dispatched, Wait]:
        tokens, top_k = index.shape
        if kept is None:
            handle, host = self._agree(index, call)
        else:
            handle, host = kept.handle.clone(), kept.host.clone()
        pair, _ = self._read(handle, Host.read(host))
        token, rank = pair % max(tokens, 1), pair // max(tokens, 1)
        first = rank.unsqueeze(1) * call.local
        there = index[token]  # -1: no expert
        local = torch.where((there >= first) & (there < first + call.local), there - first, -1)
        payload = empty_rows(x, pair.shape[0], *self._parts(x, top_k, weights.dtype))
        hidden, w, experts = unpack(payload, *self._parts(x, top_k, weights.dtype))
        hidden.copy_(x[token])
        w.copy_(weights[token])
        experts.copy_(local)
        sizes = Host.read(host)
        arrived, wait = self.exchange(payload, sizes.send, sizes.receive, call)
        nothing = index.new_empty(0, top_k, dtype=torch.int32), weights.new_empty(0, top_k, dtype=wide(weights.dtype))
        return Dispatched(arrived, *nothing, handle, host), wait

    def _agree(self, index: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Who sends how many tokens to whom. The handle holds the pairs (token, rank), rank by rank, as ``rank * T + token``
        [S], and which of these each (token, k) is [T, K], -1 for none."""
        (tokens, top_k), ep, device = index.shape, call.ep, index.device
        rank = torch.where(index < 0, ep, index // call.local)
        here = torch.zeros(tokens, ep + 1, dtype=torch.int64, device=device).scatter_(1, rank, 1)[:, :ep]
        rows = torch.zeros(ep + 1, dtype=torch.int64, device=device)
        rows.scatter_add_(0, rank.reshape(-1), torch.ones_like(rank).reshape(-1))
        sizes = torch.stack((here.sum(0), rows[:ep]), dim=1)
        arriving = self.exchange_sizes(sizes, call)
        send, receive, rows_here = torch.stack((sizes[:, 0], arriving[:, 0], arriving[:, 1])).tolist()
        pairs = sum(send)
        chosen = here.t().reshape(-1)
        place = torch.where(chosen > 0, chosen.cumsum(0) - 1, pairs)
        pair = torch.empty(pairs + 1, dtype=torch.int64, device=device)
        pair.scatter_(0, place, torch.arange(ep * tokens, device=device))
        of_token = place.view(ep, tokens).t().gather(1, rank.clamp_max(ep - 1)).masked_fill(index < 0, -1)
        handle = torch.cat((pair[:pairs], of_token.reshape(-1))).view(torch.uint8)
        facts = {
            KIND: NAMES.index(self.name), LAYER: call.layer, TOKENS: tokens, TOP_K: top_k, RECEIVED: sum(receive),
            ROWS: sum(rows_here), PAIRS: pairs,
        }  # fmt: skip
        return handle, make_host(facts, ep, send, receive)

    @staticmethod
    def _read(handle: Tensor, sizes: Host) -> tuple[Tensor, Tensor]:
        pairs, tokens, top_k = (sizes.facts[i] for i in (PAIRS, TOKENS, TOP_K))
        numbers = handle.view(torch.int64)
        return numbers[:pairs], numbers[pairs:].view(tokens, top_k)

    def opened(self, sent: Dispatched, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N, H], experts [N, K] and weights [N, K] of what ``send(x, ...)`` gave and has arrived."""
        top_k = sent.experts.shape[1]
        hidden, w, experts = unpack(sent.tokens, *self._parts(x, top_k, sent.weights.dtype))
        return hidden, experts, w

    def resend(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        sizes = Host.read(host)
        pair, _ = self._read(handle, sizes)
        return self.exchange(x[pair % max(x.shape[0], 1)], sizes.send, sizes.receive, call)

    def bring_back(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, host: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        sizes = Host.read(host)
        top_k = sizes.facts[TOP_K]
        payload = tokens
        if weights is not None:
            parts = self._parts(tokens, top_k, weights.dtype)[:2]
            payload = empty_rows(tokens, tokens.shape[0], *parts)
            for part, values in zip(unpack(payload, *parts), (tokens, weights)):
                part.copy_(values)
        back, wait = self.exchange(payload.contiguous(), sizes.receive, sizes.send, call)
        return back, None if weights is None else weights.new_empty(0, top_k), wait

    def collect(
        self, back: Tensor, back_weights: Tensor | None, handle: Tensor, host: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        sizes = Host.read(host)
        _, of_token = self._read(handle, sizes)
        top_k = of_token.shape[1]
        # a rank that has several of a token's experts sent one row for all of them
        again = (of_token.unsqueeze(2) == of_token.unsqueeze(1)).tril(-1).any(dim=2)
        if back_weights is None:
            return rows_.sum_rows(back, of_token.masked_fill(again, -1)), None
        values, w = unpack(back, (hidden, back.dtype), (top_k, back_weights.dtype))
        if not w.shape[0]:
            return rows_.sum_rows(values, of_token), w.new_zeros(of_token.shape)
        picked = w[of_token.clamp_min(0), torch.arange(top_k, device=back.device)]
        return rows_.sum_rows(values, of_token.masked_fill(again, -1)), torch.where(of_token < 0, 0, picked)


TRANSPORT = AllToAll()
