"""Activation checkpointing: whether a forward is a recomputation, and the routes that it took the first time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from moefx.internals.assumptions import assumed
from moefx.ops.exchange import RecordedDispatches


@dataclass(eq=False)
class Kept:
    """The routes of a forward that autograd will recompute, kept as long as the input of that forward exists."""

    storage: StorageWeakRef
    where: tuple
    index: list[Tensor]
    dispatches: RecordedDispatches  #: where its tokens were dispatched


@dataclass
class Originals:
    """Which checkpointed calls ran the original forward: their recomputations must too, or would save other tensors."""

    #: (storage, memory) of inputs -> did the original forward run? Empty as long as none did.
    calls: list[tuple[StorageWeakRef, tuple, bool]] = field(default_factory=list)
    latest: dict[tuple, bool] = field(default_factory=dict)  #: of the latest call with an input of this shape and dtype

    def run(self, asked: bool, args: tuple, kwargs: dict) -> bool:
        """Must a call run the original forward? ``asked``: it must for another reason."""
        if not (asked or self.latest) or not checkpointed():
            return asked
        x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        here, kind = where(x), (x.shape, x.dtype)
        self.calls = [k for k in self.calls if not k[0].expired()]
        if recomputing():
            known = next((original for _, at, original in self.calls if at == here), None)
            # hooks of saved tensors may have copied the input, or moved it to the CPU and back
            return self.latest.get(kind, False) if known is None else known
        self.calls = [*(k for k in self.calls if k[1] != here), (StorageWeakRef(x.untyped_storage()), here, asked)]
        self.latest[kind] = asked
        return asked


def recomputing() -> bool:
    """Is this forward a recomputation, run by autograd in a backward?"""
    return torch._C._current_graph_task_id() != -1


def checkpointed() -> bool:
    """Is this a forward under activation checkpointing, or its recomputation?

    Non-reentrant checkpointing hooks saved tensors; reentrant checkpointing runs without gradients first, in a backward later.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return hooked or not torch.is_grad_enabled() or recomputing()


@assumed(
    "autograd tells whether a backward is running, whether saved tensors are hooked, and whether a storage still exists",
    "torch 2.11 to 2.14",
)
def recomputation_is_seen() -> bool:
    """Both kinds of checkpointing, and a plain forward."""
    seen: list[tuple[bool, bool]] = []

    def note(x: Tensor) -> Tensor:
        seen.append((recomputing(), checkpointed()))
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    note(x)
    for reentrant in (False, True):
        checkpoint(note, x, use_reentrant=reentrant).backward()
    kept = StorageWeakRef((y := torch.ones(1)).untyped_storage())
    alive = not kept.expired()
    del y
    return alive and kept.expired() and seen == [(False, False), *[(False, True), (True, True)] * 2]


def where(x: Tensor) -> tuple:
    """What identifies the memory of a tensor."""
    return x.data_ptr(), tuple(x.shape), x.dtype
