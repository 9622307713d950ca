"""What ``parallelize`` gives a model of one process, so that one script serves one process and many: FSDP2's methods.

Nothing is sharded in one process, so these methods have nothing to do. Methods whose effect one process would see (a gradient
divide factor, custom collectives, hooks) are left out: a call of them raises AttributeError, as on any module.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy

from moefx.integrations import transformers as hf
from moefx.internals.subclass import subclass

#: Methods of FSDPModule that change when parameters are gathered and gradients are reduced, and no result.
_SCHEDULING = (
    "reshard", "set_is_last_backward", "set_modules_to_backward_prefetch", "set_modules_to_forward_prefetch",
    "set_requires_all_reduce", "set_requires_gradient_sync", "set_reshard_after_backward", "set_reshard_after_forward",
    "set_unshard_in_backward",
)  # fmt: skip


class _Unsharded:
    """The handle of ``unshard(async_op=True)``: parameters are whole already."""

    def wait(self) -> None:
        """Returns at once."""


def _unshard(self: nn.Module, async_op: bool = False) -> _Unsharded | None:
    return _Unsharded() if async_op else None


def _does_nothing(name: str) -> Any:
    @functools.wraps(getattr(FSDPModule, name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        return None

    return method


@functools.cache
def _with_fsdp_methods(base: type) -> type:
    return subclass(base, unshard=_unshard, **{name: _does_nothing(name) for name in _SCHEDULING if hasattr(FSDPModule, name)})


def add_fsdp_methods(model: nn.Module) -> None:
    """Gives ``model`` and its decoder blocks the methods that ``fully_shard`` gives to units, without effect."""
    for module in (model, *hf.blocks(model).values()):
        own: Any = type(module)
        if not hasattr(own, "set_requires_gradient_sync"):
            module.__class__ = _with_fsdp_methods(own)


def warn_ignored(model: nn.Module, mp_policy: MixedPrecisionPolicy, offload_policy: OffloadPolicy) -> None:
    """Warns of FSDP2's policies that would change results or memory over several ranks, and do nothing in one process."""
    ignored = []
    dtype = mp_policy.param_dtype
    if dtype is not None and any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        ignored.append(f"mp_policy's param_dtype={dtype} (use torch.autocast, or load the model in {dtype})")
    if isinstance(offload_policy, CPUOffloadPolicy) and torch.cuda.is_available():
        ignored.append("offload_policy")
    if ignored:
        warnings.warn(
            f"parallelize in one process does not shard the model and ignores {' and '.join(ignored)}: start several processes "
            "with torchrun to use it",
            stacklevel=4,
        )
