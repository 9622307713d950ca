"""Guards of captured graphs: submodules, hooks, parameter sizes and attributes of a module that graphs assume."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from moefx.frontend.export import foreign_hooks
from moefx.integrations import fsdp
from moefx.integrations import peft as adapters
from moefx.integrations import transformers as hf


class ModuleGuard:
    """The state of a module when it was captured. Each call compares it, so it is kept as a few dictionaries."""

    def __init__(self, module: nn.Module):
        inside = [m for m in module.modules() if m is not module]
        self._watched = [(m._modules, dict(m._modules), _hooks(m), m) for m in inside]
        self._watched.append((module._modules, dict(module._modules), -1, module))  # its own hooks run around the graph
        self.units = fsdp.units(module)  #: FSDP's units inside the module
        self.adapters = adapters.layers(module)  #: PEFT's layers inside the module
        self._numbers = list(_numbers(module))
        self._holders = [m for m in module.modules() if m._parameters]
        self._weights = None if self.units or fsdp.is_unit(module) else self._weights_now()

    def first_change(self) -> tuple[dict, dict] | None:
        """The submodules, now and when captured, of the first module whose submodules or hooks differ; None if none do."""
        for children, before, hooks, m in self._watched:
            if children != before or (hooks >= 0 and _hooks(m) != hooks):
                return children, before
        return None

    def why_inexact(self, module: nn.Module, children: dict, before: dict) -> str | None:
        """Why graphs are not exact after a ``first_change``; None if only Transformers' own recording hooks came or went."""
        if children != before:
            new = sorted(k for k in {*children, *before} if children.get(k) is not before.get(k))
            return f"its submodule {new[0]} was replaced after optimize"
        hook = foreign_hooks(module)
        return None if hook is None else f"the forward hook {hook} was added after optimize"

    def values_changed(self) -> bool:
        """Do parameters have other dtypes or sizes, or attributes other values, than those that graphs hold?"""
        return (self._weights is not None and self._weights != self._weights_now()) or any(
            read(held) != before for read, held, before in self._numbers
        )

    def _weights_now(self) -> list[tuple] | None:
        """Dtypes and sizes of the parameters inside. None: FSDP gathers them, in a dtype of its own."""
        found = [p for m in self._holders for p in m._parameters.values() if p is not None]
        return None if any(type(p.data) is DTensor for p in found) else [(p.dtype, p.shape) for p in found]


def _hooks(m: nn.Module) -> int:
    return sum(map(len, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)))


def _numbers(module: nn.Module) -> Iterator[tuple[Callable, dict, Any]]:
    """The attributes of modules that graphs hold as constants: (reader, the module's ``__dict__``, value now)."""
    for m in module.modules():
        names = hf.numbers(m)
        if names and (not type(m).__module__.startswith("torch.nn") or isinstance(m, nn.modules.dropout._DropoutNd)):
            read = operator.itemgetter(*names)
            yield read, vars(m), read(vars(m))
