"""The transport over DeepEP's ``Buffer``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moefx import transports
from moefx.backends.deepep.buffers import buffer_of, wait_for
from moefx.backends.deepep.handles import pack_tensors, unpack_tensors
from moefx.backends.deepep.payload import WHOLE, at_least_one, off_wire, on_wire, padded, sent_copy
from moefx.transports import Call, Dispatched, Host, Shapes, Wait, make_host


class DeepEP:
    """Along ``Buffer``."""

    packed = False

    def shapes(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        (tokens, hidden), top_k = x.shape, index.shape[1]
        n = call.ep * call.capacity if call.capacity else size("received")
        return Shapes((n, hidden), (n, top_k), (size("handle"),), (tokens, hidden), (tokens, top_k))

    def send(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, kept: Dispatched | None) -> tuple[Dispatched, Wait]:
        if kept is not None:
            tokens, wait = self._again(x, kept.handle, kept.host, call)
            return Dispatched(tokens, *(t.clone() for t in kept[1:])), wait
        many = x.shape[0]
        x, index, weights = at_least_one(x, index, weights)
        rows = padded(x)
        buffer, payload = buffer_of(call, rows), on_wire(rows, call)
        *layout, event = buffer.get_dispatch_layout(
            index, call.num_experts, previous_event=buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        per_rank, per_node, per_expert, in_rank = layout
        worst, top_k = call.ep * call.capacity, index.shape[1]
        got, experts, got_weights, counts, handle, _ = buffer.dispatch(
            payload,
            topk_idx=index,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            num_worst_tokens=worst,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        here, theirs = torch.cuda.current_stream(), buffer.get_comm_stream()
        with torch.cuda.stream(theirs):
            packed, own = pack_tensors(list(handle))
            experts, got = experts.int(), off_wire(got, x)
            done = theirs.record_event()
        for t in (packed, experts, got):
            t.record_stream(here)
        facts = {
            transports.KIND: transports.NAMES.index("deepep"),
            transports.LAYER: call.layer,
            transports.CAPACITY: call.capacity,
            transports.TOKENS: many,
            transports.TOP_K: top_k,
            transports.RECEIVED: got.shape[0],
            transports.ROWS: worst * min(top_k, call.local) if worst else sum(counts),
            transports.PAIRS: many,
        }
        sent = Dispatched(got, experts, got_weights, packed, make_host(facts, call.ep, own=own))
        return sent, wait_for(done, x, payload, index, weights, handle)

    def resend(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        return self._again(x, handle, host, replace(call, wire=""))

    @staticmethod
    def _again(x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        rows = padded(x) if x.shape[0] and x.shape[1] % WHOLE else padded(sent_copy(x))  # padding makes a copy too
        buffer = buffer_of(call, rows)
        payload, tensors = on_wire(rows, call), unpack_tensors(handle, Host.read(host).own)
        got, *_, event = buffer.dispatch(
            payload, handle=tuple(tensors), previous_event=buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        if not call.wire and rows.shape[1] == x.shape[1]:
            return got, wait_for(event, rows, handle, got)
        here, theirs = torch.cuda.current_stream(), buffer.get_comm_stream()
        with torch.cuda.stream(theirs):
            got = off_wire(got, x)
            done = theirs.record_event()
        got.record_stream(here)
        return got, wait_for(done, rows, payload, handle)

    def bring_back(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, host: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        rows, sizes = padded(tokens).contiguous(), Host.read(host)
        buffer = buffer_of(call, rows)
        weights = None if weights is None else weights.contiguous()
        back, back_weights, event = buffer.combine(
            rows,
            tuple(unpack_tensors(handle, sizes.own)),
            topk_weights=weights,
            previous_event=buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        if rows.shape[1] == tokens.shape[1]:
            done = event
        else:
            with torch.cuda.stream(buffer.get_comm_stream()):
                back = off_wire(back, tokens)
                done = buffer.get_comm_stream().record_event()
            back.record_stream(torch.cuda.current_stream())
        wait = wait_for(done, rows, weights, handle, back)
        if not sizes.facts[transports.TOKENS]:
            back, back_weights = back[:0].clone(), None if back_weights is None else back_weights[:0].clone()
        return back, back_weights, wait

    def collect(
        self, back: Tensor, back_weights: Tensor | None, handle: Tensor, host: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        return back.clone(), None if back_weights is None else back_weights.clone()


TRANSPORT = DeepEP()
