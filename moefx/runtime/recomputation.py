"""Activation checkpointing: is this forward one that autograd runs again, and which routes did it take the first time?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from moefx.internals.assumptions import assumed
from moefx.ops.dispatch_combine import Dispatches


@dataclass(eq=False)
class Kept:
    """The choices of a forward that autograd will run again: as long as the input that it was run on exists."""

    storage: StorageWeakRef
    where: tuple
    index: list[Tensor]
    dispatches: Dispatches  #: which rows went where


def recomputing() -> bool:
    """Does autograd run this forward, in the middle of a backward, because activation checkpointing dropped its tensors?"""
    return torch._C._current_graph_task_id() != -1


def checkpointed() -> bool:
    """Is this a forward that autograd will run again, or is running again?

    Non-reentrant checkpointing hooks what is saved; reentrant checkpointing saves nothing at first, and is a backward later.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return hooked or not torch.is_grad_enabled() or recomputing()


@assumed(
    "autograd says whether it runs a backward, whether what is saved is hooked, and whether memory still exists",
    "torch 2.11 to 2.14",
)
def recomputation_is_seen() -> bool:
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
    return x.data_ptr(), tuple(x.shape), x.dtype
