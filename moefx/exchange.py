"""Dispatch and combine: rows travel to the ranks that own their experts, and back.

Opaque operations, since how many rows arrive only the data knows. The backward of dispatch is a combine with unit weights,
the backward of combine a dispatch: all is built from two moves of rows, ``_send`` and ``_return``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def _group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class _Handle:
    """What combine and the backwards need, packed into one int64 tensor.

    ``order`` [T*K]: the flattened (token, k) positions, sorted by expert; ``arrival`` [R]: where the rows stand on arrival
    (by source rank, then expert) in the order of the local experts; ``send``, ``receive`` [ep]: rows per rank.
    """

    def __init__(self, order: Tensor, arrival: Tensor, send: list[int], receive: list[int]):
        self.order, self.arrival, self.send, self.receive = order, arrival, send, receive

    def pack(self) -> Tensor:
        counts = torch.tensor([*self.send, *self.receive], dtype=torch.int64).to(self.order.device)
        return torch.cat((counts, self.order, self.arrival))

    @staticmethod
    def unpack(packed: Tensor, ep: int) -> _Handle:
        counts = packed[: 2 * ep].tolist()
        send, receive = counts[:ep], counts[ep:]
        sent = sum(send)
        return _Handle(packed[2 * ep : 2 * ep + sent], packed[2 * ep + sent :], send, receive)


@dataclass(eq=False)
class Dispatches:
    """The handles and counts of a block's dispatches, in order, kept in one forward for another on the same tokens."""

    made: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    complete: bool = False  #: the next forward takes them instead of agreeing on them with the other ranks again
    taken: int = 0


_dispatches: ContextVar[Dispatches | None] = ContextVar("moefx_dispatches", default=None)


@contextmanager
def sharing(dispatches: Dispatches) -> Iterator[None]:
    """Within: dispatches leave their handles in ``dispatches``, or take them from there once it is complete."""
    token = _dispatches.set(dispatches)
    dispatches.taken = 0
    try:
        yield
        dispatches.complete = True
    finally:
        _dispatches.reset(token)


def _send(rows: Tensor, handle: _Handle, group: dist.ProcessGroup) -> Tensor:
    """Rows [T*K, H] in (token, k) order -> [R, H] by local expert."""
    arrived = _all_to_all(rows[handle.order], handle.send, handle.receive, group)
    return arrived[handle.arrival]


def _return(rows: Tensor, handle: _Handle, group: dist.ProcessGroup) -> Tensor:
    """The reverse of ``_send``: [R, H] by local expert -> [T*K, H] in (token, k) order."""
    by_source = torch.empty_like(rows)
    by_source[handle.arrival] = rows
    back = _all_to_all(by_source, handle.receive, handle.send, group)
    out = torch.empty_like(back)
    out[handle.order] = back
    return out


@torch.library.custom_op("moefx::dispatch", mutates_args=())
def _dispatch(x: Tensor, index: Tensor, *, num_experts: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sends each row of x [T, H] to the ranks that own the experts index [T, K]; expert e lives on rank e // (E / ep).

    Returns rows [R, H], local expert by local expert, counts [E / ep] int64, and a handle (1-D int64) for combine. Within
    an expert, rows stand by source rank, then token. ``group`` is the name of the ep process group; all its ranks call.
    """
    process_group = _group(group)
    ep, top_k = process_group.size(), index.shape[1]
    shared = _dispatches.get()
    if shared is not None and shared.complete:
        packed, counts = shared.made[shared.taken]
        shared.taken += 1
        handle = _Handle.unpack(packed, ep)
        arrived = _all_to_all(x[handle.order // top_k], handle.send, handle.receive, process_group)
        return arrived[handle.arrival], counts.clone(), packed.clone()
    local = num_experts // ep
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    per_expert = torch.bincount(flat, minlength=num_experts)
    arriving = torch.empty_like(per_expert)
    dist.all_to_all_single(arriving, per_expert, group=process_group)  # [ep source ranks, local experts]
    send, receive = torch.stack((per_expert.view(ep, local).sum(1), arriving.view(ep, local).sum(1))).tolist()
    expert = torch.arange(local, device=x.device).repeat(ep)
    arrival = torch.argsort(torch.repeat_interleave(expert, arriving, output_size=sum(receive)), stable=True)
    handle = _Handle(order, arrival, send, receive)
    arrived = _all_to_all(x[order // top_k], send, receive, process_group)
    counts, packed = arriving.view(ep, local).sum(0), handle.pack()
    if shared is not None:
        shared.made.append((packed.clone(), counts.clone()))
    return arrived[arrival], counts, packed


@_dispatch.register_fake
def _(x: Tensor, index: Tensor, *, num_experts: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    ep = _group(group).size()
    received = torch.library.get_ctx().new_dynamic_size()
    handle = x.new_empty(2 * ep + index.shape[0] * index.shape[1] + received, dtype=torch.int64)
    return x.new_empty(received, x.shape[1]), x.new_empty(num_experts // ep, dtype=torch.int64), handle


@torch.library.custom_op("moefx::return_rows", mutates_args=())
def return_rows(rows: Tensor, handle: Tensor, tokens: int, group: str) -> Tensor:
    """Rows [R, H] as dispatch gave them -> [T*K, H] on the ranks that sent them; ``tokens`` is T*K."""
    process_group = _group(group)
    return _return(rows, _Handle.unpack(handle, process_group.size()), process_group)


@return_rows.register_fake
def _(rows: Tensor, handle: Tensor, tokens: int, group: str) -> Tensor:
    return rows.new_empty(tokens, rows.shape[1])


@torch.library.custom_op("moefx::send_rows", mutates_args=())
def send_rows(rows: Tensor, handle: Tensor, like: Tensor, group: str) -> Tensor:
    """The reverse of ``return_rows``: rows [T*K, H] -> [R, H], R being the rows of ``like``."""
    process_group = _group(group)
    return _send(rows, _Handle.unpack(handle, process_group.size()), process_group)


@send_rows.register_fake
def _(rows: Tensor, handle: Tensor, like: Tensor, group: str) -> Tensor:
    return rows.new_empty(like.shape[0], rows.shape[1])


def _save_dispatch(ctx, inputs, keyword_only_inputs, output) -> None:
    x, index = inputs
    ctx.group, ctx.top_k, ctx.tokens = keyword_only_inputs["group"], index.shape[1], index.shape[0] * index.shape[1]
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward_dispatch(ctx, grad_rows: Tensor, _counts, _handle):
    (handle,) = ctx.saved_tensors
    back = torch.ops.moefx.return_rows(grad_rows.contiguous(), handle, ctx.tokens, ctx.group)
    return back.view(-1, ctx.top_k, back.shape[1]).sum(dim=1), None


_dispatch.register_autograd(_backward_dispatch, setup_context=_save_dispatch)
#: See :func:`_dispatch`.
dispatch = torch.ops.moefx.dispatch.default


def _save_return(ctx, inputs, output) -> None:
    rows, handle, _, ctx.group = inputs
    ctx.save_for_backward(rows.new_empty(()).expand(rows.shape[0]), handle)


def _backward_return(ctx, grad: Tensor):
    like, handle = ctx.saved_tensors
    return torch.ops.moefx.send_rows(grad.contiguous(), handle, like, ctx.group), None, None, None


return_rows.register_autograd(_backward_return, setup_context=_save_return)


def _combine(rows: Tensor, weights: Tensor, handle: Tensor, *, num_experts: int, group: str) -> Tensor:
    """Brings rows [R, H] back and adds them up: ``y[t] = sum_k weights[t, k] * row(t, k)``; [T, H] in the rows' dtype.

    The product is taken in the promoted dtype of rows and weights on the rank that owns the token, so that nothing is
    rounded twice; its gradients (of rows and of weights) are plain autograd around ``return_rows``.
    """
    tokens, top_k = weights.shape
    back = torch.ops.moefx.return_rows(rows, handle, tokens * top_k, group)
    return (back.view(tokens, top_k, back.shape[1]) * weights.unsqueeze(-1)).sum(dim=1).to(rows.dtype)


_LIBRARY = torch.library.Library("moefx", "FRAGMENT")
_LIBRARY.define("combine(Tensor rows, Tensor weights, Tensor handle, *, int num_experts, str group) -> Tensor")
_LIBRARY.impl("combine", _combine, "CompositeImplicitAutograd")
#: See :func:`_combine`.
combine = torch.ops.moefx.combine.default
