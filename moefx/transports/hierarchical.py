"""Hierarchical all-to-all: a token crosses to another node once, however many ranks it wants there, and is passed on within.

First over the rail (the ranks of the same place on each node), as if each node were one rank with all its experts; then within
the node. What comes back takes the same ways, added up on the node before it crosses: in 16 bits one rounding more than
all-to-all. The host waits for counts twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.transports import (
    CAPACITY,
    FP8,
    KIND,
    LAYER,
    NAMES,
    PAIRS,
    RECEIVED,
    ROWS,
    TOKENS,
    TOP_K,
    Call,
    Dispatched,
    Host,
    Shapes,
    Wait,
    host_size,
    make_host,
    nodes,
    room,
    row_bytes,
)
from moefx.transports.all_to_all import AllToAll


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
    stage = AllToAll()
    packed = True

    @staticmethod
    def _calls(call: Call) -> tuple[Call, Call]:
        """Over the rail a node owns its experts; within the node a rank owns its own."""
        rail, node = _groups(call.group)
        inner = replace(call, group=node, num_experts=call.num_experts // rail.size(), wire="")  # as they came
        return replace(call, group=rail), inner

    @staticmethod
    def _own(call: Call) -> int:
        parts = nodes(call.group)
        return 2 + host_size(len(parts), 0) + host_size(len(parts[0]), 0)

    def shapes(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        found = self.stage.shapes(x, index, weights, call, size)
        return found._replace(handle=(size("handle"),), own=self._own(call))

    @staticmethod
    def _read(handle: Tensor, host: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(handle, host) of the rail's stage and of the node's."""
        own = host[-len(Host.read(host).own) :]
        first, bytes_ = own[:2].tolist()
        return (handle[:bytes_], own[2 : 2 + first]), (handle[bytes_:], own[2 + first :])

    def send(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, kept: Dispatched | None) -> tuple[Dispatched, Wait]:
        rail, node = self._calls(call)
        before = (
            [None, None] if kept is None else [kept._replace(handle=h, host=o) for h, o in self._read(kept.handle, kept.host)]
        )
        crossed, wait = self.stage.send(x, index, weights, rail, before[0])
        wait()
        tokens, experts, w = self.stage.opened(crossed, x, call.wire)
        arrived, wait = self.stage.send(tokens, experts.long(), w, node, before[1])
        inner, outer = Host.read(arrived.host).facts, Host.read(crossed.host).facts
        facts = {
            KIND: NAMES.index("hierarchical"),
            LAYER: call.layer,
            CAPACITY: 0,
            TOKENS: x.shape[0],
            TOP_K: index.shape[1],
            RECEIVED: inner[RECEIVED],
            ROWS: inner[ROWS],
            PAIRS: outer[PAIRS],
            FP8: outer[FP8],
        }
        own = [len(crossed.host), len(crossed.handle), *crossed.host.tolist(), *arrived.host.tolist()]
        handle = torch.cat((crossed.handle, arrived.handle))
        return arrived._replace(handle=handle, host=make_host(facts, call.ep, own=own)), wait

    def resend(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        (rail, node), (first, second) = self._calls(call), self._read(handle, host)
        crossed, wait = self.stage.resend(x, *first, rail)
        wait()
        return self.stage.resend(crossed, *second, node)

    def bring_back(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, host: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        (rail, node), (first, second) = self._calls(call), self._read(handle, host)
        back, back_weights, wait = self.stage.bring_back(tokens, weights, *second, node)
        wait()
        if back_weights is None:
            return self.stage.bring_back(self.stage.collect(back, None, *second, node, tokens.shape[1])[0], None, *first, rail)
        top_k = back_weights.shape[1]
        # with the hidden state's padding, if it has any: it travels on as it came
        hidden = tokens.shape[1] - row_bytes((top_k, back_weights.dtype)) // tokens.dtype.itemsize
        gathered, gathered_weights = self.stage.collect(back, back_weights, *second, node, hidden)
        assert gathered_weights is not None
        rows, to_tokens, to_weights = room(self.stage, gathered, gathered.shape[0], top_k, gathered_weights.dtype)
        to_tokens.copy_(gathered)
        to_weights.copy_(gathered_weights)
        return self.stage.bring_back(rows, to_weights, *first, rail)

    def collect(
        self, back: Tensor, back_weights: Tensor | None, handle: Tensor, host: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        (first, _), (rail, _) = self._read(handle, host), self._calls(call)
        return self.stage.collect(back, back_weights, *first, rail, hidden)


TRANSPORT = Hierarchical()
