"""The header of an exchange: what its ranks agreed on, as one int64 tensor of the CPU.

Operations hand it on as ``cpu_metadata``, so that combine and the backward never ask the device for a size.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Names of the transports; a header holds the index.
NAMES = ("all_to_all", "all_gather", "hierarchical", "deepep", "deepep_elastic", "te_ep", "loop_back")

_FIXED = 10  #: numbers before those that the ranks have each
#: Numbers that a transport may add, unless its ``shapes`` says otherwise.
OWN = 64


class Header(NamedTuple):
    """A header, read."""

    transport: str  #: one of NAMES
    layer: int = 0  #: index of the name that :func:`moefx.ops.exchange.layer` gave
    capacity: int = 0
    tokens: int = 0  #: of this rank
    top_k: int = 0
    received: int = 0  #: rows that arrive at this rank
    permuted: int = 0  #: rows after the permutation: (token, expert) pairs of this rank's experts
    sent: int = 0  #: rows that this rank sends: (token, rank) pairs
    fp8: bool = False  #: the rows that arrive are encoded, see :mod:`moefx.transports.fp8_rows`
    sends: Sequence[int] = ()  #: rows to each rank
    receives: Sequence[int] = ()  #: rows from each rank
    own: Sequence[int] = ()  #: what the transport adds

    @staticmethod
    def read(cpu_metadata: Tensor) -> Header:
        """What :func:`make_header` wrote."""
        numbers = cpu_metadata.tolist()
        name, layer, capacity, tokens, top_k, received, permuted, sent, ranks, fp8 = numbers[:_FIXED]
        first, second = _FIXED + ranks, _FIXED + 2 * ranks
        parts = numbers[_FIXED:first], numbers[first:second], numbers[second:]
        return Header(NAMES[name], layer, capacity, tokens, top_k, received, permuted, sent, bool(fp8), *parts)


def make_header(header: Header, ep: int, own_size: int = OWN) -> Tensor:
    """``header`` as a tensor, for ``ep`` ranks; ``own`` is padded to ``own_size`` numbers."""
    numbers = [
        NAMES.index(header.transport), header.layer, header.capacity, header.tokens, header.top_k, header.received,
        header.permuted, header.sent, ep, int(header.fp8),
    ]  # fmt: skip
    sizes = (header.sends, ep), (header.receives, ep), (header.own, max(own_size, len(header.own)))
    for part, size in sizes:
        numbers += [*part, *[0] * (size - len(part))]
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)  # a third of torch.tensor's time


def header_size(ep: int, own: int = OWN) -> int:
    """How many numbers a header has."""
    return _FIXED + 2 * ep + own
