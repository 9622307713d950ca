"""Loop-back: one process stands for one rank of many. The rows that it would send to the others are returned to it as received.

For measurements only: with balanced routing a rank receives as many rows as it sends, and its own experts compute them (for
expert e, the one with e's index on e's rank). Rows, experts and memory are those of a real rank; the numbers are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moefx.transports.all_to_all import AllToAll
from moefx.transports.base import Call, Wait


class LoopBack(AllToAll):
    """All-to-all without a collective."""

    name = "loop_back"

    def exchange_sizes(self, sizes: Tensor, call: Call) -> None:
        """The other ranks report what this rank sent."""
        sizes[1].copy_(sizes[0])

    def exchange(self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], call: Call) -> tuple[Tensor, Wait]:
        """A copy of the rows."""
        return rows.clone(memory_format=torch.contiguous_format), lambda: None


TRANSPORT = LoopBack()
