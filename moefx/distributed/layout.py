"""How the parameters of a model are sharded: the sizes of ``parallelize``, checked against the ranks, and their meshes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh

from moefx.distributed import devices
from moefx.errors import MoefxError
from moefx.integrations.peft import unwrap_peft


@dataclass(frozen=True)
class Layout:
    """World = dp_replicate x fsdp ranks shard the dense parameters, and fsdp = efsdp x ep the experts."""

    ep_size: int
    dp_replicate: int
    fsdp: int
    mp_policy: MixedPrecisionPolicy
    reshard_after_forward: bool | int
    offload_policy: OffloadPolicy
    device: torch.device  #: of this rank's shards

    @property
    def efsdp(self) -> int:
        """Ranks that hold the same experts and shard them by FSDP2."""
        return self.fsdp // self.ep_size

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp_replicate * self.fsdp

    @property
    def config(self) -> DistributedConfig:
        """The same for Transformers, which writes it into the model's configuration."""
        return DistributedConfig(
            fsdp_size=self.fsdp,
            dp_replicate_size=self.dp_replicate,
            ep_size=self.ep_size,
            fsdp_cpu_offload=isinstance(self.offload_policy, CPUOffloadPolicy),
            fsdp_mixed_precision=self.mp_policy.param_dtype is not None,
        )


def make_layout(
    ep_size: int,
    dp_replicate: int,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int = True,
    offload_policy: OffloadPolicy | None = None,
    model: Any = None,
) -> Layout:
    """Checks the sizes against the ranks and determines this rank's device: that of ``model``, if it is one and on a GPU.

    Raises:
        MoefxError: a size is not positive or does not divide the ranks; there is no process group and one is needed.
    """
    for name, n in (("ep_size", ep_size), ("dp_replicate", dp_replicate)):
        if not isinstance(n, int) or n < 1:
            raise MoefxError(f"{name}={n!r} is not a positive whole number")
    world = _world_size(ep_size, dp_replicate)
    if world % dp_replicate:
        raise MoefxError(f"dp_replicate={dp_replicate} does not divide the {world} ranks")
    if (world // dp_replicate) % ep_size:
        raise MoefxError(
            f"ep_size={ep_size} does not divide the {world // dp_replicate} ranks of a replica ({world} ranks, "
            f"dp_replicate={dp_replicate})"
        )
    unwrapped = unwrap_peft(model)
    device = devices.of_rank(unwrapped if isinstance(unwrapped, nn.Module) else None)
    mp_policy, offload_policy = mp_policy or MixedPrecisionPolicy(), offload_policy or OffloadPolicy()
    return Layout(ep_size, dp_replicate, world // dp_replicate, mp_policy, reshard_after_forward, offload_policy, device)


def _world_size(ep_size: int, dp_replicate: int) -> int:
    """The ranks of the process group; 1 without a group, if one process is all that was started and is enough.

    Raises:
        MoefxError: there is no group and the sizes ask for more than one rank, or torchrun has started several processes.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    wanted, started = ep_size * dp_replicate, int(os.environ.get("WORLD_SIZE", 1))
    if wanted > 1:
        sizes = ", ".join(f"{n}={size}" for n, size in (("ep_size", ep_size), ("dp_replicate", dp_replicate)) if size > 1)
        raise MoefxError(
            f"{sizes} needs a process group and none is initialized: start with torchrun --nproc-per-node {wanted} and call "
            "torch.distributed.init_process_group() before parallelize"
        )
    if started > 1:  # each process would train a model of its own
        raise MoefxError(
            f"WORLD_SIZE={started}, but no process group is initialized: call torch.distributed.init_process_group() before "
            "parallelize"
        )
    return 1


def make_meshes(layout: Layout) -> TransformersDeviceMesh | None:
    """The meshes of the dense parameters and of the experts, with Transformers' names of dimensions; None for one rank."""
    if layout.world_size == 1:
        return None
    kind, names = layout.device.type, ("pp", "dp_replicate")
    dense = init_device_mesh(kind, (1, layout.dp_replicate, layout.fsdp, 1), mesh_dim_names=(*names, "fsdp", "tp"))
    sizes = (1, layout.dp_replicate, layout.efsdp, layout.ep_size)
    return TransformersDeviceMesh(dense, init_device_mesh(kind, sizes, mesh_dim_names=(*names, "efsdp", "ep")))
