"""The two halves of combine and of its backward: one starts to move rows, the other waits for them.

Forward: ``combine_start``, then ``combine_wait``. Backward: ``redispatch_start`` (of ``combine_wait``), then
``redispatch_wait`` (of ``combine_start``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx import transports
from moefx.ops import exchange
from moefx.ops.custom_op import opaque
from moefx.transports import Call, Header, permute, process_group


def _transport(cpu_metadata: Tensor) -> transports.Transport:
    return transports.find(Header.read(cpu_metadata).transport)


@opaque("combine_start")
def _combine_start(
    permuted_tokens: Tensor,
    topk_ids: Tensor,
    row_id_map: Tensor,
    handle: Tensor,
    cpu_metadata: Tensor,
    grad_placeholder: Tensor,
    *,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Sums each token's rows on this rank and starts to return them, see :func:`moefx.ops.dispatch_combine.combine`.

    Returns what is being written [S, H], and its own gradient placeholder [N, H].
    """
    call = Call(process_group(group), 0)
    tokens = permute.unpermute(permuted_tokens, row_id_map)
    returned, _, wait = _transport(cpu_metadata).return_rows(tokens, None, handle, cpu_metadata, call)
    exchange.start(returned, wait, "combine", cpu_metadata, call.group)
    return returned, exchange.grad_placeholder(tokens.shape, permuted_tokens)


@_combine_start.register_fake
def _(permuted_tokens, topk_ids, row_id_map, handle, cpu_metadata, grad_placeholder, *, group: str):
    hidden = permuted_tokens.shape[1]
    placeholder = exchange.grad_placeholder((row_id_map.shape[0], hidden), permuted_tokens)
    return permuted_tokens.new_empty(grad_placeholder.shape[0], hidden), placeholder


@opaque("combine_wait")
def _combine_wait(
    returned: Tensor, grad_placeholder: Tensor, topk_ids: Tensor, handle: Tensor, cpu_metadata: Tensor, *, group: str
) -> Tensor:
    """Waits for the rows of ``combine_start`` and sums those of each token: [T, H]."""
    exchange.wait(returned)
    call, hidden = Call(process_group(group), 0), grad_placeholder.shape[1]
    return _transport(cpu_metadata).reduce(returned, None, handle, cpu_metadata, call, hidden)[0]


@_combine_wait.register_fake
def _(returned, grad_placeholder, topk_ids, handle, cpu_metadata, *, group: str):
    return returned.new_empty(topk_ids.shape[0], grad_placeholder.shape[1])


@opaque("redispatch_start", once=True)
def redispatch_start(grad: Tensor, grad_placeholder: Tensor, handle: Tensor, cpu_metadata: Tensor, group: str) -> Tensor:
    """The backward of ``combine_wait``: starts to send the gradient [T, H] to the ranks that had the tokens."""
    call = Call(process_group(group), 0)
    tokens, wait = _transport(cpu_metadata).redispatch(grad, handle, cpu_metadata, call)
    exchange.start(tokens, wait, "combine's backward", cpu_metadata, call.group)
    return tokens


@redispatch_start.register_fake
def _(grad, grad_placeholder, handle, cpu_metadata, group: str):
    return grad_placeholder.new_empty(grad_placeholder.shape)


@opaque("redispatch_wait", once=True)
def redispatch_wait(grad: Tensor, row_id_map: Tensor, cpu_metadata: Tensor, rows: int) -> Tensor:
    """The backward of ``combine_start``: each row's gradient is its token's; [R, H] of R = ``rows``, from [N, H]."""
    exchange.wait(grad)
    return permute.permute(grad, row_id_map, rows)[0]


@redispatch_wait.register_fake
def _(grad, row_id_map, cpu_metadata, rows: int):
    return grad.new_empty(rows, grad.shape[1])


def _save_combine_start(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    permuted_tokens, _, row_id_map, _, cpu_metadata, _ = inputs
    ctx.rows = permuted_tokens.shape[0]
    ctx.save_for_backward(row_id_map, cpu_metadata)
    ctx.mark_non_differentiable(output[0])


def _backward_combine_start(ctx, _, grad: Tensor | None):
    if grad is None:  # nothing was sent
        return (None,) * 6
    return torch.ops.moefx.redispatch_wait(grad, *ctx.saved_tensors, ctx.rows), None, None, None, None, None


def _save_combine_wait(ctx, inputs, keyword_only_inputs, output) -> None:
    _, placeholder, _, handle, cpu_metadata = inputs
    ctx.group = keyword_only_inputs["group"]
    ctx.save_for_backward(placeholder, handle, cpu_metadata)


def _backward_combine_wait(ctx, grad: Tensor):
    tokens = torch.ops.moefx.redispatch_start(grad.contiguous(), *ctx.saved_tensors, ctx.group)
    return None, tokens, None, None, None


_combine_start.register_autograd(_backward_combine_start, setup_context=_save_combine_start)
_combine_wait.register_autograd(_backward_combine_wait, setup_context=_save_combine_wait)
combine_start = torch.ops.moefx.combine_start.default
combine_wait = torch.ops.moefx.combine_wait.default
