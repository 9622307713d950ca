"""Hierarchical all-to-all: a token is sent to another node once, however many ranks it needs there, and forwarded there.

First over the rail (the ranks with the same index on each node), as if each node were one rank with all its experts; then
within the node. Results return on the same route and are summed on the node before they leave it: in 16 bits one rounding more
than all-to-all. The host waits for counts twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.transports.all_to_all import AllToAll
from moefx.transports.base import Call, Dispatched, Shapes, Wait, allocate_buffers
from moefx.transports.header import Header, header_size, make_header
from moefx.transports.registry import nodes
from moefx.transports.row_layout import row_bytes


@functools.cache
def _groups(group: dist.ProcessGroup) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's rail and its node. The first call is collective."""
    everyone, parts, me = dist.get_process_group_ranks(group), nodes(group), group.rank()
    mine = next(part for part in parts if me in part)
    rail = [part[mine.index(me)] for part in parts]
    made = []
    for ranks in (rail, mine):
        made.append(dist.new_group([everyone[r] for r in ranks], use_local_synchronization=True))
    return made[0], made[1]


class Hierarchical:
    """Two stages of all-to-all: over the rail, then within the node."""

    stage = AllToAll()
    packed = True

    @staticmethod
    def _calls(call: Call) -> tuple[Call, Call]:
        """Over the rail a node owns its experts; within the node a rank owns its own."""
        rail, node = _groups(call.group)
        # encoded tokens are forwarded as received
        inner = replace(call, group=node, num_experts=call.num_experts // rail.size(), dispatch_dtype="")
        return replace(call, group=rail), inner

    @staticmethod
    def _own(call: Call) -> int:
        parts = nodes(call.group)
        return 2 + header_size(len(parts), 0) + header_size(len(parts[0]), 0)

    def shapes(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        """See :meth:`moefx.transports.Transport.shapes`."""
        found = self.stage.shapes(x, topk_ids, topk_weights, call, size)
        return found._replace(handle=(size("handle"),), own=self._own(call))

    @staticmethod
    def _stages(handle: Tensor, cpu_metadata: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(handle, cpu_metadata) of the rail's stage and of the node's."""
        own = cpu_metadata[-len(Header.read(cpu_metadata).own) :]
        first, bytes_ = own[:2].tolist()
        return (handle[:bytes_], own[2 : 2 + first]), (handle[bytes_:], own[2 + first :])

    def dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, kept: Dispatched | None
    ) -> tuple[Dispatched, Wait]:
        """See :meth:`moefx.transports.Transport.dispatch`."""
        rail, node = self._calls(call)
        before: list[Dispatched | None] = [None, None]
        if kept is not None:
            stages = self._stages(kept.handle, kept.cpu_metadata)
            before = [kept._replace(handle=h, cpu_metadata=m) for h, m in stages]
        crossed, wait = self.stage.dispatch(x, topk_ids, topk_weights, rail, before[0])
        wait()
        tokens, experts, weights = self.stage.unpacked(crossed, x, call.dispatch_dtype)
        received, wait = self.stage.dispatch(tokens, experts.long(), weights, node, before[1])
        outer, inner = Header.read(crossed.cpu_metadata), Header.read(received.cpu_metadata)
        own = [len(crossed.cpu_metadata), len(crossed.handle), *crossed.cpu_metadata.tolist(), *received.cpu_metadata.tolist()]
        header = Header(
            "hierarchical",
            call.layer,
            tokens=x.shape[0],
            top_k=topk_ids.shape[1],
            received=inner.received,
            permuted=inner.permuted,
            sent=outer.sent,
            fp8=outer.fp8,
            own=own,
        )
        handle = torch.cat((crossed.handle, received.handle))
        return received._replace(handle=handle, cpu_metadata=make_header(header, call.ep, own_size=0)), wait

    def redispatch(self, x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        """See :meth:`moefx.transports.Transport.redispatch`."""
        (rail, node), (first, second) = self._calls(call), self._stages(handle, cpu_metadata)
        crossed, wait = self.stage.redispatch(x, *first, rail)
        wait()
        return self.stage.redispatch(crossed, *second, node)

    def return_rows(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        """See :meth:`moefx.transports.Transport.return_rows`."""
        (rail, node), (first, second) = self._calls(call), self._stages(handle, cpu_metadata)
        returned, returned_weights, wait = self.stage.return_rows(tokens, weights, *second, node)
        wait()
        if returned_weights is None:
            summed, _ = self.stage.reduce(returned, None, *second, node, tokens.shape[1])
            return self.stage.return_rows(summed, None, *first, rail)
        top_k = returned_weights.shape[1]
        # with the padding of the hidden state, if it has any: it is forwarded as received
        hidden = tokens.shape[1] - row_bytes((top_k, returned_weights.dtype)) // tokens.dtype.itemsize
        summed, summed_weights = self.stage.reduce(returned, returned_weights, *second, node, hidden)
        assert summed_weights is not None
        buffers = allocate_buffers(self.stage, summed, summed.shape[0], top_k, summed_weights.dtype)
        rows, to_tokens, to_weights = buffers
        to_tokens.copy_(summed)
        to_weights.copy_(summed_weights)
        return self.stage.return_rows(rows, to_weights, *first, rail)

    def reduce(
        self, returned: Tensor, returned_weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`moefx.transports.Transport.reduce`."""
        (first, _), (rail, _) = self._stages(handle, cpu_metadata), self._calls(call)
        return self.stage.reduce(returned, returned_weights, *first, rail, hidden)


TRANSPORT = Hierarchical()
