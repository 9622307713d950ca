"""Spreading a model over ranks: dense parameters by FSDP2 over all of them, experts over ep x efsdp.

Meshes, loading and the marks that the Trainer reads are Transformers' own (``transformers.distributed``); what is cut how is
decided here, for every family that uses the experts interface, with or without a plan in its configuration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.utils import is_accelerate_available

from moefx.distributed import checkpoint, devices, expert_sharding, single_process
from moefx.errors import MoefxError
from moefx.integrations import fsdp as sharded
from moefx.integrations import transformers as hf
from moefx.integrations.peft import unwrap_peft
from moefx.integrations.transformers.auto import auto_class
from moefx.internals import transformers_patches

#: Bytes of gathered parameters that a unit of several blocks may have. Two units are there at a time: one is used, one arrives.
UNIT = 1 << 28


@dataclass(frozen=True)
class Layout:
    """How parameters are cut: world = dp_replicate x fsdp, and fsdp = efsdp x ep for the experts."""

    ep_size: int
    dp_replicate: int
    fsdp: int
    mp_policy: MixedPrecisionPolicy
    reshard_after_forward: bool | int
    offload_policy: OffloadPolicy
    device: torch.device  #: where this rank's shards lie

    @property
    def efsdp(self) -> int:
        return self.fsdp // self.ep_size

    @property
    def config(self) -> DistributedConfig:
        return DistributedConfig(
            fsdp_size=self.fsdp,
            dp_replicate_size=self.dp_replicate,
            ep_size=self.ep_size,
            fsdp_cpu_offload=isinstance(self.offload_policy, CPUOffloadPolicy),
            fsdp_mixed_precision=self.mp_policy.param_dtype is not None,
        )


def spread(model: Any, layout: Layout, dtype: torch.dtype | None = None) -> Any:
    """A model, or that of a checkpoint folder, sharded over all ranks: what :func:`moefx.parallelize` does first."""
    if isinstance(model, (str, os.PathLike)):
        return _load(Path(model), layout, dtype)
    if dtype is not None:
        raise MoefxError(f"dtype={dtype} is for a checkpoint folder, but a {type(model).__name__} was given: convert it before")
    there: Any = unwrap_peft(model)
    hf.check(there)
    if sharded.is_sharded(there) or getattr(there, "_moefx", None) is not None:
        raise MoefxError(f"{type(there).__name__} is optimized or spread over ranks already: parallelize comes first")
    _check_experts(there, layout)
    meta = next(there.parameters()).is_meta
    _distribute(there, layout, _meshes(layout))
    if meta:
        initialize(there, layout.device)
    return model


def layout(ep_size: int, dp_replicate: int, mp: Any, reshard: bool | int, offload: Any, model: Any = None) -> Layout:
    """Checks the sizes against the ranks, and takes this rank's device: that of ``model``, if it is one and on a GPU."""
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
    fsdp = world // dp_replicate
    there = unwrap_peft(model)
    device = devices.of_rank(there if isinstance(there, torch.nn.Module) else None)
    return Layout(ep_size, dp_replicate, fsdp, mp or MixedPrecisionPolicy(), reshard, offload or OffloadPolicy(), device)


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


def _check_experts(model: PreTrainedModel, layout: Layout) -> None:
    if layout.ep_size > 1:
        expert_sharding.check_experts(model, layout.ep_size)


def _meshes(layout: Layout) -> TransformersDeviceMesh | None:
    """The two views of the ranks, as ``transformers.distributed`` names their dimensions; None for one rank."""
    if layout.dp_replicate * layout.fsdp == 1:
        return None
    kind, names = layout.device.type, ("pp", "dp_replicate")
    dense = init_device_mesh(kind, (1, layout.dp_replicate, layout.fsdp, 1), mesh_dim_names=(*names, "fsdp", "tp"))
    sizes = (1, layout.dp_replicate, layout.efsdp, layout.ep_size)
    return TransformersDeviceMesh(dense, init_device_mesh(kind, sizes, mesh_dim_names=(*names, "efsdp", "ep")))


# --- cutting ---------------------------------------------------------------------------------------------------------


def _distribute(model: Any, layout: Layout, meshes: TransformersDeviceMesh | None) -> Any:
    """Cuts the parameters and marks the model as Transformers marks what it cut itself: its Trainer reads that."""
    if meshes is None:  # one rank
        single_process.warn_ignored(model, layout.mp_policy, layout.offload_policy)
        single_process.add_fsdp_methods(model)
        return model if next(model.parameters()).is_meta else model.to(layout.device)
    replicated = ("dp_replicate",) if layout.dp_replicate > 1 else ()
    dense, policies = meshes.get_mesh((*replicated, "fsdp")), _policies(layout)
    if layout.ep_size > 1:
        _check_experts(model, layout)
        meshes.get_mesh(("efsdp", "ep"))._flatten("experts")  # norms of experts' gradients: one reduction, not two
        expert_sharding.shard_parameters(model, meshes.get_mesh("ep"))
    policies["shard_placement_fn"] = _cut_by_width(model, layout).get
    policies["ignored_params"] = nobody_else_has = _experts_of_one_rank(model, layout)
    if layout.ep_size > 1 and not nobody_else_has:
        for experts in hf.experts_modules(model).values():
            fully_shard(experts, mesh=meshes.get_mesh((*replicated, "efsdp")), **policies)
    blocks = list(hf.blocks(model).values())
    for part in [part for block in blocks for part in _of_another_dtype(block, nobody_else_has)]:
        fully_shard(part, mesh=dense, **policies)
    for unit in _units(blocks, nobody_else_has):
        fully_shard(unit, mesh=dense, **policies)
    fully_shard(model, mesh=dense, **{**policies, "reshard_after_forward": False})
    model.config.distributed_config = layout.config
    model._mesh_manager, model._device_mesh = meshes, meshes.get_mesh(("pp", "fsdp", "tp"))
    model._tp_size, model._fsdp_size = 1, layout.fsdp
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True
    return model


def _experts_of_one_rank(model: Any, layout: Layout) -> set[nn.Parameter]:
    """Experts' parameters that FSDP has nothing to do for: no other rank has a part of them, nor a copy. FSDP would gather each
    rank's from itself, twice a step, and copy their gradients. It is left to it where it casts or offloads them.
    """
    found = {p for module in hf.experts_modules(model).values() for p in module.parameters()} if layout.ep_size > 1 else set()
    cast = layout.mp_policy.param_dtype
    moved = isinstance(layout.offload_policy, CPUOffloadPolicy) or any(cast not in (None, p.dtype) for p in found)
    return set() if layout.efsdp > 1 or layout.dp_replicate > 1 or moved else found


def _units(blocks: list[nn.Module], ignored: Set[nn.Parameter]) -> list[list[nn.Module]]:
    """Neighbouring blocks that FSDP gathers together: one, or without their experts as many as take UNIT bytes. What a unit
    costs the host (hooks, streams, events, two collectives) is then paid once for all of them.
    """
    found: list[list[nn.Module]] = []
    room = 0
    for block in blocks:
        size = sum(p.numel() * p.element_size() for p in block.parameters() if p not in ignored)
        if not ignored or size > room:
            found.append([])
            room = UNIT
        found[-1].append(block)
        room -= size
    return found


def _cut_by_width(model: Any, layout: Layout) -> MutableMapping[nn.Parameter, Shard]:
    """Weights of experts that FSDP's ranks cannot share evenly, some would hold none: these cut the hidden width instead.

    (Not the intermediate one, in which many checkpoints have two tensors where the model has one.)
    """
    found = WeakIdKeyDictionary()
    for module in hf.experts_modules(model).values() if _width_is_kept(model) else ():
        transposed = hf.is_dense_experts(module) or module.is_transposed
        for name, p in module.named_parameters(recurse=False):
            # down is [E, H, I], up and gate [E, 2 I, H], or transposed; biases, which no checkpoint has in parts, are all width
            width = 1 if p.dim() == 2 or ("down" in name) != transposed else 2
            if p.dim() > 1 and p.shape[0] // layout.ep_size % layout.efsdp and p.shape[width] % layout.efsdp == 0:
                found[p] = Shard(width)
    return found


def _width_is_kept(model: Any) -> bool:
    """Do Transformers' conversions of the family's checkpoints leave the experts' widths where they are? (They load shards.)"""
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    ops = [op for c in converters if any("experts" in t for t in c.target_patterns) for op in c.operations]
    return all(isinstance(op, MergeModulelist) or (isinstance(op, Concatenate) and op.dim == 1) for op in ops)


def _policies(layout: Layout) -> dict[str, Any]:
    return {
        "mp_policy": layout.mp_policy,
        "reshard_after_forward": layout.reshard_after_forward,
        "offload_policy": layout.offload_policy,
    }


def _of_another_dtype(block: nn.Module, ignored: Set[nn.Parameter]) -> list[nn.Module]:
    """The modules whose own parameters are of another dtype than most of the block's: FSDP2 wants one dtype a unit."""
    many: dict[torch.dtype, int] = {}
    for p in block.parameters():
        if p not in ignored:
            many[p.dtype] = many.get(p.dtype, 0) + p.numel()
    usual = max(many, key=many.__getitem__) if many else None
    return [m for m in block.modules() if any(p.dtype != usual for p in m.parameters(recurse=False) if p not in ignored)]


def initialize(model: Any, device: torch.device) -> None:
    """Random weights for a model on meta, module by module: each rank draws a whole module's (the same: the first rank's seed)
    and keeps its shards, since initializations are written for whole tensors.
    """
    seed, rank = [torch.initial_seed()], 0
    if dist.is_initialized():
        dist.broadcast_object_list(seed)
        rank = dist.get_rank()
    model._move_missing_keys_from_meta_to_device(set(model.state_dict()), {"": device}, model._device_mesh, None)
    model.tie_weights(recompute_mapping=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed[0])
        for path, module in tqdm(list(model.named_modules()), desc="initializing", disable=rank > 0):
            spread = {n: p for n, p in module._parameters.items() if isinstance(p, DTensor)}
            for name, p in spread.items():
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad)
            owner = _owner_of(model, path)
            owner._initialize_weights(module)
            for name, p in spread.items():
                sharded.fill(p, module._parameters[name])
                module._parameters[name] = p


def _owner_of(model: PreTrainedModel, path: str) -> Any:
    """The innermost ``PreTrainedModel`` around a module: it knows how to initialize it."""
    around = [m for p, m in model.named_modules() if not p or f"{path}.".startswith(f"{p}.")]
    return [m for m in around if isinstance(m, PreTrainedModel)][-1]


# --- loading ---------------------------------------------------------------------------------------------------------


def _load(folder: Path, layout: Layout, dtype: torch.dtype | None) -> Any:
    """Transformers' own loading (its conversion of layouts, its progress bar), of this rank's shards."""
    checkpoint.finish_save(folder)
    if not (folder / "config.json").is_file():
        raise MoefxError(f"there is no {folder / 'config.json'}: pass a folder in Hugging Face layout, or a model")
    if not is_accelerate_available():
        raise MoefxError(f"loading {folder} over ranks needs accelerate, which is not installed: pip install moefx[train]")
    chosen: Mapping[str, Any] = {} if dtype is None else {"dtype": dtype}
    loader: Any = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained
    with _distributing(layout, folder):
        model, info = loader(
            folder, distributed_config=layout.config, output_loading_info=True, ignore_mismatched_sizes=True, **chosen
        )
    for name, there, wanted in sorted(info["mismatched_keys"]):  # which Transformers' own error does not name
        raise MoefxError(f"{folder} has {name} of shape {tuple(there)}, the model of {tuple(wanted)} (of this rank's part)")
    for what, said in (("missing_keys", "lacks"), ("unexpected_keys", "has, and the model has not,")):
        names = sorted(map(str, info[what]))
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise MoefxError(f"{folder} {said} {names[0]}{more}: load the checkpoint that belongs to this configuration")
    return model


@contextmanager
def _distributing(layout: Layout, folder: Path) -> Iterator[None]:
    """Within: ``from_pretrained`` checks the files and cuts the empty model as ``parallelize`` does, before it reads any."""

    def prepare(cls: type, config: Any, device_map: Any = None) -> tuple[Any, Any, TransformersDeviceMesh | None]:
        return layout.config, layout.device, _meshes(layout)

    asked = []

    def distribute(cls: type, model: Any, config: Any, meshes: TransformersDeviceMesh | None) -> Any:
        asked.append(model)
        checkpoint.check_files(folder, model)
        return _distribute(model, layout, meshes)

    with transformers_patches.distributed_loading(prepare, distribute, _transposing_parts):
        yield
    if not asked:
        raise MoefxError(
            f"transformers {transformers.__version__} loaded {folder} without asking PreTrainedModel.maybe_distribute_model "
            "how to spread it: use transformers 5.23 to 5.24"
        )


def _transposing_parts(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' ``Transpose.convert`` for what a rank has read of a tensor. With ``check_dims`` it leaves a tensor as it is
    that has the parameter's shape (Qwen3-VL-MoE's experts are published one way and saved the other); of a spread parameter it
    takes the whole one's, which no part has.
    """

    def convert_part(self: Any, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> Any:
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"]) if self.check_dims else None
        if isinstance(parameter, DTensor):
            (tensors,) = input_dict.values()
            part = tensors[0] if isinstance(tensors, list) else tensors
            if part.shape == parameter.to_local().shape:
                return {self.get_target_pattern(input_dict, source_patterns, target_patterns): part}
        return convert(self, input_dict, source_patterns, target_patterns, **kwargs)

    return convert_part
