"""DeepEP 2's ``ElasticBuffer``: NCCL's device API over NVLink and RDMA, any number of ranks, no host sync.

Experimental: it has not run on GPUs.

It needs the most tokens of a rank (``dispatch_capacity``), which all ranks must agree on. It serves what ``Buffer``
refuses, too: other numbers of ranks, a capacity between nodes. It compiles its kernels when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from moefx import transports
from moefx.backends import Backend, Kernel
from moefx.backends.deepep import library
from moefx.backends.deepep.backend import refuses_tensors
from moefx.backends.deepep.buffers import wait_for
from moefx.backends.deepep.handles import pack_tensors, unpack_tensors
from moefx.backends.deepep.payload import at_least_one, off_wire, on_wire, sent_copy
from moefx.internals import nccl
from moefx.ir.graph import arguments, value
from moefx.ops import dispatch_combine
from moefx.transports import Call, Dispatched, Host, Shapes, Wait, fp8_rows, make_host

#: Fields of DeepEP's EPHandle that are tensors (or None), and those that are numbers.
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


def _elastic(call: Call, hidden: int, top_k: int) -> Any:
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


class Elastic:
    """The transport over ``ElasticBuffer``."""

    packed = False

    def shapes(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        (tokens, hidden), top_k, n = x.shape, index.shape[1], call.ep * call.capacity
        return Shapes((n, hidden), (n, top_k), (size("handle"),), (tokens, hidden), (tokens, top_k))

    @staticmethod
    def _handle(handle: Tensor, host: Tensor) -> Any:
        own = Host.read(host).own
        numbers, tensors = own[: len(_NUMBERS)], unpack_tensors(handle, own[len(_NUMBERS) :])
        given = dict(zip(_NUMBERS, numbers)) | dict(zip(_TENSORS, tensors))
        return library.load().EPHandle(do_expand=False, num_recv_tokens_per_expert_list=[], **given)

    def send(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, kept: Dispatched | None) -> tuple[Dispatched, Wait]:
        if kept is not None:
            tokens, wait = self._again(x, kept.handle, kept.host, call)
            return Dispatched(tokens, *(t.clone() for t in kept[1:])), wait
        buffer = _elastic(call, x.shape[1], index.shape[1])
        many, top_k = index.shape
        x, index, weights = at_least_one(x, index, weights)
        payload = on_wire(x, call)
        got, experts, got_weights, handle, _ = buffer.dispatch(
            payload,
            topk_idx=index,
            topk_weights=weights,
            num_experts=call.num_experts,
            num_max_tokens_per_rank=call.capacity,
            expert_alignment=1,
            previous_event=buffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
            do_cpu_sync=False,
        )
        here, theirs = torch.cuda.current_stream(), buffer.get_comm_stream()
        with torch.cuda.stream(theirs):
            got = off_wire(got, x)
            # rows after the last were not written
            there = torch.arange(got.shape[0], device=got.device) < handle.psum_num_recv_tokens_per_scaleup_rank[-1]
            experts = torch.where(there.unsqueeze(1), experts, -1).int()
            got_weights = torch.where(there.unsqueeze(1), got_weights, 0)
            packed, own = pack_tensors([getattr(handle, n) for n in _TENSORS])
            done = theirs.record_event()
        for t in (got, experts, got_weights, packed):
            t.record_stream(here)
        facts = {
            transports.KIND: transports.NAMES.index("deepep_elastic"),
            transports.LAYER: call.layer,
            transports.CAPACITY: call.capacity,
            transports.TOKENS: many,
            transports.TOP_K: top_k,
            transports.RECEIVED: got.shape[0],
            transports.ROWS: got.shape[0] * min(top_k, call.local),
            transports.PAIRS: many,
        }
        own = [*(int(getattr(handle, n)) for n in _NUMBERS), *own]
        sent = Dispatched(got, experts, got_weights, packed, make_host(facts, call.ep, own=own))
        return sent, wait_for(done, x, payload, index, weights, handle)

    def resend(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        return self._again(x, handle, host, replace(call, wire=""))

    def _again(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        buffer, x = _elastic(self._sized(call, host), x.shape[1], Host.read(host).facts[transports.TOP_K]), sent_copy(x)
        payload = on_wire(x, call)
        got, *_, event = buffer.dispatch(
            payload,
            handle=self._handle(handle, host),
            previous_event=buffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        if not call.wire:
            return got, wait_for(event, x, handle, got)
        here, theirs = torch.cuda.current_stream(), buffer.get_comm_stream()
        with torch.cuda.stream(theirs):
            got = off_wire(got, x)
            done = theirs.record_event()
        got.record_stream(here)
        return got, wait_for(done, x, payload, handle)

    @staticmethod
    def _sized(call: Call, host: Tensor) -> Call:
        return Call(call.group, call.num_experts, Host.read(host).facts[transports.CAPACITY], call.layer)

    def bring_back(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, host: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        sizes = Host.read(host)
        buffer = _elastic(self._sized(call, host), tokens.shape[1], sizes.facts[transports.TOP_K])
        weights = None if weights is None else weights.contiguous()
        back, back_weights, event = buffer.combine(
            tokens.contiguous(),
            self._handle(handle, host),
            topk_weights=weights,
            previous_event=buffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        wait = wait_for(event, tokens, weights, handle, back)
        if not sizes.facts[transports.TOKENS]:
            back, back_weights = back[:0].clone(), None if back_weights is None else back_weights[:0].clone()
        return back, back_weights, wait

    def collect(
        self, back: Tensor, back_weights: Tensor | None, handle: Tensor, host: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        return back.clone(), None if back_weights is None else back_weights.clone()


TRANSPORT = Elastic()


def _refuses(node: fx.Node) -> str | None:
    problem, given = refuses_tensors(node), arguments(node)
    if problem is None and not given["capacity"]:
        return "ElasticBuffer must know the most tokens of a rank: pass dispatch_capacity to optimize"
    hidden = value(given["x"]).shape[1]
    if problem is None and given["wire"] and isinstance(hidden, int) and hidden % fp8_rows.BLOCK:
        return f"ElasticBuffer sends FP8 rows of whole {fp8_rows.BLOCK} numbers, the hidden size is {hidden}"
    return problem


BACKEND = Backend(
    "deepep_elastic",
    {
        dispatch_combine.dispatch: Kernel(
            dispatch_combine.dispatch_by("deepep_elastic"), _refuses, "DeepEP's ElasticBuffer, no host sync"
        )
    },
    available,
    by_name=True,
)
