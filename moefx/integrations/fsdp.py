"""FSDP2: the units inside a module, their hooks around a captured graph, and local parts of sharded tensors.

A captured graph does not call the modules inside its block, so the runtime calls the hooks of their FSDP units around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moefx.errors import MoefxError


def is_fsdp_hook(hook: Callable) -> bool:
    """Is this one of FSDP2's forward hooks?"""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def own_class(cls: type) -> type:
    """The class that ``fully_shard`` and moefx made ``cls`` of."""
    return next(c for c in cls.__mro__ if "_moefx_base" not in vars(c) and not issubclass(c, FSDPModule))


@contextmanager
def own_classes(model: nn.Module, kind: type) -> Iterator[None]:
    """Context in which the modules of a ``kind`` in a sharded model have their own classes.

    Transformers finds a checkpoint's names by a model's class, and takes the one that ``fully_shard`` makes for custom code.
    """
    changed = [(m, type(m)) for m in model.modules() if isinstance(m, kind) and own_class(type(m)) is not type(m)]
    try:
        for m, cls in changed:
            m.__class__ = own_class(cls)
        yield
    finally:
        for m, cls in changed:
            m.__class__ = cls


def units(module: nn.Module) -> list[nn.Module]:
    """The FSDP units inside ``module``, without itself: their hooks must run around a graph of the module.

    Raises:
        MoefxError: the hooks of a unit are not FSDP2's, as moefx knows them.
    """
    found = [m for m in module.modules() if m is not module and any(map(is_fsdp_hook, m._forward_pre_hooks.values()))]
    for m in module.modules():
        if isinstance(m, FSDPModule) and m is not module and m not in found:
            raise MoefxError(
                f"the hooks of an FSDP2 unit ({type(m).__name__}) are not those that moefx knows: it would train on "
                f"parameters that are not gathered (torch {torch.__version__}): use torch 2.11 to 2.14"
            )
    return found


def pre_forward(units: list[nn.Module], tensors: list[Tensor]) -> list[Tensor]:
    """Gathers the units' parameters. Returns the inputs with the hooks that reduce gradients in the backward."""
    for unit in units:
        for hook in list(unit._forward_pre_hooks.values()):
            if is_fsdp_hook(hook):
                args, _ = hook(unit, tuple(tensors), {})  # type: ignore[misc]
                tensors = list(args)
    return tensors


def post_forward(units: list[nn.Module], tensors: list[Tensor], out: Any) -> Any:
    """Reshards the units' parameters. Returns the output with the hooks that gather them for the backward."""
    for unit in reversed(units):
        for hook in list(unit._forward_hooks.values()):
            if is_fsdp_hook(hook):
                changed = hook(unit, tuple(tensors), out)
                out = out if changed is None else changed
    return out


def reshards_after_forward(module: nn.Module) -> bool:
    """Is ``module`` an FSDP unit that reshards its parameters after its forward?"""
    if not isinstance(module, FSDPModule):
        return False
    return any(g._reshard_after_forward for g in groups(module))


def groups(module: FSDPModule) -> list[Any]:
    """The parameter groups of an FSDP unit. Raises MoefxError for an FSDP2 that moefx does not know."""
    state: Any = module._get_fsdp_state()
    many = getattr(state, "_fsdp_param_groups", None)
    one = getattr(state, "_fsdp_param_group", None)
    if many is None and not hasattr(state, "_fsdp_param_group"):  # torch 2.11 to 2.14 have the one or the other
        raise MoefxError(
            f"FSDP2 of torch {torch.__version__} has no known list of a unit's parameter groups: use torch 2.11 to 2.14"
        )
    return list(many) if many is not None else [one] if one is not None else []


def reduces_gradients(model: nn.Module) -> bool:
    """Do backwards reduce gradients? Not after FSDP2's ``set_requires_gradient_sync(False)``."""
    return all(g.reduce_grads for m in model.modules() if isinstance(m, FSDPModule) for g in groups(m))


def is_unit(module: nn.Module) -> bool:
    """Is the module itself an FSDP2 unit?"""
    return isinstance(module, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Reshards all units, so that ``model.parameters()`` are this rank's shards.

    After a forward FSDP keeps the root's parameters gathered for the backward. If none follows (an evaluation), the gathered
    ones, which get no gradients, stay in ``model.parameters()``: an optimizer made then would not train the model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_slices(sharded: DTensor) -> tuple[slice, ...]:
    """The slices of this rank's part in the whole of a sharded tensor."""
    sizes, offsets = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    return tuple(slice(o, o + n) for n, o in zip(sizes, offsets, strict=True))


def fill(sharded: DTensor, whole: Tensor) -> None:
    """Copies this rank's part of ``whole`` into ``sharded``, without communication."""
    sharded.to_local().copy_(whole[local_slices(sharded)])


def is_sharded(model: nn.Module) -> bool:
    """Has the model parameters that are DTensors: by FSDP2, by Transformers' loader, or by ``optimize(ep_size=...)``?"""
    return any(isinstance(p, DTensor) for p in model.parameters())
