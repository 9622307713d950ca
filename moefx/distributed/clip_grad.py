"""Gradient clipping by the global norm, for gradients on several device meshes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moefx.distributed import rank_monitor
from moefx.integrations import fsdp


@rank_monitor.named()
def clip_grad_norm_(
    parameters: nn.Module | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for gradients on several meshes: dense ones, and those of experts under EP.

    Gradients are scaled in place by ``min(1, max_norm / norm)``. All ranks call it.

    Args:
        parameters: a model, or parameters.
        max_norm: gradients are scaled down to this norm if theirs is larger.
        norm_type: the order of the norm; infinity is the largest absolute value.
        error_if_nonfinite: raise if the norm is NaN or infinite.
        foreach: use torch's foreach kernels; None: where they serve.

    Returns:
        The norm that one process with all parameters would compute, a tensor that is the same on every rank.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``.
        RankLostError: a rank is lost.
    """
    if isinstance(parameters, nn.Module):
        fsdp.reshard(parameters)
    found = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    by_mesh: dict[object, list[Tensor]] = {}
    for p in found:
        if p.grad is not None:
            by_mesh.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
    norms = []
    for group in by_mesh.values():
        norm = get_total_norm([p.grad for p in group if p.grad is not None], norm_type, foreach=foreach)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is {float(total)}: a gradient is not finite")
    for group in by_mesh.values():
        clip_grads_with_norm_(group, max_norm, total, foreach=foreach)
    return total
