"""All-gather: every rank gets every token, in a buffer of ``capacity`` rows a rank. Nothing is agreed, the host never waits.

For a known most number of tokens. What comes back travels by all-to-all and is summed in float32. It sends ``ep - 1`` rows a
token where all-to-all sends one to each rank that has an expert of the token: cheap while experts a token >= ep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.transports import (
    CAPACITY,
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
    row_bytes,
    unpack,
    wide,
)
from moefx.transports.all_to_all import all_to_all, parts


class AllGather:
    packed = True

    def shapes(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        n, top_k = call.ep * call.capacity, index.shape[1]
        there = row_bytes(*parts(x, top_k, weights.dtype, call.wire)) // x.dtype.itemsize
        back = row_bytes(*parts(x, top_k, weights.dtype)[:2]) // x.dtype.itemsize
        return Shapes((n, there), (0, top_k), (0,), (n, back), (0, top_k))

    def send(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, kept: Dispatched | None) -> tuple[Dispatched, Wait]:
        (tokens, top_k), n = index.shape, call.ep * call.capacity
        made = parts(x, top_k, weights.dtype, call.wire)
        payload = empty_rows(x, call.capacity, *made)
        hidden, w, experts = unpack(payload, *made)
        x = fp8_rows.encode(x) if call.wire else x
        hidden[:tokens].copy_(x)
        w[:tokens].copy_(weights)
        experts[:tokens].copy_(index)
        experts[tokens:] = -1
        everything, wait = self._gather(payload, call)
        facts = {
            KIND: NAMES.index("all_gather"),
            LAYER: call.layer,
            CAPACITY: call.capacity,
            TOKENS: tokens,
            TOP_K: top_k,
            RECEIVED: n,
            ROWS: n * min(top_k, call.local),
            PAIRS: n,
            FP8: call.wire == "fp8",
        }
        sizes = [call.capacity] * call.ep
        nothing = index.new_empty(0, top_k, dtype=torch.int32), weights.new_empty(0, top_k, dtype=wide(weights.dtype))
        handle = torch.empty(0, dtype=torch.uint8, device=x.device)
        return Dispatched(everything, *nothing, handle, make_host(facts, call.ep, sizes, sizes)), wait

    @staticmethod
    def _gather(rows: Tensor, call: Call) -> tuple[Tensor, Wait]:
        out = rows.new_empty(call.ep * rows.shape[0], rows.shape[1])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch < 2.13 has not the first
        work = gather(out, rows, group=call.group, async_op=True)
        return out, (lambda: None) if work is None else work.wait

    def resend(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        sizes = Host.read(host)
        mine = x.new_empty(sizes.facts[CAPACITY], x.shape[1])
        mine[: x.shape[0]] = x
        return self._gather(mine, call)

    def bring_back(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, host: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        sizes = Host.read(host)
        back, wait = all_to_all(tokens.contiguous(), sizes.receive, sizes.send, call)
        return back, None if weights is None else weights.new_empty(0, sizes.facts[TOP_K]), wait

    def collect(
        self, back: Tensor, back_weights: Tensor | None, handle: Tensor, host: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        sizes = Host.read(host)
        capacity, tokens, top_k = (sizes.facts[i] for i in (CAPACITY, TOKENS, TOP_K))

        def total(x: Tensor) -> Tensor:
            return x.view(call.ep, capacity, -1)[:, :tokens].sum(0, dtype=wide(x.dtype)).to(x.dtype)

        if back_weights is None:
            return total(back), None
        values, w = unpack(back, (hidden, back.dtype), (top_k, back_weights.dtype))
        return total(values.contiguous()), total(w.contiguous())


TRANSPORT = AllGather()
