"""The default process group, or one process without a group."""

from __future__ import annotations

import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Waits for all ranks; returns at once without a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
