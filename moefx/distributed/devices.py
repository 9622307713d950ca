"""The device of a rank: under NCCL its own GPU, even if none was set; two ranks on one GPU are an error."""

from __future__ import annotations

import itertools
import os
import socket

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from moefx.errors import MoefxError
from moefx.internals import nccl

#: From this version on, with NCCL_MULTI_RANK_GPU_ENABLE=1, NCCL lets several ranks share a GPU.
SHARING = (2, 30)
_rounds = itertools.count()


def of_rank(model: nn.Module | None = None) -> torch.device:
    """The device that this rank trains on, made the current one.

    The CPU where there is no CUDA device, or where the process group does not use NCCL for CUDA tensors
    (``init_process_group("gloo")``) and the model is not on a GPU already. Else the model's GPU; else the current one, if it
    was chosen by ``torch.cuda.set_device``; else that of LOCAL_RANK (torchrun, accelerate) or SLURM_LOCALID. Without a process
    group (one process) likewise. All ranks call it.

    Raises:
        MoefxError: two ranks would use one GPU, which NCCL refuses with "invalid usage".
    """
    given = next((p.device for p in model.parameters() if p.is_cuda), None) if model is not None else None
    if not torch.cuda.is_available() or (given is None and _is_initialized() and not _over_nccl()):
        return torch.device("cpu")
    index = torch.cuda.current_device() if given is None or given.index is None else given.index
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    if given is None and index == 0:
        index = local % torch.cuda.device_count()
    torch.cuda.set_device(index)
    device = torch.device("cuda", index)
    if _over_nccl() and not _may_share():
        _refuse_sharing(device)
    return device


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _over_nccl() -> bool:
    """Does the process group use NCCL for CUDA tensors? (The configuration of gloo alone is "cpu:gloo,cuda:gloo".)"""
    if not _is_initialized():
        return False
    by_device = dict(part.split(":", 1) for part in dist.get_backend_config().split(",") if ":" in part)
    return "nccl" in by_device.get("cuda", "")


def _may_share() -> bool:
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and nccl.version() >= SHARING


def _refuse_sharing(device: torch.device) -> None:
    """Raises MoefxError if another rank uses this rank's GPU too. By the process group's store: a collective would fail."""
    store, rank, world = _get_default_store(), dist.get_rank(), dist.get_world_size()
    key = f"moefx/devices/{next(_rounds)}"
    store.set(f"{key}/{rank}", f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}")
    used = [store.get(f"{key}/{r}") for r in range(world)]  # waits for the other ranks
    others = [r for r in range(world) if r != rank and used[r] == used[rank]]
    if others:
        first, second = sorted((rank, others[0]))
        raise MoefxError(
            f"ranks {first} and {second} both use {device} of {socket.gethostname()}, which shows {torch.cuda.device_count()} "
            "GPU(s): start one rank per GPU and call torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) before the model is "
            "moved to the GPU; NCCL 2.30 and later let ranks share one with NCCL_MULTI_RANK_GPU_ENABLE=1"
        )
