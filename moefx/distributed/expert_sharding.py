"""Expert parallelism: the mesh of ranks that share the experts, and experts' parameters as DTensors ``Shard(0)`` on it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moefx.distributed import devices
from moefx.errors import MoefxError
from moefx.integrations import fsdp as sharded
from moefx.integrations import transformers as hf
from moefx.integrations.transformers.sharded_experts import experts_over_ranks
from moefx.ir.plan import Plan, Tune
from moefx.options import Options

if TYPE_CHECKING:
    from moefx.backends import Backend


def make_mesh(model: nn.Module, ep_size: int, mesh: DeviceMesh | None) -> tuple[int, DeviceMesh | None]:
    """Checks ``ep_size`` against the experts, the ranks and ``mesh``; returns (ep_size, mesh with a dimension "ep" or None).

    Without ``mesh`` each ``ep_size`` neighbouring ranks are a group: dimensions ("dp_replicate", "ep").
    """
    existing = experts_mesh(model)
    if existing is not None:
        size = existing["ep"].size()
        if mesh is not None or ep_size not in (1, size):
            raise MoefxError(f"the experts are sharded across {size} ranks already: leave mesh and ep_size out")
        return size, existing
    if mesh is not None:
        names = mesh.mesh_dim_names or ()
        if "ep" not in names:
            raise MoefxError(f'mesh has the dimensions {names or "(unnamed)"}, none is "ep": name one with mesh_dim_names')
        size = mesh["ep"].size()
        if ep_size not in (1, size):
            raise MoefxError(f'ep_size={ep_size} but mesh["ep"] has {size} ranks: pass one of the two')
        extra = [n for n in names if n not in ("dp_replicate", "ep")]
        if extra:
            raise MoefxError(f'mesh dimension {extra[0]!r} is not known here: use "dp_replicate" and "ep"')
        ep_size = size
    if not isinstance(ep_size, int) or ep_size < 1:
        raise MoefxError(f"ep_size={ep_size!r} is not a positive whole number")
    if ep_size == 1:
        return 1, None
    check_experts(model, ep_size)
    if not dist.is_available() or not dist.is_initialized():
        raise MoefxError(
            f"ep_size={ep_size} needs a process group and none is initialized: start with torchrun --nproc-per-node {ep_size} "
            "and call torch.distributed.init_process_group() before optimize"
        )
    world = dist.get_world_size()
    if world % ep_size:
        raise MoefxError(f"ep_size={ep_size} does not divide the {world} ranks: start a multiple of {ep_size}")
    if mesh is None:
        kind = devices.of_rank(model).type
        mesh = init_device_mesh(kind, (world // ep_size, ep_size), mesh_dim_names=("dp_replicate", "ep"))
    return ep_size, mesh


def move_to_mesh(model: nn.Module, mesh: DeviceMesh) -> None:
    """Moves a model from the CPU to this rank's GPU, the current one, where the mesh is one of GPUs."""
    if mesh.device_type == "cuda" and next(model.parameters()).device.type == "cpu":
        model.to(torch.device("cuda", torch.cuda.current_device()))


def check_experts(model: nn.Module, ep_size: int) -> None:
    """Raises MoefxError, with both numbers, if the experts cannot be sharded across ``ep_size`` ranks."""
    found = hf.experts_modules(model)
    if not found:
        raise MoefxError(
            f"ep_size={ep_size}, but {type(model).__name__} does not use Transformers' experts interface, so its experts "
            "cannot be sharded across ranks: use ep_size=1"
        )
    for path, module in found.items():
        experts = getattr(module, hf.experts_layout(module).up).shape[0]
        if experts % ep_size:
            fits = [n for n in range(1, experts + 1) if experts % n == 0]
            raise MoefxError(
                f"ep_size={ep_size} does not divide the {experts} experts of {path}: choose one of {', '.join(map(str, fits))}"
            )


def plan(
    model: nn.Module, options: Options, backends: tuple[Backend, ...], ep_size: int = 1, mesh: DeviceMesh | None = None
) -> Plan:
    """The plan of a model whose experts are, or will be, sharded across ``mesh["ep"]``."""
    if options.dispatch_dtype and ep_size == 1:
        raise MoefxError(f"dispatch_dtype={options.dispatch_dtype!r}, but ep_size=1: no token is dispatched; leave it out")
    made = Plan(
        backends,
        compile=options.compile,
        strict=options.strict,
        router_z_loss=float(options.router_z_loss),
        balanced_routing=options.balanced_routing,
        check_numerics=options.check_numerics,
        dispatch_capacity=options.dispatch_capacity,
        tune=Tune.of(options.tune),
        dispatch_dtype=options.dispatch_dtype or "",
    )
    if mesh is None:
        return made
    ep, scale = mesh["ep"], experts_gradient_scale(model, ep_size)
    group, rank = ep.get_group().group_name, ep.get_local_rank()
    return replace(made, ep_size=ep_size, ep_group=group, ep_rank=rank, mesh=mesh, experts_gradient_scale=scale)


def shard_experts(model: nn.Module, plan: Plan) -> list[str]:
    """Replaces experts' parameters by DTensors ``Shard(0)`` on ``plan.mesh["ep"]``; returns their names.

    The values are those of the group's first rank, so that ranks with different seeds agree. Create optimizers afterwards: the
    parameters are new objects. Where the experts are replicated ("dp_replicate"), their gradients are averaged over the
    replicas as they are accumulated; DDP ignores them.
    """
    assert plan.mesh is not None
    names = shard_parameters(model, plan.mesh["ep"], replicas_of(plan.mesh))
    tell_ddp(model)
    return names


def replicas_of(mesh: DeviceMesh) -> DeviceMesh | None:
    """The mesh of the ranks that hold the same experts, if there are several."""
    return mesh["dp_replicate"] if "dp_replicate" in (mesh.mesh_dim_names or ()) else None


def tell_ddp(model: nn.Module) -> None:
    """Marks experts' parameters as ignored by torch.nn.parallel.DistributedDataParallel."""
    sharded_names = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
    before = vars(model).get("_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = list(dict.fromkeys([*before, *sharded_names]))  # type: ignore[assignment]


def shard_parameters(model: nn.Module, ep: DeviceMesh, replicas: DeviceMesh | None = None) -> list[str]:
    """Makes experts' parameters DTensors ``Shard(0)`` on ``ep``, with gradients averaged over ``replicas``; their names."""
    names = []
    for path, module in hf.experts_modules(model).items():
        for name in hf.experts_layout(module).parameters:
            full = getattr(module, name)
            new = nn.Parameter(_shard(full.detach(), ep, replicas), requires_grad=full.requires_grad)
            for key, kept in vars(full).items():  # attributes that Transformers sets on parameters
                setattr(new, key, kept)
            setattr(module, name, new)
            names.append(f"{path}.{name}")
        if hf.is_dense_experts(module):
            module.forward = functools.partial(_dense_experts_forward, module)
    average_over_replicas(model, replicas)
    return names


def average_over_replicas(model: nn.Module, replicas: DeviceMesh | None) -> None:
    """Averages experts' gradients over the ranks that hold the same experts, as they are accumulated.

    Called again in each forward: parameters of a copied model have lost the hook.
    """
    if replicas is None or replicas.size() == 1:
        return
    average = _average_over(replicas)
    for module in hf.experts_modules(model).values():
        for p in module.parameters(recurse=False):
            hooks: Any = getattr(p, "_post_accumulate_grad_hooks", None) or {}
            if p.requires_grad and isinstance(p, DTensor) and average not in hooks.values():
                p.register_post_accumulate_grad_hook(average)


def _dense_experts_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """The forward of experts that run on every token (``hf.is_dense_experts``), in a call that no captured graph covers.

    hidden_states [E * T, H], by expert, zeros but for each token's own experts. It dispatches and combines as graphs do, since
    another rank may run a graph.
    """
    layout = hf.experts_layout(module)
    rows = hidden_states.view(getattr(module, layout.up).shape[0], -1, hidden_states.shape[-1])
    index = rows.detach().abs().amax(-1).argmax(0)
    token = torch.arange(len(index), device=index.device)
    x, ones = rows[index, token], rows.new_ones(len(index), 1)
    done = experts_over_ranks(x, index.unsqueeze(1), ones, module, layout)
    return torch.zeros_like(rows).index_put((index, token), done).view_as(hidden_states)


def _shard(full: Tensor, ep: DeviceMesh, replicas: DeviceMesh | None) -> DTensor:
    if full.is_meta:
        local = full.new_empty((full.shape[0] // ep.size(), *full.shape[1:]))
        return DTensor.from_local(local, ep, [Shard(0)], run_check=False)
    sharded = distribute_tensor(full, ep, [Shard(0)])
    if replicas is not None and replicas.size() > 1:
        group = replicas.get_group()
        dist.broadcast(sharded.to_local(), src=dist.get_global_rank(group, 0), group=group)
    return sharded


@functools.cache
def _average_over(replicas: DeviceMesh) -> Any:
    group, many = replicas.get_group(), replicas.size()

    def average(parameter: Tensor) -> None:
        # right under accumulation too: what was there before is the same on every replica
        assert isinstance(parameter.grad, DTensor)
        local = parameter.grad.to_local()
        dist.all_reduce(local, group=group)
        local /= many

    return average


def gather_experts(model: nn.Module) -> None:
    """The inverse of ``shard_experts``: every rank holds all experts again, as plain parameters."""
    for module in hf.experts_modules(model).values():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                setattr(module, name, nn.Parameter(_whole(parameter), requires_grad=parameter.requires_grad))
        if hf.is_dense_experts(module):
            vars(module).pop("forward", None)
    vars(model).pop("_ddp_params_and_buffers_to_ignore", None)


def _whole(parameter: DTensor) -> Tensor:
    if parameter.is_meta:  # full_tensor needs a process group for the device
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return parameter.full_tensor().detach()


def experts_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh, with a dimension "ep", across which the experts are sharded already; None if they are not sharded.

    Raises:
        MoefxError: moefx does not support the layout: experts sharded along another dimension, or ranks of the group that share
            a batch (tensor parallelism).
    """
    found: dict[str, Any] = {}
    for path, module in hf.experts_modules(model).items():
        p: Any
        for name, p in module.named_parameters(recurse=False):
            if isinstance(p, DTensor) and "ep" in (p.device_mesh.mesh_dim_names or ()):
                found[f"{path}.{name}"] = p
    if not found:
        return None
    name, p = next(iter(found.items()))
    placement = p.placements[(p.device_mesh.mesh_dim_names or ()).index("ep")]
    if not placement.is_shard(0):
        raise MoefxError(f'{name} is {placement} on the mesh dimension "ep": moefx needs experts sharded by expert, Shard(0)')
    config: Any = getattr(model.config, "distributed_config", None)
    if getattr(config, "tp_size", 1) > 1:
        raise MoefxError(
            f"the model was loaded with tp_size={config.tp_size}: its ranks share batches, with moefx each has its own; use "
            "DistributedConfig(fsdp_size=..., ep_size=...)"
        )
    return p.device_mesh


def experts_gradient_scale(model: nn.Module, ep_size: int) -> float:
    """The factor of the experts' local gradients with which they are the mean over all ranks after FSDP's reduction.

    1 where FSDP has a divisor for the experts (Transformers sets one: the number of all ranks).
    """
    for module in hf.experts_modules(model).values():
        if isinstance(module, FSDPModule) and any(g.gradient_divide_factor is not None for g in sharded.groups(module)):
            return 1.0
    return 1.0 / ep_size
