"""A sharded model as one process would hold it, for capture: whole parameters, no FSDP hooks, the experts' own forward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moefx.integrations import transformers as hf
from moefx.integrations.fsdp import is_fsdp_hook
from moefx.internals.functions import home


@contextmanager
def unsharded_view(module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Context in which ``module`` has whole parameters, no FSDP hooks, and the experts' own forward.

    Capture reads only shapes and dtypes, so a sharded parameter becomes one expanded zero, without memory. With ``device``
    (meta, for instance) all parameters and buffers become empty tensors there.
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
        undo.callback(hooks.update, kept)  # runs second, after clear: it restores the order of the hooks
        undo.callback(hooks.clear)
        for key in [k for k, hook in kept.items() if is_fsdp_hook(hook)]:
            del hooks[key]


def _with_own_forward(experts: nn.Module, undo: ExitStack) -> None:
    """Undoes expert parallelism, Transformers' or moefx's, which replaces an experts module's forward.

    Transformers' makes ``num_experts`` local, too.
    """
    attributes = vars(experts)
    replaced: Any = attributes.get("forward")
    while isinstance(replaced, functools.partial):
        replaced = replaced.func
    if home(replaced).startswith(("transformers.", "moefx.")):  # not a user's
        kept: dict[str, Any] = {k: attributes[k] for k in ("forward", "num_experts") if k in attributes}
        undo.callback(attributes.update, kept)
        del attributes["forward"]
        if "num_experts" in attributes:
            attributes["num_experts"] = _number_of_experts(experts)


def _number_of_experts(module: nn.Module) -> int:
    return next(p.shape[0] for p in module._parameters.values() if p is not None)


def _stand_in(tensor: Any, device: torch.device | None) -> Any:
    if tensor is None or (device is None and not isinstance(tensor, DTensor)):
        return tensor
    if device is not None:
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        new = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
