"""What a transport is: the protocol, the arguments of its moves and what they return.

T tokens of this rank, N received rows, K experts a token, H the hidden size. A transport keeps nothing between its moves but
buffers: all that it must know again is in the tensors ``handle`` (bytes, on the device) and ``cpu_metadata`` (a header).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from moefx.transports.header import OWN
from moefx.transports.row_layout import empty_rows, unpack

#: ``dispatch_dtype``: "" sends tokens in their own dtype, "fp8" as :mod:`moefx.transports.fp8_rows` encodes them.
DISPATCH_DTYPES = ("", "fp8")


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of this name, which graphs hold instead of the group."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


class Dispatched(NamedTuple):
    """What a dispatch returns: one row for each token that has an expert on this rank, by source rank, then by token."""

    tokens: Tensor  #: [N, H]; packed [N, W]: a row begins with the hidden state (encoded, if the header says FP8)
    topk_ids: Tensor  #: [N, k] int32, this rank's experts numbered from 0; -1: none. [0, K]: packed in tokens.
    #: k is K, or 1 where the transport sends a row for each expert
    topk_weights: Tensor  #: [N, k] float32 (float64 if the router's are). [0, K]: packed in tokens
    handle: Tensor  #: 1-D uint8
    cpu_metadata: Tensor  #: see :mod:`moefx.transports.header`


class Shapes(NamedTuple):
    """The shapes of ``Dispatched``, and of what ``return_rows`` returns when weights are sent with the rows."""

    tokens: tuple
    topk_ids: tuple
    handle: tuple
    returned: tuple
    returned_weights: tuple
    own: int = OWN  #: numbers that the transport adds to the header


Wait = Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """The arguments of a move that are not tensors."""

    group: dist.ProcessGroup
    num_experts: int
    capacity: int = 0  #: the most tokens of a rank; 0: unknown
    layer: int = 0  #: index of the layer's name, see :func:`moefx.ops.exchange.layer`
    dispatch_dtype: str = ""  #: one of DISPATCH_DTYPES; ``dispatch`` only

    @property
    def ep(self) -> int:
        """Ranks of the group."""
        return self.group.size()

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.num_experts // self.ep


class Transport(Protocol):
    """Four moves. All but ``reduce`` only start; what they return may be read after the returned ``Wait`` was called."""

    packed: bool  #: a row that is returned holds its weights too: see ``allocate_buffers``

    def shapes(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        """The shapes of the results; ``size`` of "received", "sent" or "handle" is one that depends on the data."""
        ...

    def dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, kept: Dispatched | None
    ) -> tuple[Dispatched, Wait]:
        """Sends x [T, H], topk_ids [T, K] and topk_weights [T, K] to every rank that has one of the token's experts.

        ``kept``: the result, without the rows, of an earlier dispatch of the same tokens to the same experts.
        """
        ...

    def redispatch(self, x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        """Sends other rows x [T, H] to the same ranks -> [N, H]: the gradient of combine."""
        ...

    def return_rows(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        """Sends tokens [N, H] and weights [N, K] (or None) back to the ranks that they came from, for ``reduce``: [S, W].

        With weights, tokens and weights are buffers of :func:`allocate_buffers`: of a ``packed`` transport, tokens are [N, W]
        and hold the weights.
        """
        ...

    def reduce(
        self, returned: Tensor, returned_weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of each token's returned rows, [T, H], taken in float32 and rounded once; and the weights [T, K]."""
        ...


class SummedInReturn:
    """What the transports share whose library sums a token's rows while it returns them (:class:`Transport`)."""

    packed = False

    def reduce(
        self, returned: Tensor, returned_weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`moefx.transports.Transport.reduce`."""
        # combine has summed them; an operation's result may not be its input
        return returned.clone(), None if returned_weights is None else returned_weights.clone()

    @staticmethod
    def own_rows(returned: Tensor, returned_weights: Tensor | None, tokens: int) -> tuple[Tensor, Tensor | None]:
        """The rows of this rank's ``tokens``: of a rank without any, which took part with a row of zeros, no row."""
        if tokens:
            return returned, returned_weights
        return returned[:0].clone(), None if returned_weights is None else returned_weights[:0].clone()


def allocate_buffers(
    transport: Transport, like: Tensor, n: int, top_k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For ``return_rows`` with weights: its argument tokens, and where to write tokens [n, H] and weights [n, K]."""
    hidden = like.shape[1]
    if not transport.packed:
        tokens = like.new_empty(n, hidden)
        return tokens, tokens, like.new_empty(n, top_k, dtype=dtype)
    parts = (hidden, like.dtype), (top_k, dtype)
    rows = empty_rows(like, n, *parts)
    tokens, weights = unpack(rows, *parts)
    return rows, tokens, weights


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights that are sent and of sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
