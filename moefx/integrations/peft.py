"""PEFT: the model inside its wrappers, and LoRA on experts' parameters (``target_parameters``).

PEFT adds its update to a parameter by a parametrization that it registers and removes in each forward. That can neither be
captured nor applied to a DTensor, so in these two cases the experts get the factors and add the update themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefx.integrations import fsdp
from moefx.internals.subclass import forward_around, own_class, subclass

#: Attribute of an experts module while its wrapper's forward runs: parameter -> factors of its updates.
_FACTORS = "_moefx_factors"


def unwrap_peft(model: Any) -> Any:
    """The Transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unwrap(model: Any) -> Any:
    """The Transformers model inside DDP and PEFT."""
    return unwrap_peft(getattr(model, "module", model))


def is_wrapper(module: nn.Module) -> bool:
    """PEFT's wrapper of one parameter of an experts module."""
    return hasattr(module, "get_delta_factors") and hasattr(module, "parameter_name")


@functools.cache
def adapting(base: type, emitting: Callable[[], bool]) -> type:
    """A subclass of a wrapper's class: PEFT's own forward, except during capture and for sharded experts."""

    def run(wrapper: Any, plain: Callable, args: tuple, kwargs: dict) -> Any:
        spread = isinstance(wrapper.get_param(), DTensor)
        if not (emitting() or spread) or wrapper.disable_adapters or wrapper.merged:
            return plain(*args, **kwargs)
        with _adapted(wrapper):
            return wrapper.base_layer(*args, **kwargs)

    def get_delta_weight(self, adapter_name, *args, **kwargs):
        weight, plain_delta = self.get_param(), base.get_delta_weight  # type: ignore[attr-defined]
        if not isinstance(weight, DTensor):
            return plain_delta(self, adapter_name, *args, **kwargs)
        part = fsdp.local_slices(weight)
        with _whole_factors(self, adapter_name):
            if self.num_experts > 1:
                delta = _delta_of_experts(self, adapter_name, part[0])[:, part[1], part[2]]
            else:
                delta = plain_delta(self, adapter_name, *args, **kwargs)[part]
        how = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
        return DTensor.from_local(delta.to(weight.dtype).contiguous(), weight.device_mesh, weight.placements, **how)

    return forward_around(base, run, get_delta_weight=get_delta_weight)


def _delta_of_experts(wrapper: Any, adapter: str, experts: slice) -> Tensor:
    """PEFT's ``get_delta_weight`` of some experts. PEFT's own computes all, which are as large as all weights."""
    up, down = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    up = up.reshape(wrapper.num_experts, -1, up.shape[-1])[experts]  # [E, rank, in]
    down = down.reshape(down.shape[0], -1, wrapper.num_experts)[..., experts]  # [out, rank, E]
    order = "o r e, e r i -> e o i" if wrapper._did_swap_in_out_features else "o r e, e r i -> e i o"
    return torch.einsum(order, down, up) * wrapper.scaling[adapter]


@contextmanager
def _whole_factors(wrapper: Any, adapter: str) -> Iterator[None]:
    """Context in which the factors of an adapter are plain, whole tensors on every rank."""
    linears = [factors[adapter] for factors in (wrapper.lora_A, wrapper.lora_B)]
    kept: list[Any] = [linear._parameters["weight"] for linear in linears]
    try:
        for linear, weight in zip(linears, kept, strict=True):
            if isinstance(weight, DTensor):
                linear._parameters["weight"] = nn.Parameter(weight.full_tensor().detach(), requires_grad=False)
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear._parameters["weight"] = weight


#: Methods of PEFT's tuner that change weights or which adapters are active.
_MERGING = ("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "disable_adapter_layers")


@functools.cache
def merging(base: type) -> type:
    """A subclass of PEFT's tuner (``LoraModel``) that merges into this rank's shards.

    After a forward FSDP may show gathered weights instead. Adapters that are disabled while merged are unmerged here, since
    PEFT would unmerge them in the next forward, from gathered weights.
    """

    def on_shards(name: str) -> Callable:
        @functools.wraps(getattr(base, name))
        def call(self, *args, **kwargs):
            plain = getattr(base, name)
            fsdp.reshard(self)
            if name == "disable_adapter_layers" and any(getattr(m, "merged_adapters", ()) for m in layers(self)):
                self.unmerge_adapter()
            with torch.no_grad():
                return plain(self, *args, **kwargs)

        return call

    return subclass(base, **{name: on_shards(name) for name in _MERGING if hasattr(base, name)})


@functools.cache
def saving(base: type) -> type:
    """A subclass of a PEFT model's class whose ``save_pretrained`` gathers sharded adapters: all ranks call it, 0 writes."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        plain = base.save_pretrained  # type: ignore[attr-defined]
        if kwargs.get("state_dict") is None and any(isinstance(p, DTensor) for p in self.parameters()):
            parameters = dict(self.named_parameters(remove_duplicate=False))
            state = {n: t for n, t in self.state_dict().items() if n not in parameters or _is_adapter(n, parameters[n])}
            kwargs["state_dict"] = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
            kwargs.setdefault("is_main_process", torch.distributed.get_rank() == 0)
        return plain(self, save_directory, *args, **kwargs)

    return subclass(base, save_pretrained=functools.wraps(base.save_pretrained)(save_pretrained))  # type: ignore[attr-defined]


def wrap(model: Any) -> None:
    """Makes a PEFT model, and the tuner inside it, save and merge sharded parameters."""
    cls: Any = type(model)
    model.__class__ = saving(cls)
    if hasattr(model.base_model, "merge_adapter"):
        cls = type(model.base_model)
        model.base_model.__class__ = merging(cls)


def unwrap_classes(model: Any) -> None:
    """Undoes :func:`wrap`."""
    for m in (model, vars(model).get("_modules", {}).get("base_model")):
        if m is not None:
            m.__class__ = own_class(type(m))


def _is_adapter(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad or "lora_" in name or "modules_to_save" in name


@contextmanager
def _adapted(wrapper: Any) -> Iterator[None]:
    """Context in which the adapted module has its parameter with the update, or the factors of the update if sharded."""
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
        module.__dict__[name] = parameter  # an attribute hides the parameter of its name
    elif active:
        module.__dict__[name] = parameter + sum(map(wrapper.get_delta_weight, active[1:]), wrapper.get_delta_weight(active[0]))
    try:
        yield
    finally:
        module.__dict__.pop(name, None)
        module.__dict__.get(_FACTORS, {}).pop(name, None)


def weight(experts: nn.Module, name: str) -> Tensor:
    """A parameter of an experts module with its adapters' updates; this rank's part if it is sharded."""
    found: Any = getattr(experts, name)
    factors = experts.__dict__.get(_FACTORS, {}).get(name)
    if not factors:
        return found
    mine = experts_of_rank(found)
    found = found.to_local()
    for left, right, scaling in factors:
        found = torch.baddbmm(found, left[mine], right[mine], alpha=scaling)
    return found


def without_wrappers(module: Any) -> Any:
    """The module inside PEFT's wrappers of its parameters."""
    while is_wrapper(module):
        module = module.base_layer
    return module


def adapted_parameter(module: Any, name: str) -> Any:
    """A parameter of a module whose forward is not called, with the updates that PEFT's wrappers around it would add."""
    with ExitStack() as inside:
        while is_wrapper(module):
            if not (module.disable_adapters or module.merged):
                inside.enter_context(_adapted(module))
            module = module.base_layer
        return getattr(module, name, None)


def layers(module: nn.Module) -> list[Any]:
    """PEFT's layers inside ``module``."""
    return [m for m in module.modules() if hasattr(m, "disable_adapters") and hasattr(m, "active_adapters")]


def unmerges(module: nn.Module) -> bool:
    """Would a call of ``module`` unmerge adapters from the weights? PEFT does so for those that are merged and disabled."""
    return any(m.disable_adapters and getattr(m, "merged_adapters", ()) for m in layers(module))


def experts_of_rank(spread: DTensor) -> slice:
    """The experts that this rank holds of a parameter that is ``Shard(0)`` over "ep"."""
    ep = spread.device_mesh["ep"] if spread.device_mesh.ndim > 1 else spread.device_mesh
    many = spread.shape[0] // ep.size()
    return slice(ep.get_local_rank() * many, (ep.get_local_rank() + 1) * many)
