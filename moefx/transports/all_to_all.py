"""All-to-all: counts first (the only time that the host waits), then the rows, each with its experts and weights, in one piece.

Any device, dtype and backend of torch.distributed (NCCL, gloo).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.transports import fp8_rows, permute
from moefx.transports.base import Call, Dispatched, Shapes, Wait, accumulation_dtype
from moefx.transports.header import Header, make_header
from moefx.transports.row_layout import empty_rows, row_bytes, unpack


def parts(x: Tensor, top_k: int, dtype: torch.dtype, dispatch_dtype: str = "") -> list[tuple[int, torch.dtype]]:
    """The parts of a row: hidden state, weights, experts. Returned rows have the first two, never encoded."""
    hidden = fp8_rows.width(x.shape[1], x.dtype) if dispatch_dtype else x.shape[1]
    return [(hidden, x.dtype), (top_k, accumulation_dtype(dtype)), (top_k, torch.int32)]


def all_to_all(rows: Tensor, sends: Sequence[int], receives: Sequence[int], call: Call) -> tuple[Tensor, Wait]:
    """Starts the exchange of ``rows``, ``sends[r]`` of them to rank r in order."""
    out = rows.new_empty(sum(receives), rows.shape[1])
    work = dist.all_to_all_single(out, rows, receives, sends, group=call.group, async_op=True)
    return out, (lambda: None) if work is None else work.wait


def _copy_to_host(numbers: Tensor) -> Callable[[], list]:
    """Starts to copy a few numbers to the host; the result waits for that copy only, not for what is launched after it."""
    if not numbers.is_cuda:
        return numbers.tolist
    copied = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copied.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list:
        event.synchronize()
        return copied.tolist()

    return read


class AllToAll:
    """The transport over ``torch.distributed.all_to_all_single``."""

    name = "all_to_all"
    packed = True

    def exchange_sizes(self, sizes: Tensor, call: Call) -> None:
        """sizes [2, ep, 2]: ``sizes[0, r]`` is sent to rank r, what rank r sent is written to ``sizes[1, r]``."""
        dist.all_to_all_single(sizes[1], sizes[0], group=call.group)

    def exchange(self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], call: Call) -> tuple[Tensor, Wait]:
        """Starts to send ``sends[r]`` of the rows to each rank r, in order."""
        return all_to_all(rows, sends, receives, call)

    def shapes(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        """See :meth:`moefx.transports.Transport.shapes`."""
        (tokens, top_k), item = topk_ids.shape, x.dtype.itemsize
        sent = row_bytes(*parts(x, top_k, topk_weights.dtype, call.dispatch_dtype)) // item
        returned = row_bytes(*parts(x, top_k, topk_weights.dtype)[:2]) // item
        return Shapes((size("received"), sent), (0, top_k), (8 * tokens * top_k,), (size("sent"), returned), (0, top_k), own=0)

    def dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, kept: Dispatched | None
    ) -> tuple[Dispatched, Wait]:
        """See :meth:`moefx.transports.Transport.dispatch`."""
        top_k, payload = topk_ids.shape[1], None
        x = fp8_rows.encode(x) if call.dispatch_dtype else x
        if kept is None:
            sizes, maps = permute.build_send_map(topk_ids, call.ep, call.local)
            self.exchange_sizes(sizes, call)
            read = _copy_to_host(sizes)
            if x.is_cuda:  # it runs while the host waits; so for the most rows that there can be
                most = x.shape[0] * min(top_k, call.ep)
                payload = self._payload(x, topk_ids, topk_weights, maps[1], most, call)
            handle, cpu_metadata = maps.view(-1).view(torch.uint8), self._header(read(), topk_ids, call)
        else:
            handle, cpu_metadata = kept.handle.clone(), kept.cpu_metadata.clone()
        header = Header.read(cpu_metadata)
        if payload is None:
            payload = self._payload(x, topk_ids, topk_weights, self._send_maps(handle, header)[1], header.sent, call)
        received, wait = self.exchange(payload[: header.sent], header.sends, header.receives, call)
        packed = (
            topk_ids.new_empty(0, top_k, dtype=torch.int32),
            topk_weights.new_empty(0, top_k, dtype=accumulation_dtype(topk_weights.dtype)),
        )
        return Dispatched(received, *packed, handle, cpu_metadata), wait

    @staticmethod
    def _payload(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, send_map: Tensor, rows: int, call: Call) -> Tensor:
        layout = parts(x, topk_ids.shape[1], topk_weights.dtype)
        payload = empty_rows(x, rows, *layout)
        permute.pack(x, topk_ids, topk_weights, send_map, call.local, permute.PackedRows(*unpack(payload, *layout)))
        return payload

    def _header(self, sizes: list, topk_ids: Tensor, call: Call) -> Tensor:
        (sends, _), (receives, permuted) = (list(zip(*part)) for part in sizes)
        header = Header(
            self.name,
            call.layer,
            tokens=topk_ids.shape[0],
            top_k=topk_ids.shape[1],
            received=sum(receives),
            permuted=sum(permuted),
            sent=sum(sends),
            fp8=call.dispatch_dtype == "fp8",
            sends=sends,
            receives=receives,
        )
        return make_header(header, call.ep, own_size=0)

    @staticmethod
    def _send_maps(handle: Tensor, header: Header) -> Tensor:
        """[2, T, K]: see :func:`moefx.transports.permute.build_send_map`."""
        return handle.view(torch.int32).view(2, header.tokens, header.top_k)

    def unpacked(self, sent: Dispatched, x: Tensor, dispatch_dtype: str) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [N, H] (encoded ones as received), topk_ids [N, K] and topk_weights [N, K] of a dispatch of x."""
        layout = parts(x, sent.topk_ids.shape[1], sent.topk_weights.dtype, dispatch_dtype)
        hidden, weights, experts = unpack(sent.tokens, *layout)
        return hidden, experts, weights

    def redispatch(self, x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        """See :meth:`moefx.transports.Transport.redispatch`."""
        header = Header.read(cpu_metadata)
        rows, _ = permute.permute(x, self._send_maps(handle, header)[1], header.sent)
        return self.exchange(rows, header.sends, header.receives, call)

    def return_rows(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        """See :meth:`moefx.transports.Transport.return_rows`."""
        header = Header.read(cpu_metadata)
        returned, wait = self.exchange(tokens.contiguous(), header.receives, header.sends, call)
        return returned, None if weights is None else weights.new_empty(0, header.top_k), wait

    def reduce(
        self, returned: Tensor, returned_weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`moefx.transports.Transport.reduce`."""
        row_id_map, send_map = self._send_maps(handle, Header.read(cpu_metadata))
        if returned_weights is None:
            return permute.unpermute(returned, send_map), None
        values, w = unpack(returned, (hidden, returned.dtype), (row_id_map.shape[1], returned_weights.dtype))
        to_weights = w.new_empty(row_id_map.shape)
        return permute.unpermute(values, send_map, gather=permute.Gather(w, row_id_map, to_weights)), to_weights


TRANSPORT = AllToAll()
