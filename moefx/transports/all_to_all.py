"""All-to-all: sizes first (the only time that the host waits), then the rows, each with its experts and weights, in one piece.

Any device, dtype and backend of torch.distributed (NCCL, gloo).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.transports import (
    FP8,
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
    fp8_rows,
    make_host,
    reading,
    row_bytes,
    unpack,
    wide,
)
from moefx.transports import permute as rows_


def parts(x: Tensor, top_k: int, dtype: torch.dtype, wire: str = "") -> list[tuple[int, torch.dtype]]:
    """What a row holds: hidden state, weights, experts. Rows that go back hold the first two, never encoded."""
    hidden = fp8_rows.width(x.shape[1], x.dtype) if wire else x.shape[1]
    return [(hidden, x.dtype), (top_k, wide(dtype)), (top_k, torch.int32)]


def all_to_all(rows: Tensor, send: list[int], receive: list[int], call: Call) -> tuple[Tensor, Wait]:
    """Starts the exchange of ``rows``, ``send[r]`` of them to rank r in order."""
    out = rows.new_empty(sum(receive), rows.shape[1])
    work = dist.all_to_all_single(out, rows, receive, send, group=call.group, async_op=True)
    return out, (lambda: None) if work is None else work.wait


class AllToAll:
    name = "all_to_all"
    packed = True

    def exchange_sizes(self, sizes: Tensor, call: Call) -> None:
        """sizes [2, ep, 2]: of the first, a row for each rank; a row from each rank becomes the second."""
        dist.all_to_all_single(sizes[1], sizes[0], group=call.group)

    def exchange(self, rows: Tensor, send: list[int], receive: list[int], call: Call) -> tuple[Tensor, Wait]:
        """Starts to send ``send[r]`` of the rows to each rank r, in order."""
        return all_to_all(rows, send, receive, call)

    def shapes(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        (tokens, top_k), item = index.shape, x.dtype.itemsize
        there = row_bytes(*parts(x, top_k, weights.dtype, call.wire)) // item
        back = row_bytes(*parts(x, top_k, weights.dtype)[:2]) // item
        return Shapes((size("received"), there), (0, top_k), (8 * tokens * top_k,), (size("pairs"), back), (0, top_k), own=0)

    def send(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, kept: Dispatched | None) -> tuple[Dispatched, Wait]:
        top_k, payload = index.shape[1], None
        x = fp8_rows.encode(x) if call.wire else x
        if kept is None:
            sizes, tables = rows_.ways(index, call.ep, call.local)
            self.exchange_sizes(sizes, call)
            read = reading(sizes)
            if x.is_cuda:  # it runs while the host waits; so for the most rows that there can be
                payload = self._payload(x, index, weights, tables[1], x.shape[0] * min(top_k, call.ep), call)
            handle, host = tables.view(-1).view(torch.uint8), self._host(read(), index, call)
        else:
            handle, host = kept.handle.clone(), kept.host.clone()
        to = Host.read(host)
        if payload is None:
            payload = self._payload(x, index, weights, self._tables(handle, to)[1], to.facts[PAIRS], call)
        arrived, wait = self.exchange(payload[: to.facts[PAIRS]], to.send, to.receive, call)
        nothing = index.new_empty(0, top_k, dtype=torch.int32), weights.new_empty(0, top_k, dtype=wide(weights.dtype))
        return Dispatched(arrived, *nothing, handle, host), wait

    @staticmethod
    def _payload(x: Tensor, index: Tensor, weights: Tensor, once: Tensor, rows: int, call: Call) -> Tensor:
        made = parts(x, index.shape[1], weights.dtype)
        payload = empty_rows(x, rows, *made)
        rows_.pack(x, index, weights, once, call.local, rows_.Row(*unpack(payload, *made)))
        return payload

    def _host(self, sizes: list, index: Tensor, call: Call) -> Tensor:
        (send, _sent), (receive, rows) = (list(zip(*part)) for part in sizes)
        facts = {
            KIND: NAMES.index(self.name),
            LAYER: call.layer,
            TOKENS: index.shape[0],
            TOP_K: index.shape[1],
            RECEIVED: sum(receive),
            ROWS: sum(rows),
            PAIRS: sum(send),
            FP8: call.wire == "fp8",
        }
        return make_host(facts, call.ep, send, receive, own_size=0)

    @staticmethod
    def _tables(handle: Tensor, sizes: Host) -> Tensor:
        """[2, T, K]: see :func:`moefx.transports.permute.ways`."""
        return handle.view(torch.int32).view(2, sizes.facts[TOKENS], sizes.facts[TOP_K])

    def opened(self, sent: Dispatched, x: Tensor, wire: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N, H] (encoded ones as they came), experts [N, K], weights [N, K] of what ``send(x, ...)`` gave."""
        hidden, w, experts = unpack(sent.tokens, *parts(x, sent.experts.shape[1], sent.weights.dtype, wire))
        return hidden, experts, w

    def resend(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        to = Host.read(host)
        rows, _ = rows_.spread(x, self._tables(handle, to)[1], to.facts[PAIRS])
        return self.exchange(rows, to.send, to.receive, call)

    def bring_back(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, host: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        to = Host.read(host)
        back, wait = self.exchange(tokens.contiguous(), to.receive, to.send, call)
        return back, None if weights is None else weights.new_empty(0, to.facts[TOP_K]), wait

    def collect(
        self, back: Tensor, back_weights: Tensor | None, handle: Tensor, host: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        place, once = self._tables(handle, Host.read(host))
        if back_weights is None:
            return rows_.sum_rows(back, once), None
        values, w = unpack(back, (hidden, back.dtype), (place.shape[1], back_weights.dtype))
        to_weights = w.new_empty(place.shape)
        return rows_.sum_rows(values, once, picked=rows_.Picked(w, place, to_weights)), to_weights


TRANSPORT = AllToAll()
