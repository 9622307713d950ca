"""Models whose parameters are spread over ranks already: by FSDP2, by Transformers when it loads them, or by ``optimize``.

Capture sees such a model as one process would hold it: whole parameters, no hooks that gather them, the experts' own forward. A
captured graph does not call the modules inside its block, so it enters and leaves their FSDP units itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from . import hf
from .errors import MoefxError


def is_fsdp_hook(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def units(module: nn.Module) -> list[nn.Module]:
    """The FSDP units inside ``module``, itself excluded: their hooks must run around a graph that stands for them."""
    found = [m for m in module.modules() if m is not module and any(map(is_fsdp_hook, m._forward_pre_hooks.values()))]
    for m in module.modules():
        if isinstance(m, FSDPModule) and m is not module and m not in found:
            raise MoefxError(
                f"the hooks of an FSDP2 unit ({type(m).__name__}) are not those that moefx knows, it would train on parameters "
                f"that nobody gathers (torch {torch.__version__}): use torch 2.11 to 2.14"
            )
    return found


def enter(inside: list[nn.Module], tensors: list[Tensor]) -> list[Tensor]:
    """Gathers the units' parameters; the tensors come back with the hooks that reduce the gradients in the backward."""
    for unit in inside:
        for hook in list(unit._forward_pre_hooks.values()):
            if is_fsdp_hook(hook):
                args, _ = hook(unit, tuple(tensors), {})  # type: ignore[misc]
                tensors = list(args)
    return tensors


def leave(inside: list[nn.Module], tensors: list[Tensor], out: Any) -> Any:
    """Frees the units' parameters where FSDP would; the output comes back with the hooks that gather them for the backward."""
    for unit in reversed(inside):
        for hook in list(unit._forward_hooks.values()):
            if is_fsdp_hook(hook):
                changed = hook(unit, tuple(tensors), out)
                out = out if changed is None else changed
    return out


def frees_weights(module: nn.Module) -> bool:
    """Is ``module`` an FSDP unit of its own whose parameters are gone once its forward has returned?"""
    if not isinstance(module, FSDPModule):
        return False
    return any(g._reshard_after_forward for g in _groups(module))


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    many = getattr(state, "_fsdp_param_groups", None)
    one = getattr(state, "_fsdp_param_group", None)
    if many is None and not hasattr(state, "_fsdp_param_group"):  # torch 2.11 to 2.14 have the one or the other
        raise MoefxError(f"FSDP2 of torch {torch.__version__} does not say which parameters a unit has: use torch 2.11 to 2.14")
    return list(many) if many is not None else [one] if one is not None else []


def reduces_gradients(model: nn.Module) -> bool:
    """False within FSDP2's ``set_requires_gradient_sync(False)``."""
    return all(g.reduce_grads for m in model.modules() if isinstance(m, FSDPModule) for g in _groups(m))


def is_unit(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Frees what forwards have gathered and no backward has freed: the model's parameters are this rank's shards again.

    FSDP keeps the root's after a forward, for the backward. Where none comes (an evaluation) ``model.parameters()`` are the
    gathered ones, which have no gradients: an optimizer that is made then never trains them, and a norm leaves them out.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_slices(spread: DTensor) -> tuple[slice, ...]:
    """Where this rank's part of a spread tensor lies in the whole."""
    sizes, offsets = compute_local_shape_and_global_offset(spread.shape, spread.device_mesh, spread.placements)
    return tuple(slice(o, o + n) for n, o in zip(sizes, offsets, strict=True))


def fill(spread: DTensor, whole: Tensor) -> None:
    """Copies this rank's part of ``whole`` into ``spread``; no rank talks to another."""
    spread.to_local().copy_(whole[local_slices(spread)])


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def experts_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh, with a dimension "ep", over which the experts are spread already; None if they are whole.

    Raises MoefxError for a layout that moefx cannot serve: experts cut along another dimension, or ranks of the group that
    share a batch (tensor parallelism).
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
        raise MoefxError(f'{name} is {placement} on the mesh dimension "ep": moefx wants the experts cut by expert, Shard(0)')
    config: Any = getattr(model.config, "distributed_config", None)
    if getattr(config, "tp_size", 1) > 1:
        raise MoefxError(
            f"the model was loaded with tp_size={config.tp_size}: its ranks share batches, moefx gives each rank its own; use "
            "DistributedConfig(fsdp_size=..., ep_size=...)"
        )
    return p.device_mesh


def experts_gradient_scale(model: nn.Module, ep_size: int) -> float:
    """What the experts' local gradients are multiplied with, so that after FSDP's reduction they are the mean over all ranks.

    Where FSDP has been given a divisor for the experts (as Transformers does: the number of all ranks) that is all.
    """
    for module in hf.experts_modules(model).values():
        if isinstance(module, FSDPModule) and any(g.gradient_divide_factor is not None for g in _groups(module)):
            return 1.0
    return 1.0 / ep_size


@contextmanager
def as_one_process(module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Within: no FSDP hooks, no forward that Transformers put on the experts, whole parameters.

    Shapes and dtypes are all that capture reads: a spread parameter becomes one number seen everywhere, without memory; with
    ``device`` (meta, say) all parameters and buffers become empty tensors there.
    """
    with ExitStack() as undo:
        for m in list(module.modules()):
            for hooks in (m._forward_pre_hooks, m._forward_hooks):
                _without_fsdp_hooks(hooks, undo)
            if hf.is_experts(m):
                _with_own_forward(m, undo)
            tables: list[dict[str, Any]] = [m._parameters, m._buffers]
            for table in tables:
                for name, tensor in list(table.items()):
                    new = _stand_in(tensor, device)
                    if new is not tensor:
                        undo.callback(table.__setitem__, name, tensor)
                        table[name] = new
        yield


def _without_fsdp_hooks(hooks: dict[int, Any], undo: ExitStack) -> None:
    if any(map(is_fsdp_hook, hooks.values())):
        kept = dict(hooks)
        undo.callback(hooks.update, kept)  # second: the order of hooks is theirs
        undo.callback(hooks.clear)
        for key in [k for k, hook in kept.items() if is_fsdp_hook(hook)]:
            del hooks[key]


def _with_own_forward(experts: nn.Module, undo: ExitStack) -> None:
    """Transformers' expert parallelism replaces an experts module's forward and makes ``num_experts`` the local number."""
    attributes = vars(experts)
    if "forward" in attributes:
        kept: dict[str, Any] = {k: attributes[k] for k in ("forward", "num_experts") if k in attributes}
        undo.callback(attributes.update, kept)
        del attributes["forward"]
        if "num_experts" in attributes:
            attributes["num_experts"] = _number_of_experts(experts)


def _number_of_experts(module: nn.Module) -> int:
    return next(p.shape[0] for p in module._parameters.values() if p is not None)


def _stand_in(tensor: Any, device: torch.device | None) -> Any:
    if tensor is None or device is None and not isinstance(tensor, DTensor):
        return tensor
    if device is not None:
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        new = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
