"""DeepEP 2's ``ElasticBuffer``: NCCL's device API over NVLink and RDMA, any number of ranks, no host sync.

Experimental: it has not run on GPUs.

It needs the most tokens of a rank (``dispatch_capacity``), the same on all ranks. It also serves what ``Buffer`` refuses: other
numbers of ranks, a capacity between nodes. Its kernels are compiled when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from moefx.backends import Backend, Kernel
from moefx.backends.deepep import library
from moefx.backends.deepep.backend import refuses_tensors
from moefx.backends.deepep.buffers import decode_on_comm_stream, wait_for
from moefx.backends.deepep.handles import pack_tensors, unpack_tensors
from moefx.backends.deepep.payload import at_least_one, decode, encode, sent_copy
from moefx.internals import nccl
from moefx.ir.graph import arguments, value
from moefx.ops import dispatch_combine
from moefx.transports import Call, Dispatched, Header, Shapes, SummedInReturn, Wait, fp8_rows, make_header

#: Fields of DeepEP's EPHandle that are tensors (or None), and those that are integers.
_TENSORS = (
    "topk_idx", "psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert", "recv_src_metadata", "dst_buffer_slot_idx", "token_metadata_at_forward",
    "channel_linked_list",
)  # fmt: skip
_NUMBERS = ("num_experts", "expert_alignment", "num_max_tokens_per_rank", "num_sms", "num_recv_tokens", "num_expanded_tokens")


def available() -> str | None:
    """Why ``ElasticBuffer`` cannot be used here, and what to do; None if it can."""
    problem = library.available()
    if problem:
        return problem
    if not hasattr(library.load(), "ElasticBuffer"):
        return f"deep_ep {library.version()} has no ElasticBuffer, 2.0 and later have: {library.INSTALL}"
    if nccl.version() < (2, 30, 4):
        found = ".".join(map(str, nccl.version()))
        return f"ElasticBuffer needs NCCL 2.30.4 or later, this process has {found}: pip install -U nvidia-nccl-cu13 (or -cu12)"
    return None


@dataclass
class _Buffer:
    buffer: Any
    fits: tuple[int, int, int]  #: capacity, H, K


_buffers: dict[str, _Buffer] = {}


def _buffer_of(call: Call, hidden: int, top_k: int) -> Any:
    mine = _buffers.get(call.group.group_name)
    wanted = call.capacity, hidden, top_k
    if mine is None or any(a > b for a, b in zip(wanted, mine.fits)):
        if mine is not None:
            wanted = tuple(map(max, wanted, mine.fits))  # type: ignore[assignment]
            release(call.group.group_name)
        buffer = library.load().ElasticBuffer(
            call.group,
            num_max_tokens_per_rank=wanted[0],
            hidden=wanted[1],
            num_topk=wanted[2],
            deterministic=torch.are_deterministic_algorithms_enabled(),
            explicitly_destroy=True,
        )
        mine = _buffers[call.group.group_name] = _Buffer(buffer, wanted)
    return mine.buffer


def release(group: str | None = None) -> None:
    """Frees the buffer of a process group, or of all; collective over the group."""
    for name in [group] if group else list(_buffers):
        if name in _buffers:
            torch.cuda.synchronize()
            _buffers.pop(name).buffer.destroy()


class Elastic(SummedInReturn):
    """The transport over ``ElasticBuffer``."""

    def shapes(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        """See :meth:`moefx.transports.Transport.shapes`."""
        (tokens, hidden), top_k, n = x.shape, topk_ids.shape[1], call.ep * call.capacity
        return Shapes((n, hidden), (n, top_k), (size("handle"),), (tokens, hidden), (tokens, top_k))

    @staticmethod
    def _handle(handle: Tensor, cpu_metadata: Tensor) -> Any:
        own = Header.read(cpu_metadata).own
        numbers, tensors = own[: len(_NUMBERS)], unpack_tensors(handle, own[len(_NUMBERS) :])
        given = dict(zip(_NUMBERS, numbers)) | dict(zip(_TENSORS, tensors))
        return library.load().EPHandle(do_expand=False, num_recv_tokens_per_expert_list=[], **given)

    def dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, kept: Dispatched | None
    ) -> tuple[Dispatched, Wait]:
        """See :meth:`moefx.transports.Transport.dispatch`."""
        if kept is not None:
            tokens, wait = self._dispatch_again(x, kept.handle, kept.cpu_metadata, call)
            return Dispatched(tokens, *(t.clone() for t in kept[1:])), wait
        num_tokens, top_k = topk_ids.shape
        buffer = _buffer_of(call, x.shape[1], top_k)
        x, topk_ids, topk_weights = at_least_one(x, topk_ids, topk_weights)
        payload = encode(x, call)
        received, experts, weights, handle, _ = buffer.dispatch(
            payload,
            topk_idx=topk_ids,
            topk_weights=topk_weights,
            num_experts=call.num_experts,
            num_max_tokens_per_rank=call.capacity,
            expert_alignment=1,
            previous_event=buffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
            do_cpu_sync=False,
        )
        current, comm = torch.cuda.current_stream(), buffer.get_comm_stream()
        with torch.cuda.stream(comm):
            received = decode(received, x)
            # rows after the last were not written
            written = torch.arange(received.shape[0], device=x.device) < handle.psum_num_recv_tokens_per_scaleup_rank[-1]
            experts = torch.where(written.unsqueeze(1), experts, -1).int()
            weights = torch.where(written.unsqueeze(1), weights, 0)
            packed, own = pack_tensors([getattr(handle, n) for n in _TENSORS])
            done = comm.record_event()
        for t in (received, experts, weights, packed):
            t.record_stream(current)
        header = Header(
            "deepep_elastic",
            call.layer,
            call.capacity,
            tokens=num_tokens,
            top_k=top_k,
            received=received.shape[0],
            permuted=received.shape[0] * min(top_k, call.local),
            sent=num_tokens,
            own=[*(int(getattr(handle, n)) for n in _NUMBERS), *own],
        )
        sent = Dispatched(received, experts, weights, packed, make_header(header, call.ep))
        return sent, wait_for(done, x, payload, topk_ids, topk_weights, handle)

    def redispatch(self, x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        """See :meth:`moefx.transports.Transport.redispatch`."""
        return self._dispatch_again(x, handle, cpu_metadata, replace(call, dispatch_dtype=""))

    def _dispatch_again(self, x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        header, x = Header.read(cpu_metadata), sent_copy(x)
        buffer, payload = _buffer_of(replace(call, capacity=header.capacity), x.shape[1], header.top_k), encode(x, call)
        received, *_, event = buffer.dispatch(
            payload,
            handle=self._handle(handle, cpu_metadata),
            previous_event=buffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        if not call.dispatch_dtype:
            return received, wait_for(event, x, handle, received)
        received, done = decode_on_comm_stream(buffer, received, x)
        return received, wait_for(done, x, payload, handle)

    def return_rows(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        """See :meth:`moefx.transports.Transport.return_rows`."""
        header = Header.read(cpu_metadata)
        buffer = _buffer_of(replace(call, capacity=header.capacity), tokens.shape[1], header.top_k)
        weights = None if weights is None else weights.contiguous()
        returned, returned_weights, event = buffer.combine(
            tokens.contiguous(),
            self._handle(handle, cpu_metadata),
            topk_weights=weights,
            previous_event=buffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        wait = wait_for(event, tokens, weights, handle, returned)
        return *self.own_rows(returned, returned_weights, header.tokens), wait


TRANSPORT = Elastic()


def _refuses(node: fx.Node) -> str | None:
    problem, given = refuses_tensors(node), arguments(node)
    if problem is None and not given["capacity"]:
        return "ElasticBuffer needs the most tokens of a rank: pass dispatch_capacity to optimize"
    hidden = value(given["x"]).shape[1]
    if problem is None and given["dispatch_dtype"] and isinstance(hidden, int) and hidden % fp8_rows.BLOCK:
        return f"ElasticBuffer sends FP8 rows of multiples of {fp8_rows.BLOCK} elements, the hidden size is {hidden}"
    return problem


BACKEND = Backend(
    "deepep_elastic",
    {
        dispatch_combine.dispatch: Kernel(
            dispatch_combine.dispatch_with("deepep_elastic"), _refuses, "DeepEP's ElasticBuffer, no host sync"
        )
    },
    available,
    opt_in=True,
)
