"""Starting the ranks of a benchmark under torchrun: one on each GPU, several on one GPU, or on the CPU."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def start(device: str, timeout: timedelta = timedelta(minutes=8)) -> tuple[int, int, torch.device]:
    """This rank, the number of ranks, this rank's device. Python objects travel over gloo, so that ranks that wait for one
    another do not fill the GPU with waiting kernels; tensors over NCCL.
    """
    rank, ranks, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not device.startswith("cuda"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", timeout=timeout)
        return rank, ranks, torch.device(device)
    if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")  # NCCL 2.30 and later
        os.environ.setdefault("NCCL_MAX_NCHANNELS", "2")  # the buffers of all ranks' communicators share one memory
    if ranks == int(os.environ["LOCAL_WORLD_SIZE"]):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(found)
    torch.zeros(1, device=found)  # else a DeviceMesh believes that nobody has chosen a device, and takes cuda:LOCAL_RANK
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    return rank, ranks, found


def from_first(value: Any) -> Any:
    """What rank 0 has, on every rank; the others wait without touching the GPU."""
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]
