"""The transport over DeepEP's ``Buffer``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moefx.backends.deepep.buffers import buffer_of, decode_on_comm_stream, wait_for
from moefx.backends.deepep.handles import pack_tensors, unpack_tensors
from moefx.backends.deepep.payload import ROW_MULTIPLE, at_least_one, decode, encode, padded, sent_copy
from moefx.transports import Call, Dispatched, Header, Shapes, SummedInReturn, Wait, make_header


class DeepEP(SummedInReturn):
    """See :class:`moefx.transports.Transport`."""

    def shapes(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        """See :meth:`moefx.transports.Transport.shapes`."""
        (tokens, hidden), top_k = x.shape, topk_ids.shape[1]
        n = call.ep * call.capacity if call.capacity else size("received")
        return Shapes((n, hidden), (n, top_k), (size("handle"),), (tokens, hidden), (tokens, top_k))

    def dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, kept: Dispatched | None
    ) -> tuple[Dispatched, Wait]:
        """See :meth:`moefx.transports.Transport.dispatch`."""
        if kept is not None:
            tokens, wait = self._dispatch_again(x, kept.handle, kept.cpu_metadata, call)
            return Dispatched(tokens, *(t.clone() for t in kept[1:])), wait
        num_tokens = x.shape[0]
        x, topk_ids, topk_weights = at_least_one(x, topk_ids, topk_weights)
        rows = padded(x)
        buffer, payload = buffer_of(call, rows), encode(rows, call)
        *layout, event = buffer.get_dispatch_layout(
            topk_ids, call.num_experts, previous_event=buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        per_rank, per_node, per_expert, in_rank = layout
        worst, top_k = call.ep * call.capacity, topk_ids.shape[1]
        received, experts, weights, counts, handle, _ = buffer.dispatch(
            payload,
            topk_idx=topk_ids,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            num_worst_tokens=worst,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        current, comm = torch.cuda.current_stream(), buffer.get_comm_stream()
        with torch.cuda.stream(comm):
            packed, own = pack_tensors(list(handle))
            experts, received = experts.int(), decode(received, x)
            done = comm.record_event()
        for t in (packed, experts, received):
            t.record_stream(current)
        header = Header(
            "deepep",
            call.layer,
            call.capacity,
            tokens=num_tokens,
            top_k=top_k,
            received=received.shape[0],
            permuted=worst * min(top_k, call.local) if worst else sum(counts),
            sent=num_tokens,
            own=own,
        )
        sent = Dispatched(received, experts, weights, packed, make_header(header, call.ep))
        return sent, wait_for(done, x, payload, topk_ids, topk_weights, handle)

    def redispatch(self, x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        """See :meth:`moefx.transports.Transport.redispatch`."""
        return self._dispatch_again(x, handle, cpu_metadata, replace(call, dispatch_dtype=""))

    @staticmethod
    def _dispatch_again(x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        rows = padded(x) if x.shape[0] and x.shape[1] % ROW_MULTIPLE else padded(sent_copy(x))  # padding makes a copy too
        buffer = buffer_of(call, rows)
        payload, tensors = encode(rows, call), unpack_tensors(handle, Header.read(cpu_metadata).own)
        received, *_, event = buffer.dispatch(
            payload, handle=tuple(tensors), previous_event=buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        if not call.dispatch_dtype and rows.shape[1] == x.shape[1]:
            return received, wait_for(event, rows, handle, received)
        received, done = decode_on_comm_stream(buffer, received, x)
        return received, wait_for(done, rows, payload, handle)

    def return_rows(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        """See :meth:`moefx.transports.Transport.return_rows`."""
        rows, header = padded(tokens).contiguous(), Header.read(cpu_metadata)
        buffer = buffer_of(call, rows)
        weights = None if weights is None else weights.contiguous()
        returned, returned_weights, event = buffer.combine(
            rows,
            tuple(unpack_tensors(handle, header.own)),
            topk_weights=weights,
            previous_event=buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        if rows.shape[1] == tokens.shape[1]:
            done = event
        else:
            returned, done = decode_on_comm_stream(buffer, returned, tokens)
        wait = wait_for(done, rows, weights, handle, returned)
        return *self.own_rows(returned, returned_weights, header.tokens), wait


TRANSPORT = DeepEP()
