"""Dispatch and combine: tokens go to the ranks that own their experts, the results back. Operations with gradients.

    permuted_tokens, permuted_probs, tokens_per_expert, *route, received = dispatch(x, topk_ids, topk_weights)
    rows = grouped_mlp(permuted_tokens, tokens_per_expert, ..., permuted_probs)
    y = combine(rows, topk_ids, *route)

A token is sent once to each rank that has one of its experts, and one row is returned from each: the experts have weighted the
rows of a token on their rank, and these are summed there. So combine saves no rows for its backward: their gradients are the
tokens'. The moves are those of a transport (:mod:`moefx.transports`).

Each operation is two (:mod:`moefx.ops.dispatch_steps`, :mod:`moefx.ops.combine_steps`), so that others can run while rows are
in flight: one starts the move, the other waits for it. The first passes the second the tensor that is being written, and a
gradient placeholder: a tensor with the shape of what is sent in the backward, without elements of its own. Its gradient is the
tensor that the backward of the second operation starts to move and that of the first waits for. So what runs in between in the
forward has its backward in between in the backward. All these are opaque, since how many rows arrive depends on the data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefx import transports
from moefx.errors import MoefxError
from moefx.ops.combine_steps import combine_start, combine_wait
from moefx.ops.dispatch_steps import dispatch_start, dispatch_wait

__all__ = ["combine", "combine_start", "combine_wait", "dispatch", "dispatch_start", "dispatch_wait", "dispatch_with"]


def dispatch_with(transport: str) -> Callable:
    """``dispatch`` over this transport, with its signature; "": over the default one."""

    def dispatch(
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        num_experts: int,
        group: str,
        capacity: int = 0,
        dispatch_dtype: str = "",
    ):
        where = {"num_experts": num_experts, "group": group, "capacity": capacity}
        how = {"dispatch_dtype": dispatch_dtype, "transport": transport}
        *sent, placeholder, placeholder_weights = dispatch_start(x, topk_ids, topk_weights, **where, **how)
        *permuted, placeholder = dispatch_wait(x, *sent, placeholder, placeholder_weights, **where)
        return *permuted, sent[3], sent[4], placeholder, sent[0]

    dispatch.transport = transport  # type: ignore[attr-defined]
    return dispatch


def _dispatch(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    group: str,
    capacity: int = 0,
    dispatch_dtype: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sends x [T, H] and topk_weights [T, K] to the ranks of the experts topk_ids [T, K] (int64); e is on rank e // (E / ep).

    ``group`` is the name of the ep process group, all ranks of which call.

    Returns:
        permuted_tokens [R, H], by expert, within an expert by source rank, then token; permuted_probs [R], the router's weights
        of these rows in float32 (float64 for float64), differentiable, for ``grouped_mlp``; tokens_per_expert [E / ep] int64;
        then, for ``combine``: row_id_map [N, K] int32, the row of each (token, k) that this rank received, -1 for none; handle
        (bytes); cpu_metadata (on the CPU); grad_placeholder (S rows, without memory). Last the received tokens, which
        ``grouped_mlp`` may save for its backward instead of the rows.

    ``capacity``, the most tokens that a rank ever has: buffers have their worst-case size, no counts are exchanged, the host
    does not wait. R is then ``ep * capacity * min(K, E / ep)``; rows after the last of ``tokens_per_expert`` are undefined.

    ``dispatch_dtype`` = "fp8": tokens are quantized to be sent, and rows are what :mod:`moefx.transports.fp8_rows` makes of
    them, in the dtype of x. The gradient is that of an exact exchange (straight through), and is sent in the dtype of x, as are
    the rows that ``combine`` returns.
    """
    if dispatch_dtype not in transports.DISPATCH_DTYPES:
        known = ", ".join(map(repr, transports.DISPATCH_DTYPES))
        raise MoefxError(f"dispatch_dtype={dispatch_dtype!r} is not one of {known}")
    where = {"num_experts": num_experts, "group": group, "capacity": capacity}
    return dispatch_with("")(x, topk_ids, topk_weights, **where, dispatch_dtype=dispatch_dtype)


def _combine(
    permuted_tokens: Tensor,
    topk_ids: Tensor,
    row_id_map: Tensor,
    handle: Tensor,
    cpu_metadata: Tensor,
    grad_placeholder: Tensor,
    *,
    num_experts: int,
    group: str,
) -> Tensor:
    """Returns the experts' rows [R, H] to their tokens and sums them: ``y[t] = sum_k row(t, k)``; [T, H] in the rows' dtype.

    The experts have weighted the rows (``grouped_mlp``). topk_ids [T, K] is the input of ``dispatch``, all else its outputs.
    Each rank sums its rows of a token in float32 (float64 for float64) and rounds once to the rows' dtype, to send it; the
    token's rank sums those of the ranks in float32 and rounds once. In 16 bits that is one rounding more than a sum in one
    place, so ``|y - exact| <= u * (sum over ranks |part|) + u * |y|`` with u = 2**-8 (bfloat16); in float32 it is float32's
    rounding of a sum in another order. The backward saves where each row went, and no row. Rows that ``row_id_map`` does not
    name (a capacity leaves such) are undefined, and so are their gradients.
    """
    args = permuted_tokens, topk_ids, row_id_map, handle, cpu_metadata, grad_placeholder
    returned, placeholder = combine_start(*args, group=group)
    return combine_wait(returned, placeholder, topk_ids, handle, cpu_metadata, group=group)


_LIBRARY = torch.library.Library("moefx", "FRAGMENT")
_LIBRARY.define(
    "dispatch(Tensor x, Tensor topk_ids, Tensor topk_weights, *, int num_experts, str group, int capacity=0, "
    "str dispatch_dtype='') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "combine(Tensor permuted_tokens, Tensor topk_ids, Tensor row_id_map, Tensor handle, Tensor cpu_metadata, "
    "Tensor grad_placeholder, *, int num_experts, str group) -> Tensor"
)
_LIBRARY.impl("dispatch", _dispatch, "CompositeImplicitAutograd")
_LIBRARY.impl("combine", _combine, "CompositeImplicitAutograd")
#: See :func:`_dispatch`.
dispatch = torch.ops.moefx.dispatch.default
#: See :func:`_combine`.
combine = torch.ops.moefx.combine.default
