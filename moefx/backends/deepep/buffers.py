"""The ``Buffer`` of a process group, and how the current stream waits for DeepEP's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefx.backends.deepep.library import load
from moefx.backends.deepep.payload import decode
from moefx.backends.deepep.topology import RANKS_OF_NODE
from moefx.transports import Call, Wait


@dataclass
class _GroupBuffer:
    """The buffer of a process group: one for all layers, since they exchange one after the other; it grows with H."""

    buffer: Any = None
    row_bytes: int = 0

    def close(self) -> None:
        if self.buffer is not None:
            torch.cuda.synchronize()
            self.buffer.destroy()
        self.buffer, self.row_bytes = None, 0


_buffers: dict[str, _GroupBuffer] = {}


def release(group: str | None = None) -> None:
    """Frees the buffer of a process group, or of all groups; collective over the group. The next dispatch makes a new one."""
    for name in [group] if group else list(_buffers):
        if name in _buffers:
            _buffers.pop(name).close()


def buffer_bytes(row_bytes: int, ep: int) -> tuple[int, int]:
    """NVLink and RDMA bytes of a ``Buffer`` for rows of this size."""
    buffer = load().Buffer
    nvl = rdma = 0
    for config in (buffer.get_dispatch_config(ep), buffer.get_combine_config(ep)):
        nvl = max(nvl, config.get_nvl_buffer_size_hint(row_bytes, ep))
        if ep > RANKS_OF_NODE:
            rdma = max(rdma, config.get_rdma_buffer_size_hint(row_bytes, ep))
    return nvl, rdma


def buffer_of(call: Call, rows: Tensor) -> Any:
    """The ``Buffer`` of the call's process group, large enough for ``rows``; collective over the group where it must grow."""
    row_bytes = rows.shape[1] * rows.element_size()
    mine = _buffers.setdefault(call.group.group_name, _GroupBuffer())
    if mine.row_bytes < row_bytes:
        mine.close()
        nvl, rdma = buffer_bytes(row_bytes, call.ep)
        mine.buffer = load().Buffer(call.group, nvl, rdma, explicitly_destroy=True)
        mine.row_bytes = row_bytes
    return mine.buffer


def decode_on_comm_stream(buffer: Any, received: Any, like: Tensor) -> tuple[Tensor, Any]:
    """:func:`decode` on DeepEP's own stream, for the current one; and the event after it."""
    comm = buffer.get_comm_stream()
    with torch.cuda.stream(comm):
        rows = decode(received, like)
        done = comm.record_event()
    rows.record_stream(torch.cuda.current_stream())
    return rows, done


def wait_for(event: Any, *used: Any) -> Wait:
    """Makes the current stream wait for ``event``. ``used`` are kept alive until then: DeepEP uses them on its own stream."""
    kept = list(used)

    def wait() -> None:
        if isinstance(event, torch.cuda.Event):
            torch.cuda.current_stream().wait_event(event)
        else:
            event.current_stream_wait()
        kept.clear()

    return wait
