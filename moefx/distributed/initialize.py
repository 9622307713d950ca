"""Random weights for a sharded model on the meta device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moefx.distributed.process_group import rank_and_world
from moefx.integrations import fsdp


def initialize(model: Any, device: torch.device) -> None:
    """Initializes a model on meta, module by module, as Transformers would.

    Initializations are written for whole tensors: each rank draws those of one module at a time, with the first rank's seed,
    and keeps its shards.
    """
    rank, world = rank_and_world()
    seed = [torch.initial_seed()]
    if world > 1:
        dist.broadcast_object_list(seed)
    model._move_missing_keys_from_meta_to_device(set(model.state_dict()), {"": device}, model._device_mesh, None)
    model.tie_weights(recompute_mapping=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed[0])
        for path, module in tqdm(list(model.named_modules()), desc="initializing", disable=rank > 0):
            sharded = {n: p for n, p in module._parameters.items() if isinstance(p, DTensor)}
            for name, p in sharded.items():
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad)
            _owner_of(model, path)._initialize_weights(module)
            for name, p in sharded.items():
                fsdp.fill(p, module._parameters[name])
                module._parameters[name] = p


def _owner_of(model: PreTrainedModel, path: str) -> Any:
    """The innermost ``PreTrainedModel`` around a module, which knows how to initialize it."""
    around = [m for p, m in model.named_modules() if not p or f"{path}.".startswith(f"{p}.")]
    return [m for m in around if isinstance(m, PreTrainedModel)][-1]
