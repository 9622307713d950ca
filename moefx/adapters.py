"""PEFT around a model: which model is inside, and LoRA on experts' parameters (``target_parameters``).

PEFT adds its update to a parameter by a parametrization that it registers and removes in each forward. That cannot be captured,
nor added to a DTensor; so in those two cases the experts are handed the factors, and add the update themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .subclass import subclass

#: On an experts module while its wrapper's forward runs: parameter -> factors of its updates.
_FACTORS = "_moefx_factors"


def inside(model: Any) -> Any:
    """The Transformers model inside PEFT's, else the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unwrap(model: Any) -> Any:
    """The Transformers model inside DDP and PEFT."""
    return inside(getattr(model, "module", model))


def is_wrapper(module: nn.Module) -> bool:
    """PEFT's wrapper of one parameter of an experts module."""
    return hasattr(module, "get_delta_factors") and hasattr(module, "parameter_name")


@functools.cache
def adapting(base: type, emitting: Callable[[], bool]) -> type:
    """A subclass of a wrapper's class: PEFT's own forward, except while capturing and where experts are spread over ranks."""
    plain = base.forward  # type: ignore[attr-defined]

    def forward(self, x, *args, **kwargs):
        spread = isinstance(self.get_param(), DTensor)
        if not (emitting() or spread) or self.disable_adapters or self.merged:
            return plain(self, x, *args, **kwargs)
        with _adapted(self):
            return self.base_layer(x, *args, **kwargs)

    return subclass(base, forward=forward)


@functools.cache
def saving(base: type) -> type:
    """A subclass of a PEFT model's class whose ``save_pretrained`` gathers what is spread over ranks.

    Every rank calls it, the first one writes.
    """
    plain = base.save_pretrained  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory, *args, **kwargs):
        if kwargs.get("state_dict") is None and any(isinstance(p, DTensor) for p in self.parameters()):
            parameters = dict(self.named_parameters(remove_duplicate=False))
            state = {n: t for n, t in self.state_dict().items() if n not in parameters or _is_adapter(n, parameters[n])}
            kwargs["state_dict"] = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
            kwargs.setdefault("is_main_process", torch.distributed.get_rank() == 0)
        return plain(self, save_directory, *args, **kwargs)

    return subclass(base, save_pretrained=functools.wraps(plain)(save_pretrained))


def _is_adapter(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad or "lora_" in name or "modules_to_save" in name


@contextmanager
def _adapted(wrapper: Any) -> Iterator[None]:
    """Within: the module that ``wrapper`` adapts finds its parameter with the update, or, where that is spread over ranks, the
    factors of the update."""
    module, name = wrapper.get_base_layer(), wrapper.parameter_name
    active = [a for a in wrapper.active_adapters if a in wrapper.lora_A]
    parameter = getattr(module, name)
    if isinstance(parameter, DTensor):
        factors = module.__dict__.setdefault(_FACTORS, {})
        factors[name] = [wrapper.get_delta_factors(a) for a in active]
    elif wrapper.num_experts > 1:
        for a in active:
            left, right, scaling = wrapper.get_delta_factors(a)
            parameter = torch.baddbmm(parameter, left, right, alpha=scaling)
        module.__dict__[name] = parameter  # found before the parameters are looked at
    elif active:
        module.__dict__[name] = parameter + sum(map(wrapper.get_delta_weight, active[1:]), wrapper.get_delta_weight(active[0]))
    try:
        yield
    finally:
        module.__dict__.pop(name, None)
        module.__dict__.get(_FACTORS, {}).pop(name, None)


def weight(experts: nn.Module, name: str) -> Tensor:
    """A parameter of an experts module with its adapters' updates; of one that is spread over ranks, this rank's part."""
    found: Any = getattr(experts, name)
    factors = experts.__dict__.get(_FACTORS, {}).get(name)
    if not factors:
        return found
    mine = experts_of_rank(found)
    found = found.to_local()
    for left, right, scaling in factors:
        found = torch.baddbmm(found, left[mine], right[mine], alpha=scaling)
    return found


def layers(module: nn.Module) -> list[Any]:
    """PEFT's layers inside: those that can be switched off, merged, and told which adapters to use."""
    return [m for m in module.modules() if hasattr(m, "disable_adapters") and hasattr(m, "active_adapters")]


def switches(layers: list[Any]) -> tuple:
    """How PEFT's layers are switched, hashable: a graph holds the updates of one such state."""
    return tuple(
        (
            m.disable_adapters,
            tuple(m.active_adapters),
            tuple(getattr(m, "merged_adapters", ())),
            tuple((k, float(v)) for k, v in getattr(m, "scaling", {}).items()),
        )
        for m in layers
    )


def experts_of_rank(spread: DTensor) -> slice:
    """Which experts a parameter ``Shard(0)`` over "ep" has here."""
    ep = spread.device_mesh["ep"] if spread.device_mesh.ndim > 1 else spread.device_mesh
    many = spread.shape[0] // ep.size()
    return slice(ep.get_local_rank() * many, (ep.get_local_rank() + 1) * many)
