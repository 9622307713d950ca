"""Loop-back: one process plays one rank of many. What it would send to the others comes back to it as if they had sent it.

For measurements only: a rank receives as many rows as it sends if routing is balanced, and its own experts (expert e's place on
e's rank) compute them. Rows, experts and memory are those of a real rank; numbers are not the model's, and nothing travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.transports import Call, Wait
from moefx.transports.all_to_all import AllToAll


class LoopBack(AllToAll):
    name = "loop_back"

    def exchange_sizes(self, sizes: Tensor, call: Call) -> None:
        sizes[1].copy_(sizes[0])

    def exchange(self, rows: Tensor, send: list[int], receive: list[int], call: Call) -> tuple[Tensor, Wait]:
        return rows.clone(memory_format=torch.contiguous_format), lambda: None


TRANSPORT = LoopBack()
