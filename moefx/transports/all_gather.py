"""All-gather: every rank gets every token, in a buffer of ``capacity`` rows a rank. No counts, no wait of the host.

For a known largest number of tokens. Results are returned by all-to-all and summed in float32. It sends ``ep - 1`` rows a token
where all-to-all sends one to each rank that has an expert of the token: cheap while experts a token >= ep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.transports import fp8_rows
from moefx.transports.all_to_all import all_to_all, parts
from moefx.transports.base import Call, Dispatched, Shapes, Wait, accumulation_dtype
from moefx.transports.header import Header, make_header
from moefx.transports.row_layout import empty_rows, row_bytes, unpack


class AllGather:
    """The transport over ``torch.distributed.all_gather_into_tensor``."""

    packed = True

    def shapes(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        """See :meth:`moefx.transports.Transport.shapes`."""
        n, top_k = call.ep * call.capacity, topk_ids.shape[1]
        sent = row_bytes(*parts(x, top_k, topk_weights.dtype, call.dispatch_dtype)) // x.dtype.itemsize
        returned = row_bytes(*parts(x, top_k, topk_weights.dtype)[:2]) // x.dtype.itemsize
        return Shapes((n, sent), (0, top_k), (0,), (n, returned), (0, top_k))

    def dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, kept: Dispatched | None
    ) -> tuple[Dispatched, Wait]:
        """See :meth:`moefx.transports.Transport.dispatch`."""
        (tokens, top_k), n = topk_ids.shape, call.ep * call.capacity
        layout = parts(x, top_k, topk_weights.dtype, call.dispatch_dtype)
        payload = empty_rows(x, call.capacity, *layout)
        hidden, weights, experts = unpack(payload, *layout)
        x = fp8_rows.encode(x) if call.dispatch_dtype else x
        hidden[:tokens].copy_(x)
        weights[:tokens].copy_(topk_weights)
        experts[:tokens].copy_(topk_ids)
        experts[tokens:] = -1
        gathered, wait = self._gather(payload, call)
        sizes = [call.capacity] * call.ep
        header = Header(
            "all_gather",
            call.layer,
            call.capacity,
            tokens=tokens,
            top_k=top_k,
            received=n,
            permuted=n * min(top_k, call.local),
            sent=n,
            fp8=call.dispatch_dtype == "fp8",
            sends=sizes,
            receives=sizes,
        )
        packed = (
            topk_ids.new_empty(0, top_k, dtype=torch.int32),
            topk_weights.new_empty(0, top_k, dtype=accumulation_dtype(topk_weights.dtype)),
        )
        handle = torch.empty(0, dtype=torch.uint8, device=x.device)
        return Dispatched(gathered, *packed, handle, make_header(header, call.ep)), wait

    @staticmethod
    def _gather(rows: Tensor, call: Call) -> tuple[Tensor, Wait]:
        out = rows.new_empty(call.ep * rows.shape[0], rows.shape[1])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch < 2.13 lacks the first
        work = gather(out, rows, group=call.group, async_op=True)
        return out, (lambda: None) if work is None else work.wait

    def redispatch(self, x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        """See :meth:`moefx.transports.Transport.redispatch`."""
        mine = x.new_empty(Header.read(cpu_metadata).capacity, x.shape[1])
        mine[: x.shape[0]] = x
        return self._gather(mine, call)

    def return_rows(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        """See :meth:`moefx.transports.Transport.return_rows`."""
        header = Header.read(cpu_metadata)
        returned, wait = all_to_all(tokens.contiguous(), header.receives, header.sends, call)
        return returned, None if weights is None else weights.new_empty(0, header.top_k), wait

    def reduce(
        self, returned: Tensor, returned_weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`moefx.transports.Transport.reduce`."""
        header = Header.read(cpu_metadata)

        def total(x: Tensor) -> Tensor:
            each = x.view(call.ep, header.capacity, -1)[:, : header.tokens]
            return each.sum(0, dtype=accumulation_dtype(x.dtype)).to(x.dtype)

        if returned_weights is None:
            return total(returned), None
        values, weights = unpack(returned, (hidden, returned.dtype), (header.top_k, returned_weights.dtype))
        return total(values.contiguous()), total(weights.contiguous())


TRANSPORT = AllGather()
