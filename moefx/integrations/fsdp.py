"""Models whose parameters are spread over ranks already: by FSDP2, by Transformers when it loads them, or by ``optimize``.

Capture sees such a model as one process would hold it: whole parameters, no hooks that gather them, the experts' own forward. A
captured graph does not call the modules inside its block, so it enters and leaves their FSDP units itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moefx.errors import MoefxError


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


def pre_forward(units: list[nn.Module], tensors: list[Tensor]) -> list[Tensor]:
    """Gathers the units' parameters; the tensors come back with the hooks that reduce the gradients in the backward."""
    for unit in units:
        for hook in list(unit._forward_pre_hooks.values()):
            if is_fsdp_hook(hook):
                args, _ = hook(unit, tuple(tensors), {})  # type: ignore[misc]
                tensors = list(args)
    return tensors


def post_forward(units: list[nn.Module], tensors: list[Tensor], out: Any) -> Any:
    """Frees the units' parameters where FSDP would; the output comes back with the hooks that gather them for the backward."""
    for unit in reversed(units):
        for hook in list(unit._forward_hooks.values()):
            if is_fsdp_hook(hook):
                changed = hook(unit, tuple(tensors), out)
                out = out if changed is None else changed
    return out


def reshards_after_forward(module: nn.Module) -> bool:
    """Is ``module`` an FSDP unit of its own whose parameters are gone once its forward has returned?"""
    if not isinstance(module, FSDPModule):
        return False
    return any(g._reshard_after_forward for g in groups(module))


def groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    many = getattr(state, "_fsdp_param_groups", None)
    one = getattr(state, "_fsdp_param_group", None)
    if many is None and not hasattr(state, "_fsdp_param_group"):  # torch 2.11 to 2.14 have the one or the other
        raise MoefxError(f"FSDP2 of torch {torch.__version__} does not say which parameters a unit has: use torch 2.11 to 2.14")
    return list(many) if many is not None else [one] if one is not None else []


def reduces_gradients(model: nn.Module) -> bool:
    """False within FSDP2's ``set_requires_gradient_sync(False)``."""
    return all(g.reduce_grads for m in model.modules() if isinstance(m, FSDPModule) for g in groups(m))


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
