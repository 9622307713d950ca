"""Transports: how token rows get to the ranks that own their experts, and back. One row per (token, rank), not per expert.

A transport makes four moves; :mod:`moefx.ops.dispatch_combine` makes operations with gradients of them:

    send        tokens, with their experts and weights, to every rank that has one of their experts
    resend      other rows of the same tokens along the same ways (the gradient that combine gets)
    bring_back  one row per received token to the rank that it came from (combine; the gradient that dispatch gets)
    collect     what was brought back, summed per token

``send``, ``resend`` and ``bring_back`` only start the move: what they return may be read after its ``wait`` was called.
A transport keeps nothing between the moves but buffers: what it must know again is in the tensors ``handle`` (of the device,
bytes) and ``host`` (of the CPU, int64: so that nobody asks the device for it).
"""

from __future__ import annotations

import importlib
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.errors import MoefxError

#: Name -> where it is; the place in this order is what ``host`` calls it.
_PLACES = {
    "all_to_all": "moefx.transports.all_to_all",
    "all_gather": "moefx.transports.all_gather",
    "hierarchical": "moefx.transports.hierarchical",
    "deepep": "moefx.backends.deepep",
    "deepep_elastic": "moefx.backends.experimental.deepep_elastic",
    "te_ep": "moefx.backends.experimental.te_ep",
    "loop_back": "moefx.transports.loop_back",
}
NAMES = tuple(_PLACES)

#: What ``host`` holds, by place; then the tokens sent to and received from each rank, then OWN or more of the transport's own.
KIND, LAYER, CAPACITY, TOKENS, TOP_K, RECEIVED, ROWS, PAIRS, RANKS, FP8 = range(10)
_FACTS, OWN = 10, 64

#: What ``Call.wire`` may be: "" sends tokens as they are, "fp8" as :mod:`moefx.transports.fp8_rows` writes them; ``send`` only.
WIRES = ("", "fp8")


def find(name: str | int) -> Transport:
    """The transport of this name, or of this place in ``NAMES``."""
    name = NAMES[name] if isinstance(name, int) else name
    if name not in _PLACES:
        raise MoefxError(f"no transport is named {name!r}; there are: {', '.join(NAMES)}")
    return importlib.import_module(_PLACES[name]).TRANSPORT


def release(group: str) -> None:
    """Frees the buffers that transports keep for a process group; collective over it."""
    for module in map(sys.modules.get, _PLACES.values()):  # one that was never used was never imported
        if module is not None and hasattr(module, "release"):
            module.release(group)


def host_size(ep: int, own: int = OWN) -> int:
    return _FACTS + 2 * ep + own


def make_host(
    facts: dict[int, int],
    ep: int,
    send: Sequence[int] = (),
    receive: Sequence[int] = (),
    own: Sequence[int] = (),
    own_size: int = OWN,
) -> Tensor:
    """The facts as one int64 tensor of the CPU; see KIND, LAYER, ..."""
    facts = {**facts, RANKS: ep}
    numbers = [facts.get(i, 0) for i in range(_FACTS)]
    for part, size in ((send, ep), (receive, ep), (own, max(own_size, len(own)))):
        numbers += [*part, *[0] * (size - len(part))]
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)  # a third of torch.tensor's time


class Host(NamedTuple):
    """``host``, read."""

    facts: list[int]
    send: list[int]
    receive: list[int]
    own: list[int]

    @staticmethod
    def read(host: Tensor) -> Host:
        numbers = host.tolist()
        ends = [_FACTS + i * numbers[RANKS] for i in range(3)]
        return Host(numbers[:_FACTS], numbers[ends[0] : ends[1]], numbers[ends[1] : ends[2]], numbers[ends[2] :])


class Dispatched(NamedTuple):
    """What ``send`` gives: one row for each token that has an expert here, by the rank that sent it, then by token."""

    tokens: Tensor  #: [N, H]; packed [N, W]: a row begins with the token's H numbers (where ``host`` says FP8: encoded)
    experts: Tensor  #: [N, k] this rank's experts that the row is for, numbered from 0; -1: none. [0, K]: packed in tokens.
    #: k is K, or 1 where the transport brings a row for each expert
    weights: Tensor  #: [N, k] float32 (float64 if the router's are). [0, K]: packed in tokens
    handle: Tensor  #: 1-D uint8
    host: Tensor


class Shapes(NamedTuple):
    """The shapes of ``Dispatched``, and of what ``bring_back`` gives when weights travel with the rows."""

    tokens: tuple
    experts: tuple
    handle: tuple
    back: tuple
    back_weights: tuple
    own: int = OWN  #: numbers of the transport in ``host``


Wait = Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """Where a move happens."""

    group: dist.ProcessGroup
    num_experts: int
    capacity: int = 0  #: most tokens of a rank, or 0 for "as many as there are"
    layer: int = 0  #: which of ``exchange.layer_name``
    wire: str = ""  #: one of WIRES: how ``send`` sends

    @property
    def ep(self) -> int:
        return self.group.size()

    @property
    def local(self) -> int:
        return self.num_experts // self.ep


class Transport(Protocol):
    """See the module. T tokens here, N received, K experts a token, H numbers a row."""

    packed: bool  #: a row that goes back holds its weights too: see ``room``

    def shapes(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        """The shapes of the results; ``size`` of "received", "pairs" or "handle" is one that only the data knows."""
        ...

    def send(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, kept: Dispatched | None) -> tuple[Dispatched, Wait]:
        """``kept``: what an earlier ``send`` of the same tokens to the same experts gave (without the rows)."""
        ...

    def resend(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        """x [T, H] -> [N, H]."""
        ...

    def bring_back(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, host: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        """tokens [N, H], weights [N, K] or None -> what ``collect`` reads: [S, W], and None where there are no weights.

        Both are what :func:`room` made, where there are weights: of a ``packed`` transport, tokens are [N, W] and hold them.
        """
        ...

    def collect(
        self, back: Tensor, back_weights: Tensor | None, handle: Tensor, host: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        """-> [T, H], each the sum over the ranks that had the token, taken in float32 and rounded once; weights [T, K]."""
        ...


def nodes(group: dist.ProcessGroup) -> list[list[int]]:
    """The group's ranks (numbered within it) node by node, as torchrun placed them; one node where nobody said."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    everyone = dist.get_process_group_ranks(group)
    found: dict[int, list[int]] = {}
    for place, rank in enumerate(everyone):
        found.setdefault(rank // each if each else 0, []).append(place)
    return list(found.values())


def usual(call: Call) -> str:
    """What torch.distributed's collectives serve best: all_gather where a capacity is given; else all_to_all, or hierarchical
    between nodes of as many ranks each, if a token can save a way: at least two ranks a node.
    """
    if call.capacity:
        return "all_gather"
    parts = nodes(call.group)
    sizes = {len(p) for p in parts}
    neighbours = [p for part in parts for p in part] == list(range(call.ep))
    return "hierarchical" if len(parts) > 1 and len(sizes) == 1 and sizes.pop() > 1 and neighbours else "all_to_all"


def wide(dtype: torch.dtype) -> torch.dtype:
    """What weights travel in and sums are taken in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- rows of several parts -------------------------------------------------------------------------------------------

_ALIGN = 16  # bytes: so that each part can be read as any dtype, and by vector loads


def _padded(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def row_bytes(*parts: tuple[int, torch.dtype]) -> int:
    """Bytes of a row that holds ``parts`` (how many numbers, of what dtype) one after the other."""
    return sum(_padded(n * dtype.itemsize) for n, dtype in parts)


def unpack(rows: Tensor, *parts: tuple[int, torch.dtype]) -> list[Tensor]:
    """Views of the parts of each row of ``rows`` [n, W]."""
    found, at, raw = [], 0, rows.view(torch.uint8)
    for n, dtype in parts:
        found.append(raw[:, at : at + n * dtype.itemsize].view(dtype))
        at += _padded(n * dtype.itemsize)
    return found


def empty_rows(like: Tensor, n: int, *parts: tuple[int, torch.dtype]) -> Tensor:
    """[n, W] in ``like``'s dtype and on its device, with room for ``parts``."""
    return like.new_empty(n, row_bytes(*parts) // like.dtype.itemsize)


def room(mover: Transport, like: Tensor, n: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """For ``bring_back`` with weights: what to give it as tokens, and where to write tokens [n, H] and weights [n, K]."""
    hidden = like.shape[1]
    if not mover.packed:
        tokens = like.new_empty(n, hidden)
        return tokens, tokens, like.new_empty(n, top_k, dtype=dtype)
    parts = (hidden, like.dtype), (top_k, dtype)
    rows = empty_rows(like, n, *parts)
    tokens, weights = unpack(rows, *parts)
    return rows, tokens, weights


def reading(numbers: Tensor) -> Callable[[], list]:
    """Starts to copy a few numbers to the host; what it returns waits for that copy only, not for what is launched after."""
    if not numbers.is_cuda:
        return numbers.tolist
    there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list:
        event.synchronize()
        return there.tolist()

    return read
