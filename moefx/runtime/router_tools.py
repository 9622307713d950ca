"""Tools for the routers of an optimized model: record and replay routes, measure the experts' load, balance it by a bias."""

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
from moefx.runtime.blocks import blocks_of
from moefx.runtime.router_state import RouterState, Routes
from moefx.runtime.state import Optimized, state_of

if TYPE_CHECKING:
    from moefx.ir.program import RouterOutputs


def _of(model: Any) -> tuple[Any, Optimized, RouterState]:
    state = state_of(model)
    inner = unwrap(model)
    if not any(f.routes for f in state.program):
        raise MoefxError(
            f"no function of {type(inner).__name__} returns its routers' choices: is the pass 'expose_routes' in the pipeline?"
        )
    router_state: RouterState = inner._moefx_router_state
    router_state.find_blocks(inner, state)
    return inner, state, router_state


@contextmanager
def record_routes(model: Any) -> Iterator[Routes]:
    """Context that records the routes of forwards, for :func:`replay_routes` of this model or of another copy of it.

    Args:
        model: optimized, also inside DDP or PEFT.

    Yields:
        A dict that the forward fills: path of an experts module -> expert ids [T, K] int64. A second forward replaces what the
        first recorded.

    Raises:
        MoefxError: the model is not optimized, or none of its functions returns routes.
    """
    _, _, router_state = _of(model)
    before, router_state.recorded_routes = router_state.recorded_routes, {}
    try:
        yield router_state.recorded_routes
    finally:
        router_state.recorded_routes = before


@contextmanager
def replay_routes(model: Any, routes: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which forwards dispatch tokens to given experts, with the routers' weights for these, and their gradients.

    With it a policy is trained on the experts that its rollout used (arXiv 2510.11370).

    Args:
        model: optimized, also inside DDP or PEFT.
        routes: path of an experts module -> expert ids [T, K], as :func:`record_routes` yields them.

    Raises:
        MoefxError: the model is not optimized; in the forward, if a layer has no routes, or routes of another shape than
            [tokens, experts per token].
    """
    _, _, router_state = _of(model)
    before, router_state.replayed_routes = router_state.replayed_routes, dict(routes)
    try:
        yield
    finally:
        router_state.replayed_routes = before


def enable_load_tracking(model: Any, on: bool = True) -> None:
    """Counts from now on how many tokens each expert gets in training forwards, for :func:`expert_load`.

    Args:
        model: optimized, also inside DDP or PEFT.
        on: False stops counting. Either way the counts begin at zero.

    Raises:
        MoefxError: the model is not optimized, or none of its functions returns routes.
    """
    _, _, router_state = _of(model)
    router_state.tracks_load = on
    router_state.tokens_per_expert, router_state.reported = {}, {}


def expert_load(model: Any, reader: str = "") -> dict[str, Tensor]:
    """Tokens per expert, summed over all ranks by one all-reduce: every rank must call it.

    Args:
        model: optimized, with :func:`enable_load_tracking` before the forwards.
        reader: a name; each name gets the tokens since it was last used.

    Returns:
        Path of an experts module -> tokens per expert [E] int64.

    Raises:
        MoefxError: load tracking is not enabled.
    """
    inner, _, router_state = _of(model)
    if not router_state.tracks_load:
        raise MoefxError(
            f"load tracking is not enabled: call moefx.enable_load_tracking({type(inner).__name__}) before the forward"
        )
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
    """Metrics of :func:`expert_load` to log: of each layer, and over the layers.

    Args:
        load: path of an experts module -> tokens per expert [E].

    Returns:
        ``max_load/<path>``: load of the busiest expert over the mean load, 1 if balanced, E if collapsed; ``entropy/<path>``:
        entropy of the load over log E, 1 if balanced, 0 if collapsed. ``max_load`` is the largest of the layers, ``entropy``
        their mean. ``dropped``: tokens without an expert, always 0.
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
    """Balances the load without an auxiliary loss: ``bias += rate * sign(mean load - load)`` (arXiv 2408.15664).

    Args:
        model: optimized, with :func:`enable_load_tracking` before the forwards. All ranks call it after each optimizer step.
        rate: step of the bias.
        load: path of an experts module -> tokens per expert [E]; by default the :func:`expert_load` since the last update.

    Raises:
        MoefxError: no router of the model has a bias that only affects the choice, or the bias has a 16-bit dtype, in which a
            step would be lost; or load tracking is not enabled.
    """
    inner, _, _ = _of(model)
    biased = [(r.path(path), f"{path}.{r.bias}") for path, r in _routes(inner) if r.bias is not None]
    if not biased:
        raise MoefxError(f"no router of {type(inner).__name__} has a bias for the choice of experts: use its auxiliary loss")
    load = expert_load(inner, "update_router_bias") if load is None else load
    tensors = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    with torch.no_grad():
        for experts, name in biased:
            bias = tensors[name]
            if bias.dtype in (torch.bfloat16, torch.float16):
                raise MoefxError(f"{name} is {bias.dtype}, in which steps of {rate} would be lost: keep it in float32")
            counts = load[experts].double()
            step = (rate * torch.sign(counts.mean() - counts)).to(bias.dtype).view(bias.shape)
            if isinstance(bias, DTensor):
                bias.to_local().add_(step[fsdp.local_slices(bias)])
            else:
                bias.add_(step)


def _routes(model: Any) -> Iterator[tuple[str, RouterOutputs]]:
    """(path of the block, outputs of the router) of each router of the model, in the order of the model."""
    for path, _, block in blocks_of(model):
        if block.functions and block.functions[0].routes:
            yield from ((path, r) for r in block.functions[0].routes)


def warn_balanced(model: Any) -> None:
    """Warns that a model with balanced routing does not learn."""
    warnings.warn(
        f"balanced_routing=True: {type(model).__name__} dispatches tokens to experts in turn, whatever its routers "
        "choose: it learns nothing useful, use this for benchmarks only",
        stacklevel=3,
    )
