"""Shards the parameters of a model: dense ones by FSDP2 over all ranks, experts by expert, then by FSDP2.

For every family that uses Transformers' experts interface, with or without a plan in its configuration. The model is marked as
Transformers marks models that it shards itself, which its Trainer reads.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Set
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.weak import WeakIdKeyDictionary
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.distributed.utils import TransformersDeviceMesh

from moefx.distributed import expert_sharding, single_process
from moefx.distributed.layout import Layout
from moefx.integrations import transformers as hf

#: Bytes of gathered parameters that a unit of several blocks may have. Two units are gathered at a time, one of them in use.
UNIT_BYTES = 1 << 28


def shard(model: Any, layout: Layout, meshes: TransformersDeviceMesh | None) -> Any:
    """Shards the parameters of a Transformers model in place and returns it; without meshes (one rank) only moves it."""
    if meshes is None:
        single_process.warn_ignored(model, layout.mp_policy, layout.offload_policy)
        single_process.add_fsdp_methods(model)
        return model if next(model.parameters()).is_meta else model.to(layout.device)
    replicated = ("dp_replicate",) if layout.dp_replicate > 1 else ()
    dense = meshes.get_mesh((*replicated, "fsdp"))
    if layout.ep_size > 1:
        expert_sharding.check_experts(model, layout.ep_size)
        meshes.get_mesh(("efsdp", "ep"))._flatten("experts")  # norms of experts' gradients: one reduction, not two
        expert_sharding.shard_parameters(model, meshes.get_mesh("ep"))
    unmanaged = _unmanaged_experts(model, layout)
    policies: dict[str, Any] = {
        "mp_policy": layout.mp_policy,
        "reshard_after_forward": layout.reshard_after_forward,
        "offload_policy": layout.offload_policy,
        "shard_placement_fn": _placements_by_width(model, layout).get,
        "ignored_params": unmanaged,
    }
    if layout.ep_size > 1 and not unmanaged:
        for experts in hf.experts_modules(model).values():
            fully_shard(experts, mesh=meshes.get_mesh((*replicated, "efsdp")), **policies)
    blocks = list(hf.blocks(model).values())
    for part in [part for block in blocks for part in _of_another_dtype(block, unmanaged)]:
        fully_shard(part, mesh=dense, **policies)
    for unit in _units(blocks, unmanaged):
        fully_shard(unit, mesh=dense, **policies)
    fully_shard(model, mesh=dense, **{**policies, "reshard_after_forward": False})
    model.config.distributed_config = layout.config
    model._mesh_manager, model._device_mesh = meshes, meshes.get_mesh(("pp", "fsdp", "tp"))
    model._tp_size, model._fsdp_size = 1, layout.fsdp
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True
    return model


def _unmanaged_experts(model: Any, layout: Layout) -> set[nn.Parameter]:
    """Experts' parameters that FSDP would have nothing to do for: no other rank has a part or a copy of them.

    FSDP would gather each rank's from itself, twice a step, and copy their gradients. It still manages them where it casts or
    offloads them.
    """
    found = {p for module in hf.experts_modules(model).values() for p in module.parameters()} if layout.ep_size > 1 else set()
    cast = layout.mp_policy.param_dtype
    moved = isinstance(layout.offload_policy, CPUOffloadPolicy) or any(cast not in (None, p.dtype) for p in found)
    return set() if layout.efsdp > 1 or layout.dp_replicate > 1 or moved else found


def _units(blocks: list[nn.Module], ignored: Set[nn.Parameter]) -> list[list[nn.Module]]:
    """Neighbouring blocks that FSDP gathers together: one, or without their experts as many as fit into UNIT_BYTES.

    The CPU time of a unit (hooks, streams, events, two collectives) is then spent once for all of them.
    """
    found: list[list[nn.Module]] = []
    left = 0
    for block in blocks:
        size = sum(p.numel() * p.element_size() for p in block.parameters() if p not in ignored)
        if not ignored or size > left:
            found.append([])
            left = UNIT_BYTES
        found[-1].append(block)
        left -= size
    return found


def _placements_by_width(model: Any, layout: Layout) -> MutableMapping[nn.Parameter, Shard]:
    """Experts' weights whose number of experts FSDP's ranks cannot share evenly: these are sharded along the hidden size.

    (Not along the intermediate size, in which many checkpoints have two tensors where the model has one.)
    """
    found = WeakIdKeyDictionary()
    for module in hf.experts_modules(model).values() if _width_is_kept(model) else ():
        transposed = hf.is_dense_experts(module) or module.is_transposed
        for name, p in module.named_parameters(recurse=False):
            # down is [E, H, I], up and gate [E, 2 I, H], or transposed; biases, which no checkpoint splits, are [E, width]
            width = 1 if p.dim() == 2 or ("down" in name) != transposed else 2
            if p.dim() > 1 and p.shape[0] // layout.ep_size % layout.efsdp and p.shape[width] % layout.efsdp == 0:
                found[p] = Shard(width)
    return found


def _width_is_kept(model: Any) -> bool:
    """Do Transformers' weight conversions of the family leave the experts' hidden size alone? (They convert shards.)"""
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    ops = [op for c in converters if any("experts" in t for t in c.target_patterns) for op in c.operations]
    return all(isinstance(op, MergeModulelist) or (isinstance(op, Concatenate) and op.dim == 1) for op in ops)


def _of_another_dtype(block: nn.Module, ignored: Set[nn.Parameter]) -> list[nn.Module]:
    """Modules whose own parameters have another dtype than most of the block's: FSDP2 requires one dtype per unit."""
    elements: dict[torch.dtype, int] = {}
    for p in block.parameters():
        if p not in ignored:
            elements[p.dtype] = elements.get(p.dtype, 0) + p.numel()
    most = max(elements, key=elements.__getitem__) if elements else None
    return [m for m in block.modules() if any(p.dtype != most for p in m.parameters(recurse=False) if p not in ignored)]
