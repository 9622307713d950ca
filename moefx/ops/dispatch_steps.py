"""The two halves of dispatch and of its backward: one starts to move rows, the other waits for them.

Forward: ``dispatch_start``, then ``dispatch_wait``. Backward: ``return_start`` (of ``dispatch_wait``), then ``return_wait`` (of
``dispatch_start``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moefx import transports
from moefx.errors import MoefxError
from moefx.ops import exchange
from moefx.ops.custom_op import opaque
from moefx.ops.exchange import grad_placeholder
from moefx.transports import Call, Header, accumulation_dtype, fp8_rows, permute, process_group


def _call(num_experts: int, group: str, capacity: int, dispatch_dtype: str, transport: str) -> tuple[Call, Any]:
    """The arguments of the move, and the transport."""
    call = Call(process_group(group), num_experts, capacity, exchange.current_layer(), dispatch_dtype)
    return call, transports.find(transport or transports.default_transport(call))


# --- forward ---------------------------------------------------------------------------------------------------------


@opaque("dispatch_start")
def _dispatch_start(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    group: str,
    capacity: int = 0,
    dispatch_dtype: str = "",
    transport: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Starts to send x [T, H] and topk_weights [T, K] to the ranks of the experts topk_ids [T, K]; e is on rank e // (E / ep).

    Returns what :class:`moefx.transports.Dispatched` lists, and the gradient placeholders of rows and weights. ``group`` is the
    name of the ep process group, all ranks of which call. ``transport``: one of ``transports.NAMES``, by default
    ``transports.default_transport``.
    """
    if x.shape[0] > capacity > 0:
        raise MoefxError(
            f"{x.shape[0]} tokens of this rank are to be dispatched at once, but dispatch_capacity={capacity}: pass the most "
            "tokens that a rank ever has as dispatch_capacity"
        )
    call, mover = _call(num_experts, group, capacity, dispatch_dtype, transport)
    record = exchange.current_record()
    kept = record.take() if record else None
    with exchange.counts_awaited(x, call):
        sent, wait = mover.dispatch(x, topk_ids, topk_weights, call, kept)
    if record and kept is None:
        i, finish = record.taken - 1, wait

        def wait() -> None:
            finish()
            record.record(i, sent)

    exchange.start(sent.tokens, wait, "dispatch", sent.cpu_metadata, call.group)
    header = Header.read(sent.cpu_metadata)
    known = {"received": header.received, "sent": header.sent, "handle": sent.handle.shape[0]}
    shapes = mover.shapes(x, topk_ids, topk_weights, call, known.__getitem__)
    weights_dtype = accumulation_dtype(topk_weights.dtype)
    placeholders = grad_placeholder(shapes.returned, x), grad_placeholder(shapes.returned_weights, x, weights_dtype)
    return *sent, *placeholders


@_dispatch_start.register_fake
def _(
    x, topk_ids, topk_weights, *, num_experts: int, group: str, capacity: int = 0, dispatch_dtype: str = "", transport: str = ""
):
    call, mover = _call(num_experts, group, capacity, dispatch_dtype, transport)
    ctx = torch.library.get_ctx()
    shapes = mover.shapes(x, topk_ids, topk_weights, call, lambda _: ctx.new_dynamic_size())
    weights_dtype = accumulation_dtype(topk_weights.dtype)
    return (
        x.new_empty(shapes.tokens),
        topk_ids.new_empty(shapes.topk_ids, dtype=torch.int32),
        topk_weights.new_empty(shapes.topk_ids, dtype=weights_dtype),
        x.new_empty(shapes.handle, dtype=torch.uint8),
        torch.empty(transports.header_size(call.ep, shapes.own), dtype=torch.int64, device="cpu"),
        grad_placeholder(shapes.returned, x),
        grad_placeholder(shapes.returned_weights, x, weights_dtype),
    )


@opaque("dispatch_wait")
def _dispatch_wait(
    x: Tensor,
    tokens: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    handle: Tensor,
    cpu_metadata: Tensor,
    grad_placeholder: Tensor,
    grad_placeholder_weights: Tensor,
    *,
    num_experts: int,
    group: str,
    capacity: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Waits for the tokens that ``dispatch_start(x, ...)`` sends and sorts them by expert.

    Returns permuted_tokens, permuted_probs, tokens_per_expert, row_id_map and a gradient placeholder, see
    :func:`moefx.ops.dispatch_combine.dispatch`. x is an input so that it is not overwritten while it is sent. The placeholder
    has the shape of ``grad_placeholder``: combine must not get that one itself. An operation that reads a placeholder adds a
    gradient to that of the start, and a compiler adds it in place, to numbers that are still arriving.
    """
    exchange.wait(tokens)
    header = Header.read(cpu_metadata)
    hidden, top_k, local, first = x.shape[1], topk_ids.shape[1], num_experts // process_group(group).size(), 0
    if tokens.shape[0] and not topk_ids.shape[0]:  # a row holds its experts and weights too
        size = fp8_rows.width(hidden, x.dtype) if header.fp8 else hidden
        layout = (size, x.dtype), (top_k, topk_weights.dtype), (top_k, torch.int32)
        _, topk_weights, topk_ids = transports.unpack(tokens, *layout)
        first = 0 if not capacity else process_group(group).rank() * local  # all-gathered as the router chose them
    tokens_per_expert, row_id_map = permute.sort_by_expert(topk_ids, first, local)
    received = permute.received_tokens(tokens, hidden, cpu_metadata)
    permuted_tokens, permuted_probs = permute.permute(received, row_id_map, header.permuted, topk_weights)
    placeholder = exchange.grad_placeholder((grad_placeholder.shape[0], hidden), x)
    return permuted_tokens, permuted_probs, tokens_per_expert, row_id_map, placeholder


@_dispatch_wait.register_fake
def _(
    x, tokens, topk_ids, topk_weights, handle, cpu_metadata, grad_placeholder, grad_placeholder_weights, *,
    num_experts: int, group: str, capacity: int = 0,
):  # fmt: skip
    local = num_experts // process_group(group).size()
    if capacity:
        rows = process_group(group).size() * capacity * min(grad_placeholder_weights.shape[1], local)
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    tokens_per_expert = x.new_empty(local, dtype=torch.int64)
    row_id_map = x.new_empty(tokens.shape[0], topk_ids.shape[1], dtype=torch.int32)
    placeholder = exchange.grad_placeholder((grad_placeholder.shape[0], x.shape[1]), x)
    return x.new_empty(rows, x.shape[1]), topk_weights.new_empty(rows), tokens_per_expert, row_id_map, placeholder


# --- backward --------------------------------------------------------------------------------------------------------


@opaque("return_start", once=True)
def return_start(
    grad_tokens: Tensor,
    grad_probs: Tensor,
    row_id_map: Tensor,
    handle: Tensor,
    cpu_metadata: Tensor,
    grad_placeholder: Tensor,
    grad_placeholder_weights: Tensor,
    group: str,
) -> tuple[Tensor, Tensor]:
    """The backward of ``dispatch_wait``: sums each token's rows on this rank and starts to return them."""
    call, mover = Call(process_group(group), 0), transports.find(Header.read(cpu_metadata).transport)
    n, top_k = row_id_map.shape
    rows, tokens, weights = transports.allocate_buffers(mover, grad_tokens, n, top_k, grad_probs.dtype)
    permute.unpermute(grad_tokens, row_id_map, out=tokens, gather=permute.Gather(grad_probs, row_id_map, weights))
    returned, returned_weights, wait = mover.return_rows(rows, weights, handle, cpu_metadata, call)
    assert returned_weights is not None
    exchange.start(returned, wait, "dispatch's backward", cpu_metadata, call.group)
    return returned, returned_weights


@return_start.register_fake
def _(grad_tokens, grad_probs, row_id_map, handle, cpu_metadata, grad_placeholder, grad_placeholder_weights, group: str):
    return tuple(t.new_empty(t.shape) for t in (grad_placeholder, grad_placeholder_weights))


@opaque("return_wait", once=True)
def return_wait(
    returned: Tensor,
    returned_weights: Tensor,
    topk_ids: Tensor,
    handle: Tensor,
    cpu_metadata: Tensor,
    hidden: int,
    dtype: torch.dtype,
    group: str,
) -> tuple[Tensor, Tensor]:
    """The backward of ``dispatch_start``: gradients of x [T, H], summed over the ranks that had a token, and weights [T, K]."""
    exchange.wait(returned)
    mover = transports.find(Header.read(cpu_metadata).transport)
    call = Call(process_group(group), 0)
    grad_x, grad_weights = mover.reduce(returned, returned_weights, handle, cpu_metadata, call, hidden)
    assert grad_weights is not None
    return grad_x, grad_weights.to(dtype)


@return_wait.register_fake
def _(returned, returned_weights, topk_ids, handle, cpu_metadata, hidden: int, dtype: torch.dtype, group: str):
    return returned.new_empty(topk_ids.shape[0], hidden), returned.new_empty(topk_ids.shape, dtype=dtype)


# Without materialized gradients: autograd would write zeros for each result that has none, as large as the rows. Where a
# gradient could be needed and is missing, zeros are sent: the other ranks wait for them.


def _or_zeros(grad: Tensor | None, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=like.device) if grad is None else grad.contiguous()


def _save_dispatch_start(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    x, topk_ids, topk_weights = inputs
    ctx.group, ctx.hidden, ctx.dtype = keyword_only_inputs["group"], x.shape[1], topk_weights.dtype
    ctx.save_for_backward(topk_ids, output[3], output[4])
    ctx.mark_non_differentiable(*output[:5])


def _backward_dispatch_start(ctx, *grads):
    topk_ids, handle, cpu_metadata = ctx.saved_tensors
    if grads[5] is None:  # nothing was returned
        return None, None, None
    args = (*grads[5:], topk_ids, handle, cpu_metadata, ctx.hidden, ctx.dtype, ctx.group)
    grad_x, grad_weights = torch.ops.moefx.return_wait(*args)
    return grad_x, None, grad_weights


def _save_dispatch_wait(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    *_, handle, cpu_metadata, placeholder, placeholder_weights = inputs
    ctx.group, ctx.shapes = keyword_only_inputs["group"], (output[0].shape, output[1].shape)
    ctx.dtypes = output[0].dtype, output[1].dtype
    ctx.save_for_backward(output[3], handle, cpu_metadata, placeholder, placeholder_weights)
    ctx.mark_non_differentiable(*output[2:])


def _backward_dispatch_wait(ctx, grad_tokens: Tensor | None, grad_probs: Tensor | None, *_):
    row_id_map, *saved = ctx.saved_tensors
    grads = (_or_zeros(g, s, d, row_id_map) for g, s, d in zip((grad_tokens, grad_probs), ctx.shapes, ctx.dtypes))
    to_placeholders = torch.ops.moefx.return_start(*grads, row_id_map, *saved, ctx.group)
    return None, None, None, None, None, None, *to_placeholders


_dispatch_start.register_autograd(_backward_dispatch_start, setup_context=_save_dispatch_start)
_dispatch_wait.register_autograd(_backward_dispatch_wait, setup_context=_save_dispatch_wait)
dispatch_start = torch.ops.moefx.dispatch_start.default
dispatch_wait = torch.ops.moefx.dispatch_wait.default
