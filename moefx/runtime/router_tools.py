"""What users do with a model's routers: record and replay routes, measure the experts' load, balance it by a bias."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moefx.errors import MoefxError
from moefx.integrations import fsdp
from moefx.integrations.peft import unwrap
from moefx.runtime.router_state import RouterState, Routes
from moefx.runtime.state import Optimized, state_of

if TYPE_CHECKING:
    from moefx.ir.program import RouterOutputs

if TYPE_CHECKING:
    pass


def _of(model: Any) -> tuple[Any, Optimized, RouterState]:
    state = state_of(model)
    inner = unwrap(model)
    if not any(f.routes for f in state.program):
        raise MoefxError(
            f"no function of {type(inner).__name__} returns its routers' choices: is the pass 'routes' in the pipeline?"
        )
    return inner, state, inner._moefx_router_state


@contextmanager
def record_routes(model: Any) -> Iterator[Routes]:
    """Within: the forward's choices of experts go into the dict that is yielded: experts module's path -> index [T, K] int64.

    A second forward replaces what the first recorded. Ready for :func:`replay_routes`, here or in another copy of the model.
    """
    _, _, router_state = _of(model)
    before, router_state.recorded_routes = router_state.recorded_routes, {}
    try:
        yield router_state.recorded_routes
    finally:
        router_state.recorded_routes = before


@contextmanager
def replay_routes(model: Any, routes: Mapping[str, Tensor]) -> Iterator[None]:
    """Within: forwards send tokens to the experts in ``routes`` and compute the routers' weights for these (their gradients
    too), whatever the routers would choose now: a policy trained on the experts that its rollout used (arXiv 2510.11370).

    Raises:
        MoefxError: in the forward, if a layer has no routes, or routes of another shape than [tokens, experts per token].
    """
    _, _, router_state = _of(model)
    before, router_state.replayed_routes = router_state.replayed_routes, dict(routes)
    try:
        yield
    finally:
        router_state.replayed_routes = before


def enable_load_tracking(model: Any, on: bool = True) -> None:
    """Counts, from now on, how many tokens each expert gets in training forwards; :func:`expert_load` reads the counts."""
    _, _, router_state = _of(model)
    router_state.tracks_load = on
    router_state.tokens_per_expert, router_state.reported = {}, {}


def expert_load(model: Any, reader: str = "") -> dict[str, Tensor]:
    """Tokens per expert over all ranks: experts module's path -> [E] int64. One all-reduce; all ranks call it.

    :func:`enable_load_tracking` comes first. A ``reader`` (a name) gets what was counted since it read last.
    """
    inner, _, router_state = _of(model)
    if not router_state.tracks_load:
        raise MoefxError(f"nothing is counted yet: call moefx.enable_load_tracking({type(inner).__name__}) before the forward")
    experts = {r.path(path): r.num_experts for path, r in _routes(inner)}
    device = next(inner.parameters()).device
    mine = [router_state.tokens_per_expert.get(p, torch.zeros(n, dtype=torch.int64)).to(device) for p, n in experts.items()]
    total = torch.cat(mine)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    everywhere = dict(zip(experts, total.split(list(experts.values())), strict=True))
    before, router_state.reported[reader] = router_state.reported.get(reader), everywhere
    return everywhere if before is None else {p: n - before[p].to(device) for p, n in everywhere.items()}


def expert_load_metrics(load: Mapping[str, Tensor]) -> dict[str, float]:
    """What to plot of :func:`expert_load`: per layer, and as mean and worst over the layers.

    ``max_load`` is the load of the busiest expert over the mean (1: balanced, E: collapsed), ``entropy`` that of the load
    divided by log E (1: balanced, 0: collapsed), ``dropped`` the tokens that no expert got: none, moefx drops none.
    """
    names, rows = list(load), []
    for counts in load.values():
        p = counts.double() / counts.sum().clamp_min(1)
        entropy = -(p * p.clamp_min(1e-300).log()).sum() / torch.log(torch.tensor(float(len(counts)), dtype=torch.double))
        rows.append(torch.stack((p.max() * len(counts), entropy.to(p.device))))
    table = torch.stack(rows).tolist()  # the host waits once
    found = {"max_load": max(m for m, _ in table), "entropy": sum(e for _, e in table) / len(table), "dropped": 0.0}
    for name, (most, entropy) in zip(names, table, strict=True):
        found |= {f"max_load/{name}": most, f"entropy/{name}": entropy}
    return found


def update_router_bias(model: Any, rate: float = 1e-3, load: Mapping[str, Tensor] | None = None) -> None:
    """Balancing without an auxiliary loss: ``bias += rate * sign(mean load - load)`` (arXiv 2408.15664), once a step.

    ``load`` defaults to the :func:`expert_load` since the last update; all ranks call it, after the optimizer's step.

    Raises:
        MoefxError: no router of the model has a bias for its choice, or one is kept in 16 bits, where a step would be lost.
    """
    inner, _, _ = _of(model)
    biased = [(r.path(path), f"{path}.{r.bias}") for path, r in _routes(inner) if r.bias is not None]
    if not biased:
        raise MoefxError(f"no router of {type(inner).__name__} has a bias that is added for the choice only: use its aux loss")
    load = expert_load(inner, "update_router_bias") if load is None else load
    tensors = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    with torch.no_grad():
        for experts, name in biased:
            bias = tensors[name]
            if bias.dtype in (torch.bfloat16, torch.float16):
                raise MoefxError(f"{name} is {bias.dtype}: steps of {rate} would be lost in it, keep it in float32")
            counts = load[experts].double()
            step = (rate * torch.sign(counts.mean() - counts)).to(bias.dtype).view(bias.shape)
            if isinstance(bias, DTensor):
                bias.to_local().add_(step[fsdp.local_slices(bias)])
            else:
                bias.add_(step)


def _routes(model: Any) -> Iterator[tuple[str, RouterOutputs]]:
    """(path of the block, route) for each router of the model, in its order."""
    for path, module in model.named_modules():
        site = vars(module).get("_moefx_forward")
        if site is not None and site.functions and site.functions[0].routes:
            yield from ((path, r) for r in site.functions[0].routes)


def warn_balanced(model: Any) -> None:
    warnings.warn(
        f"balanced_routing=True: {type(model).__name__} sends tokens to experts in turn, whatever its routers say. It learns "
        "nothing useful: for benchmarks only",
        stacklevel=3,
    )
