"""Exchanges in flight: how to wait for their rows, what to say of one that does not end, and how to reuse one.

A start operation registers how to wait for the tensor that it returns; the wait operation looks it up by the tensor's address,
as PyTorch's functional collectives do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.errors import ExchangeError, MoefxError
from moefx.transports import Call, Dispatched, Header
from moefx.transports.hang_monitor import MONITOR

# --- a dispatch that is made twice -----------------------------------------------------------------------------------


@dataclass(eq=False)
class RecordedDispatches:
    """The headers and handles of a block's dispatches, in order: a forward records them for another of the same tokens."""

    made: list[Dispatched] = field(default_factory=list)  #: without the rows
    complete: bool = False  #: the next forward takes them, instead of exchanging counts with the other ranks again
    taken: int = 0

    def take(self) -> Dispatched | None:
        """What was recorded of the next dispatch; None while recording."""
        self.taken += 1
        return self.made[self.taken - 1] if self.complete else None

    def record(self, i: int, made: Dispatched) -> None:
        """Keeps the result of the ``i``-th dispatch, which has arrived."""
        self.made += [made] * (i + 1 - len(self.made))
        self.made[i] = Dispatched(made.tokens[:0], *(t.clone() for t in made[1:]))


_recorded: ContextVar[RecordedDispatches | None] = ContextVar("moefx_recorded_dispatches", default=None)


@contextmanager
def reuse_dispatches(recorded: RecordedDispatches) -> Iterator[None]:
    """Within: dispatches record what they exchanged in ``recorded``, or take it from there once it is complete."""
    token = _recorded.set(recorded)
    recorded.taken = 0
    try:
        yield
        recorded.complete = True
    finally:
        _recorded.reset(token)


def current_record() -> RecordedDispatches | None:
    """The record of the innermost :func:`reuse_dispatches`."""
    return _recorded.get()


# --- which layer this is, for messages -------------------------------------------------------------------------------

_layers: list[str] = [""]
_layer: ContextVar[int] = ContextVar("moefx_layer", default=0)


@contextmanager
def layer(name: str) -> Iterator[None]:
    """Within: errors of dispatches, and of their backwards, name this layer."""
    if name not in _layers:
        _layers.append(name)
    token = _layer.set(_layers.index(name))
    try:
        yield
    finally:
        _layer.reset(token)


def current_layer() -> int:
    """The index of the innermost :func:`layer`, which a header holds; 0 outside."""
    return _layer.get()


# --- what is in flight -----------------------------------------------------------------------------------------------

#: By the address of the tensor that is being written: how to wait for it.
_in_flight: dict[int, Callable[[], Any]] = {}


def start(written: Tensor, wait: Callable[[], Any], what: str, cpu_metadata: Tensor, group: dist.ProcessGroup) -> None:
    """Registers how to wait for ``written``; ``what`` names the exchange in errors."""

    def finish() -> None:
        try:
            wait()
        except RuntimeError as error:
            raise ExchangeError(_describe(what, Header.read(cpu_metadata), group, error)) from error
        if written.is_cuda and not torch.cuda.is_current_stream_capturing():  # a graph's event tells nothing of a replay
            event = torch.cuda.Event()
            event.record()
            timeout = _timeout(group, written.device)
            MONITOR.device(lambda: _describe(what, Header.read(cpu_metadata), group), timeout, event)

    if written.numel():
        _in_flight[written.data_ptr()] = finish
    else:
        finish()  # empty tensors have no address; the rows of the other ranks must be sent all the same


def wait(written: Tensor) -> None:
    """Returns when ``written`` may be read (on the current stream)."""
    if written.numel():
        finish = _in_flight.pop(written.data_ptr(), None)
        if finish is None:
            raise MoefxError(
                "the rows of an exchange were moved to another address before they were waited for (a bug of moefx or of the "
                "compiler backend): report it, and meanwhile use a pipeline without the pass 'overlap'"
            )
        finish()


def num_in_flight() -> int:
    """Exchanges that were started and not waited for."""
    return len(_in_flight)


def _timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    try:
        return group._get_backend(device).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return dist.constants.default_pg_timeout.total_seconds()


def _describe(what: str, header: Header, group: dist.ProcessGroup, error: Exception | None = None) -> str:
    """A sentence on an exchange that does not end."""
    where = f" of {_layers[header.layer]}" if header.layer else ""
    each = ", ".join(f"rank {r} {s}/{n}" for r, (s, n) in enumerate(zip(header.sends, header.receives)))
    return (
        f"{what}{where} did not end on rank {group.rank()} of {group.size()}, which has {header.tokens} tokens and "
        + (f"sends/receives: {each}" if any(header.sends) else "has not received the counts of the other ranks")
        + (f" ({str(error).splitlines()[0]})" if error else "")
        + ". A rank that stopped or makes other calls keeps the others waiting: look for the first error in the ranks' logs"
    )


@contextmanager
def counts_awaited(x: Tensor, call: Call) -> Iterator[None]:
    """Within: the host waits for the counts of the other ranks."""
    header = Header("all_to_all", call.layer, call.capacity, tokens=x.shape[0])
    try:
        if x.is_cuda:
            with MONITOR.host(lambda: _describe("dispatch", header, call.group), _timeout(call.group, x.device)):
                yield
        else:
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ExchangeError(_describe("dispatch", header, call.group, error)) from error


# --- tensors that only carry a gradient ------------------------------------------------------------------------------


def grad_placeholder(shape: tuple, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of this shape with one element in memory, with the shape of what is sent in the backward: for its gradient."""
    return torch.empty_strided(shape, (0,) * len(shape), dtype=dtype or like.dtype, device=like.device)
