"""Dispatch and combine: tokens travel to the ranks that own their experts, their results back. Operations with gradients.

    rows, row_weights, counts, *way, tokens = dispatch(x, index, weights)
    y = combine(grouped_mlp(rows, counts, ..., row_weights=row_weights), index, *way)

A token goes once to each rank that has one of its experts, and one row comes back from each: the experts' rows of a token on
a rank, which the experts have weighted, are added there. So combine keeps no rows for its backward: their gradients are the
tokens'. The moves are those of a :mod:`moefx.transports`.

Each operation is two, so that others can run while rows are under way: one that starts the move, and one that waits for it.
Between them goes the tensor that is being written, and a ``link``: a tensor of the shape of what travels in the backward,
without numbers of its own. Its gradient is the tensor that the backward of the second operation started to move and that of
the first waits for. So what runs in between in the forward has its backward in between in the backward.
All these are opaque, since how many rows arrive only the data knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from moefx import transports
from moefx.errors import ExchangeError, MoefxError
from moefx.ops.custom_op import opaque
from moefx.transports import LAYER, RECEIVED, ROWS, TOKENS, Call, Dispatched, Host, fp8_rows, wide
from moefx.transports import permute as rows_
from moefx.transports.hang_monitor import WATCH


def _group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


def _call(group: str, num_experts: int, capacity: int = 0, layer: int = 0, wire: str = "") -> Call:
    return Call(_group(group), num_experts, capacity, layer, wire)


# --- the same dispatch twice -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Dispatches:
    """What a block's dispatches agreed on, in order, kept in one forward for another on the same tokens."""

    made: list[Dispatched] = field(default_factory=list)  #: without the rows
    complete: bool = False  #: the next forward takes them instead of agreeing on them with the other ranks again
    taken: int = 0

    def take(self) -> Dispatched | None:
        self.taken += 1
        return self.made[self.taken - 1] if self.complete else None

    def keep(self, at: int, made: Dispatched) -> None:
        """``made`` has arrived: of the ``at``-th dispatch."""
        self.made += [made] * (at + 1 - len(self.made))
        self.made[at] = Dispatched(made.tokens[:0], *(t.clone() for t in made[1:]))


_dispatches: ContextVar[Dispatches | None] = ContextVar("moefx_dispatches", default=None)


@contextmanager
def sharing(dispatches: Dispatches) -> Iterator[None]:
    """Within: dispatches leave what they agreed on in ``dispatches``, or take it from there once it is complete."""
    token = _dispatches.set(dispatches)
    dispatches.taken = 0
    try:
        yield
        dispatches.complete = True
    finally:
        _dispatches.reset(token)


# --- which layer this is, for messages -------------------------------------------------------------------------------

_layers: list[str] = [""]
_layer: ContextVar[int] = ContextVar("moefx_layer", default=0)


@contextmanager
def layer(name: str) -> Iterator[None]:
    """Within: errors of dispatches, and of what belongs to them in the backward, name this layer."""
    if name not in _layers:
        _layers.append(name)
    token = _layer.set(_layers.index(name))
    try:
        yield
    finally:
        _layer.reset(token)


# --- what is under way -----------------------------------------------------------------------------------------------

#: By the address of the tensor that is being written: how to wait for it. As torch's functional collectives do.
_under_way: dict[int, Callable[[], Any]] = {}


def _timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    try:
        return group._get_backend(device).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return dist.constants.default_pg_timeout.total_seconds()


def _started(written: Tensor, wait: Callable[[], Any], what: str, host: Tensor, group: dist.ProcessGroup) -> None:
    def arrive() -> None:
        try:
            wait()
        except RuntimeError as error:
            raise ExchangeError(_lost(what, Host.read(host), group, error)) from error
        if written.is_cuda and not torch.cuda.is_current_stream_capturing():  # an event of a graph says nothing of a replay
            event = torch.cuda.Event()
            event.record()
            WATCH.device(lambda: _lost(what, Host.read(host), group), _timeout(group, written.device), event)

    if written.numel():
        _under_way[written.data_ptr()] = arrive
    else:
        arrive()  # empty tensors have no address; the others' rows must be sent all the same


def _arrive(written: Tensor) -> None:
    """Returns when ``written`` may be read (on the current stream)."""
    if written.numel():
        wait = _under_way.pop(written.data_ptr(), None)
        if wait is None:
            raise MoefxError(
                "rows of an exchange were moved in memory before they were waited for (a bug of moefx or of the compiler "
                "backend): report it, and meanwhile use a pipeline without the pass 'overlap'"
            )
        wait()


def _lost(what: str, sizes: Host, group: dist.ProcessGroup, error: Exception | None = None) -> str:
    """A sentence on an exchange that does not end."""
    where = f" of {_layers[sizes.facts[LAYER]]}" if sizes.facts[LAYER] else ""
    each = ", ".join(f"rank {r} {s}/{n}" for r, (s, n) in enumerate(zip(sizes.send, sizes.receive)))
    return (
        f"{what}{where} did not end on rank {group.rank()} of {group.size()}, which has {sizes.facts[TOKENS]} tokens and "
        + (f"sends/receives: {each}" if any(sizes.send) else "has not heard how many the others send")
        + (f" ({str(error).splitlines()[0]})" if error else "")
        + ". A rank that stopped or makes other calls keeps the others waiting: look for the first error in the ranks' logs"
    )


@contextmanager
def _agreeing(x: Tensor, call: Call) -> Iterator[None]:
    """Within: the host waits for the other ranks' counts."""
    sizes = Host([0, call.layer, call.capacity, x.shape[0], 0, 0, 0, 0, call.ep], [], [], [])
    try:
        if x.is_cuda:
            with WATCH.host(lambda: _lost("dispatch", sizes, call.group), _timeout(call.group, x.device)):
                yield
        else:
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ExchangeError(_lost("dispatch", sizes, call.group, error)) from error


def release(group: str) -> None:
    """Frees what transports keep for a process group; collective over it."""
    transports.release(group)


# --- dispatch --------------------------------------------------------------------------------------------------------


def _linked(shape: tuple, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of this shape with one number in memory: for its gradient."""
    return torch.empty_strided(shape, (0,) * len(shape), dtype=dtype or like.dtype, device=like.device)


@opaque("dispatch_start")
def _dispatch_start(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    group: str,
    capacity: int = 0,
    wire: str = "",
    transport: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Starts to send x [T, H] with weights [T, K] to the ranks of experts index [T, K]; expert e lives on rank e // (E / ep).

    Returns what :class:`moefx.transports.Dispatched` says, and the links of rows and weights. ``group`` names the ep process
    group; all its ranks call. ``transport``: one of ``transports.NAMES``, by default ``transports.usual``.
    """
    call = _call(group, num_experts, capacity, _layer.get(), wire)
    if x.shape[0] > capacity > 0:
        raise MoefxError(
            f"{x.shape[0]} tokens of this rank are to be sent at once, there is room for {capacity}: pass the most tokens that "
            "a rank ever has as dispatch_capacity"
        )
    mover = transports.find(transport or transports.usual(call))
    shared = _dispatches.get()
    kept = shared.take() if shared else None
    with _agreeing(x, call):
        sent, wait = mover.send(x, index, weights, call, kept)
    if shared and kept is None:
        at, arrive = shared.taken - 1, wait

        def wait() -> None:
            arrive()
            shared.keep(at, sent)

    _started(sent.tokens, wait, "dispatch", sent.host, call.group)
    facts = Host.read(sent.host).facts
    known = {"received": facts[RECEIVED], "pairs": facts[transports.PAIRS], "handle": sent.handle.shape[0]}
    shapes = mover.shapes(x, index, weights, call, known.__getitem__)
    links = _linked(shapes.back, x), _linked(shapes.back_weights, x, wide(weights.dtype))
    return *sent, *links


@_dispatch_start.register_fake
def _(x, index, weights, *, num_experts: int, group: str, capacity: int = 0, wire: str = "", transport: str = ""):
    call = _call(group, num_experts, capacity, wire=wire)
    mover = transports.find(transport or transports.usual(call))
    ctx = torch.library.get_ctx()
    shapes = mover.shapes(x, index, weights, call, lambda _: ctx.new_dynamic_size())
    experts = index.new_empty(shapes.experts, dtype=torch.int32)
    return (
        x.new_empty(shapes.tokens),
        experts,
        weights.new_empty(shapes.experts, dtype=wide(weights.dtype)),
        x.new_empty(shapes.handle, dtype=torch.uint8),
        torch.empty(transports.host_size(call.ep, shapes.own), dtype=torch.int64, device="cpu"),
        _linked(shapes.back, x),
        _linked(shapes.back_weights, x, wide(weights.dtype)),
    )


@opaque("dispatch_wait")
def _dispatch_wait(
    x: Tensor,
    tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
    handle: Tensor,
    host: Tensor,
    link: Tensor,
    link_weights: Tensor,
    *,
    num_experts: int,
    group: str,
    capacity: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Waits for the tokens that ``dispatch_start(x, ...)`` moves and sorts them by expert: rows, row_weights, counts, place.

    See :func:`_dispatch`. x is taken so that nobody writes to it while it is sent. The last result has the shape of ``link``:
    for combine, which must not get ``link`` itself. Whatever reads a link adds a gradient to its own, and a compiler adds it
    in place, to numbers that are still arriving.
    """
    _arrive(tokens)
    hidden, top_k, local, first = x.shape[1], experts.shape[1], num_experts // _group(group).size(), 0
    if tokens.shape[0] and not experts.shape[0]:  # a row holds its experts and weights too
        size = fp8_rows.width(hidden, x.dtype) if int(host[transports.FP8]) else hidden
        _, weights, experts = transports.unpack(tokens, (size, x.dtype), (top_k, weights.dtype), (top_k, torch.int32))
        first = 0 if not capacity else _group(group).rank() * local  # all-gathered as the router gave them
    counts, place = rows_.by_expert(experts, first, local)
    rows, row_weights = rows_.spread(rows_.arrived(tokens, hidden, host), place, int(host[ROWS]), weights)
    return rows, row_weights, counts, place, _linked((link.shape[0], hidden), x)


@_dispatch_wait.register_fake
def _(x, tokens, experts, weights, handle, host, link, link_weights, *, num_experts: int, group: str, capacity: int = 0):
    local = num_experts // _group(group).size()
    if capacity:
        rows = _group(group).size() * capacity * min(link_weights.shape[1], local)
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    counts = x.new_empty(local, dtype=torch.int64)
    place = x.new_empty(tokens.shape[0], experts.shape[1], dtype=torch.int32)
    back = _linked((link.shape[0], x.shape[1]), x)
    return x.new_empty(rows, x.shape[1]), weights.new_empty(rows), counts, place, back


@opaque("return_start", once=True)
def return_start(
    grad_rows: Tensor,
    grad_weights: Tensor,
    place: Tensor,
    handle: Tensor,
    host: Tensor,
    link: Tensor,
    link_weights: Tensor,
    group: str,
) -> tuple[Tensor, Tensor]:
    """The backward of ``dispatch_wait``: adds up the rows of each token on this rank and starts to send them back."""
    call, mover = _call(group, 0), transports.find(int(host[transports.KIND]))
    rows, tokens, weights = transports.room(mover, grad_rows, place.shape[0], place.shape[1], grad_weights.dtype)
    rows_.sum_rows(grad_rows, place, out=tokens, picked=rows_.Picked(grad_weights, place, weights))
    back, back_weights, wait = mover.bring_back(rows, weights, handle, host, call)
    assert back_weights is not None
    _started(back, wait, "dispatch's backward", host, call.group)
    return back, back_weights


@return_start.register_fake
def _(grad_rows, grad_weights, place, handle, host, link, link_weights, group: str):
    return link.new_empty(link.shape), link_weights.new_empty(link_weights.shape)


@opaque("return_wait", once=True)
def return_wait(
    back: Tensor,
    back_weights: Tensor,
    index: Tensor,
    handle: Tensor,
    host: Tensor,
    hidden: int,
    dtype: torch.dtype,
    group: str,
) -> tuple[Tensor, Tensor]:
    """The backward of ``dispatch_start``: gradients of x [T, H], summed over the ranks that had a token, and weights [T, K]."""
    _arrive(back)
    mover = transports.find(int(host[transports.KIND]))
    to_x, to_weights = mover.collect(back, back_weights, handle, host, _call(group, 0), hidden)
    assert to_weights is not None
    return to_x, to_weights.to(dtype)


@return_wait.register_fake
def _(back, back_weights, index, handle, host, hidden: int, dtype: torch.dtype, group: str):
    return back.new_empty(index.shape[0], hidden), back.new_empty(index.shape, dtype=dtype)


# Without materialized gradients: autograd would write zeros for each result that has none, as large as the rows. Where a
# gradient could be needed and is not there, zeros are sent: the other ranks wait for them.


def _or_zeros(grad: Tensor | None, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=like.device) if grad is None else grad.contiguous()


def _save_dispatch_start(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    x, index, weights = inputs
    ctx.group, ctx.hidden, ctx.dtype = keyword_only_inputs["group"], x.shape[1], weights.dtype
    ctx.save_for_backward(index, output[3], output[4])
    ctx.mark_non_differentiable(*output[:5])


def _backward_dispatch_start(ctx, *grads):
    index, handle, host = ctx.saved_tensors
    if grads[5] is None:  # nothing was sent back
        return None, None, None
    to_x, to_weights = torch.ops.moefx.return_wait(*grads[5:], index, handle, host, ctx.hidden, ctx.dtype, ctx.group)
    return to_x, None, to_weights


def _save_dispatch_wait(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    *_, handle, host, link, link_weights = inputs
    ctx.group, ctx.shapes = keyword_only_inputs["group"], (output[0].shape, output[1].shape)
    ctx.dtypes = output[0].dtype, output[1].dtype
    ctx.save_for_backward(output[3], handle, host, link, link_weights)
    ctx.mark_non_differentiable(*output[2:])


def _backward_dispatch_wait(ctx, grad_rows: Tensor | None, grad_weights: Tensor | None, *_):
    place, handle, host, link, link_weights = ctx.saved_tensors
    rows, weights = (_or_zeros(g, s, d, place) for g, s, d in zip((grad_rows, grad_weights), ctx.shapes, ctx.dtypes))
    to_links = torch.ops.moefx.return_start(rows, weights, place, handle, host, link, link_weights, ctx.group)
    return None, None, None, None, None, None, *to_links


_dispatch_start.register_autograd(_backward_dispatch_start, setup_context=_save_dispatch_start)
_dispatch_wait.register_autograd(_backward_dispatch_wait, setup_context=_save_dispatch_wait)
dispatch_start = torch.ops.moefx.dispatch_start.default
dispatch_wait = torch.ops.moefx.dispatch_wait.default


def dispatch_by(transport: str) -> Callable:
    """``dispatch`` along this transport, with its signature."""

    def dispatch(x: Tensor, index: Tensor, weights: Tensor, *, num_experts: int, group: str, capacity: int = 0, wire: str = ""):
        where = {"num_experts": num_experts, "group": group, "capacity": capacity}
        *sent, link, link_weights = dispatch_start(x, index, weights, **where, wire=wire, transport=transport)
        *arrived, back = dispatch_wait(x, *sent, link, link_weights, **where)
        return *arrived, sent[3], sent[4], back, sent[0]

    dispatch.transport = transport  # type: ignore[attr-defined]
    return dispatch


def _dispatch(
    x: Tensor, index: Tensor, weights: Tensor, *, num_experts: int, group: str, capacity: int = 0, wire: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sends x [T, H] to the ranks of experts index [T, K] (int64), with weights [T, K]; expert e lives on rank e // (E / ep).

    Returns rows [R, H], expert by expert, within an expert by source rank, then token; row_weights [R], the router's weights
    of these rows in float32 (float64 for float64), differentiable, for ``grouped_mlp``; counts [E / ep] int64; and for
    ``combine``: place [N, K] int32, the row of each (token, k) that this rank received, -1 for none; handle (bytes); host (of
    the CPU); link (S rows, without memory). The last result is what the rows were spread from, as it arrived: for
    ``grouped_mlp``, which may keep it instead of the rows. ``group`` is the name of the ep process group; all its ranks call.

    ``capacity``, the most tokens that a rank ever has: buffers are made for the worst case, and neither is anything agreed nor
    does the host wait. R is then ``ep * capacity * min(K, E / ep)``; rows after the last of ``counts`` mean nothing.

    ``wire`` = "fp8": tokens are quantized to be sent, and rows are what :mod:`moefx.transports.fp8_rows` makes of them, in
    x's dtype. The gradient is that of an exchange which is exact, and is sent in x's dtype, as is what ``combine`` brings back.
    """
    if wire not in transports.WIRES:
        raise MoefxError(f"rows cannot be sent as {wire!r}: wire is one of {', '.join(map(repr, transports.WIRES))}")
    return dispatch_by("")(x, index, weights, num_experts=num_experts, group=group, capacity=capacity, wire=wire)


# --- combine ---------------------------------------------------------------------------------------------------------


@opaque("combine_start")
def _combine_start(
    rows: Tensor, index: Tensor, place: Tensor, handle: Tensor, host: Tensor, link: Tensor, *, group: str
) -> tuple[Tensor, Tensor]:
    """Adds up the rows of each token on this rank and starts to send them back; see :func:`_combine`.

    Returns what is being written [S, H], and its own link [N, H].
    """
    call = _call(group, 0)
    tokens = rows_.sum_rows(rows, place)
    back, _, wait = transports.find(int(host[transports.KIND])).bring_back(tokens, None, handle, host, call)
    _started(back, wait, "combine", host, call.group)
    return back, _linked(tokens.shape, rows)


@_combine_start.register_fake
def _(rows, index, place, handle, host, link, *, group: str):
    return rows.new_empty(link.shape[0], rows.shape[1]), _linked((place.shape[0], rows.shape[1]), rows)


@opaque("combine_wait")
def _combine_wait(back: Tensor, link: Tensor, index: Tensor, handle: Tensor, host: Tensor, *, group: str) -> Tensor:
    """Waits for what ``combine_start`` moves and adds up each token's rows: [T, H]."""
    _arrive(back)
    mover = transports.find(int(host[transports.KIND]))
    return mover.collect(back, None, handle, host, _call(group, 0), link.shape[1])[0]


@_combine_wait.register_fake
def _(back, link, index, handle, host, *, group: str):
    return back.new_empty(index.shape[0], link.shape[1])


@opaque("resend_start", once=True)
def resend_start(grad: Tensor, link: Tensor, handle: Tensor, host: Tensor, group: str) -> Tensor:
    """The backward of ``combine_wait``: starts to send the gradient [T, H] where the tokens went."""
    call = _call(group, 0)
    tokens, wait = transports.find(int(host[transports.KIND])).resend(grad, handle, host, call)
    _started(tokens, wait, "combine's backward", host, call.group)
    return tokens


@resend_start.register_fake
def _(grad, link, handle, host, group: str):
    return link.new_empty(link.shape)


@opaque("resend_wait", once=True)
def resend_wait(grad: Tensor, place: Tensor, host: Tensor, rows: int) -> Tensor:
    """The backward of ``combine_start``: each row's gradient is its token's; [R, H] of ``rows`` = R rows, from [N, H]."""
    _arrive(grad)
    return rows_.spread(grad, place, rows)[0]


@resend_wait.register_fake
def _(grad, place, host, rows: int):
    return grad.new_empty(rows, grad.shape[1])


def _save_combine_start(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    rows, _, place, _, host, _ = inputs
    ctx.rows = rows.shape[0]
    ctx.save_for_backward(place, host)
    ctx.mark_non_differentiable(output[0])


def _backward_combine_start(ctx, _, grad: Tensor | None):
    if grad is None:  # nothing was sent
        return (None,) * 6
    return torch.ops.moefx.resend_wait(grad, *ctx.saved_tensors, ctx.rows), None, None, None, None, None


def _save_combine_wait(ctx, inputs, keyword_only_inputs, output) -> None:
    _, link, _, handle, host = inputs
    ctx.group = keyword_only_inputs["group"]
    ctx.save_for_backward(link, handle, host)


def _backward_combine_wait(ctx, grad: Tensor):
    tokens = torch.ops.moefx.resend_start(grad.contiguous(), *ctx.saved_tensors, ctx.group)
    return None, tokens, None, None, None


_combine_start.register_autograd(_backward_combine_start, setup_context=_save_combine_start)
_combine_wait.register_autograd(_backward_combine_wait, setup_context=_save_combine_wait)
combine_start = torch.ops.moefx.combine_start.default
combine_wait = torch.ops.moefx.combine_wait.default


def _combine(
    rows: Tensor, index: Tensor, place: Tensor, handle: Tensor, host: Tensor, link: Tensor, *, num_experts: int, group: str
) -> Tensor:
    """Brings rows [R, H] back and adds them up: ``y[t] = sum_k row(t, k)``; [T, H] in the rows' dtype.

    The experts have weighted the rows (``grouped_mlp``'s row_weights). index [T, K] is what ``dispatch`` got, all else what it
    gave. Each rank adds up its rows of a token in float32 (float64 for float64) and rounds once to the rows' dtype, to send
    it; the token's rank adds up the ranks' in float32 and rounds once. In 16 bits that is one rounding more than a sum in one
    place, so ``|y - exact| <= u * (sum over ranks |part|) + u * |y|`` with u = 2**-8 (bfloat16); in float32 it is float32's
    rounding of a sum in another order. Kept for the backward: where each row went, and no row. Rows that ``place`` does not
    name (a capacity leaves such) get a gradient that means nothing, as they do.
    """
    back, link = combine_start(rows, index, place, handle, host, link, group=group)
    return combine_wait(back, link, index, handle, host, group=group)


_LIBRARY = torch.library.Library("moefx", "FRAGMENT")
_LIBRARY.define(
    "dispatch(Tensor x, Tensor index, Tensor weights, *, int num_experts, str group, int capacity=0, "
    "str wire='') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "combine(Tensor rows, Tensor index, Tensor place, Tensor handle, Tensor host, Tensor link, *, int num_experts, "
    "str group) -> Tensor"
)
_LIBRARY.impl("dispatch", _dispatch, "CompositeImplicitAutograd")
_LIBRARY.impl("combine", _combine, "CompositeImplicitAutograd")
#: See :func:`_dispatch`.
dispatch = torch.ops.moefx.dispatch.default
#: See :func:`_combine`.
combine = torch.ops.moefx.combine.default
