"""Who chose which experts: kept for recomputation, recorded and replayed, counted, and balanced by a bias.

A captured function returns its routers' choices (the pass ``expose_routes``), and has a twin that takes them as inputs. What is
done with the choices is Python around compiled code, and costs nothing where nobody asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from moefx.errors import MoefxError
from moefx.integrations import fsdp
from moefx.integrations.peft import unwrap
from moefx.internals.assumptions import assumed
from moefx.ops.dispatch_combine import Dispatches
from moefx.runtime.state import Optimized, state_of

if TYPE_CHECKING:
    from moefx.ir.program import Function, RouterOutputs
    from moefx.runtime.install import Site

#: Recorded choices: path of an experts module -> index [T, K], in the order of the model.
Routes = dict[str, Tensor]


@dataclass(eq=False)
class _Kept:
    """The choices of a forward that autograd will run again: as long as the input that it was run on exists."""

    storage: StorageWeakRef
    where: tuple
    index: list[Tensor]
    dispatches: Dispatches  #: which rows went where


@dataclass(eq=False)
class Routing:
    """The routers of one model while it runs."""

    recorded: Routes | None = None
    replayed: Mapping[str, Tensor] | None = None
    counting: bool = False
    counts: dict[str, Tensor] = field(default_factory=dict)  #: rows per expert on this rank since counting began
    read: dict[str, dict[str, Tensor]] = field(default_factory=dict)  #: the counts of all ranks that each reader has seen
    logits: list[Tensor] = field(default_factory=list)
    z_loss: Tensor | None = None  #: of the last forward with labels
    nonfinite: list[tuple[str, Tensor]] = field(default_factory=list)
    forwards: int = 0
    differentiates: bool = False  #: does the running forward of the model have gradients?
    step: int | None = None  #: of the optimizer, where somebody counts: the Trainer

    def __deepcopy__(self, memo: dict) -> Routing:
        return type(self)(counting=self.counting)

    # --- around a function's call ---

    def told(
        self, site: Site, function: Function, tensors: list[Tensor], training: bool
    ) -> tuple[list[Tensor], Dispatches] | None:
        """The choices that this call must use, whether it must, and the dispatches that belong to them.

        None: nothing depends on them, the routers choose.
        """
        index, dispatches, x = None, Dispatches(), tensors[0]
        if recomputing():
            kept = next((k for k in site.kept if k.where == _where(x) and not k.storage.expired()), None)
            fixed = next((r.fixed for r in function.routes if r.fixed), "")
            if kept is None or fixed:
                why = fixed or "the input that it was checkpointed with is not there"
                site.state.report.note(site.path, f"its routes are computed again in the backward: {why}")
            else:
                index, dispatches = kept.index, kept.dispatches
        elif self.replayed is not None:
            counts = zip(function.routes, function.routed(tensors), strict=True)
            index = [self._replayed(r.path(site.path), r, tokens, x.device) for r, tokens in counts]
        if index is None and not (training and _checkpointed()):
            return None
        # forward and recomputation must save the same tensors: both run the function that can be told
        told = index is not None
        if index is None:
            counts = zip(function.routes, function.routed(tensors), strict=True)
            index = [torch.zeros(tokens, r.top_k, dtype=torch.int64, device=x.device) for r, tokens in counts]
        return [*index, torch.full((), told, device=x.device)], dispatches

    def _replayed(self, path: str, route: RouterOutputs, tokens: int, device: torch.device) -> Tensor:
        assert self.replayed is not None
        if route.fixed:
            raise MoefxError(f"the routes of {path} cannot be replayed: {route.fixed}")
        index = self.replayed.get(path)
        if index is None:
            raise MoefxError(f"the routes to replay have none for {path}: they are of {', '.join(self.replayed) or 'nothing'}")
        if tuple(index.shape) != (tokens, route.top_k):
            raise MoefxError(
                f"the routes to replay for {path} are {list(index.shape)}, this call wants [{tokens}, {route.top_k}] (tokens, "
                "experts per token): replay the batch that was recorded"
            )
        return index.to(device=device, dtype=torch.int64)

    def saw(self, site: Site, function: Function, x: Tensor, training: bool, out: tuple, dispatches: Dispatches | None) -> None:
        """Takes note of a call's choices."""
        if recomputing():
            return
        if dispatches is not None and training:
            index = [out[r.index].detach() for r in function.routes]
            site.kept = [k for k in site.kept if not k.storage.expired() and k.where != _where(x)]
            site.kept.append(_Kept(StorageWeakRef(x.untyped_storage()), _where(x), index, dispatches))
        elif site.kept:
            site.kept = []
        for r in function.routes:
            path = r.path(site.path)
            if self.recorded is not None:
                self.recorded[path] = out[r.index].detach().clone()
            if self.counting and training:
                self._count(path, r, out[r.index])
            if r.logits is not None and training:
                if self.differentiates and not torch.is_grad_enabled():
                    raise MoefxError(
                        f"router_z_loss: {site.path} is checkpointed with use_reentrant=True, which hides its routers' logits "
                        "from the loss, so that they would get no gradient of it: pass use_reentrant=False"
                    )
                self.logits.append(out[r.logits])
            if r.nonfinite is not None:
                self.nonfinite.append((path, out[r.nonfinite]))

    def _count(self, path: str, route: RouterOutputs, index: Tensor) -> None:
        before = self.counts.get(path)
        if before is None or before.device != index.device:  # the model may have moved
            before = torch.zeros(route.num_experts, dtype=torch.int64) if before is None else before
            self.counts[path] = before.to(index.device)
        flat = index.detach().reshape(-1)
        self.counts[path].scatter_add_(0, flat, torch.ones_like(flat))

    # --- around a forward of the model ---

    def start(self) -> None:
        self.logits, self.nonfinite, self.z_loss = [], [], None
        self.forwards += 1
        self.differentiates = torch.is_grad_enabled()

    def finish(self, state: Optimized, out: Any, mask: Tensor | None, total: Callable[[Tensor], Tensor]) -> Any:
        """Checks the forward's numbers and adds to its loss what the plan asks for.

        ``mask`` [B, S]: which tokens are not padding. ``total`` makes sums over this rank's tokens those over all ranks'.
        """
        if self.nonfinite:
            self._raise_if_not_finite()
        logits, self.logits, self.nonfinite = self.logits, [], []  # kept, they would keep the graph
        loss = out[0] if isinstance(out, tuple) and out else getattr(out, "loss", None)
        if logits and isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
            z = _mean_square_logsumexp(logits, mask, total)
            self.z_loss = z.detach()
            loss = loss + state.plan.router_z_loss * z
            if isinstance(out, tuple):
                return (loss, *out[1:])
            out.loss = loss
        return out

    def _raise_if_not_finite(self) -> None:
        many = torch.stack([n for _, n in self.nonfinite]).tolist()  # the only time that the host waits
        bad = next(((path, n) for (path, _), n in zip(self.nonfinite, many, strict=True) if n), None)
        if bad:
            when = f"forward {self.forwards}" if self.step is None else f"step {self.step} (forward {self.forwards})"
            rank = f" on rank {dist.get_rank()}" if dist.is_available() and dist.is_initialized() else ""
            raise MoefxError(
                f"{when}{rank}: {bad[1]} of the routing logits of {bad[0].removesuffix('.experts')} are NaN "
                "or infinite, the first layer to have any: look at the batch, the learning rate and the gradients before"
            )


def _mean_square_logsumexp(logits: list[Tensor], mask: Tensor | None, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum over layers of the mean over tokens, [T, E] a layer: an encoder has other tokens than a decoder."""
    parts = []
    for x in logits:
        squares = torch.logsumexp(x.float(), dim=-1).square()
        fits = mask is not None and mask.numel() == squares.numel()
        counts = mask.reshape(-1).to(squares) if fits else torch.ones_like(squares)  # type: ignore[union-attr]
        parts.append(torch.stack(((squares * counts).sum(), counts.sum())))
    squares, tokens = total(torch.stack(parts)).unbind(-1)
    return (squares / tokens).sum()


def recomputing() -> bool:
    """Does autograd run this forward, in the middle of a backward, because activation checkpointing dropped its tensors?"""
    return torch._C._current_graph_task_id() != -1


def _checkpointed() -> bool:
    """Is this a forward that autograd will run again, or is running again?

    Non-reentrant checkpointing hooks what is saved; reentrant checkpointing saves nothing at first, and is a backward later.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return hooked or not torch.is_grad_enabled() or recomputing()


@assumed(
    "autograd says whether it runs a backward, whether what is saved is hooked, and whether memory still exists",
    "torch 2.11 to 2.14",
)
def recomputation_is_seen() -> bool:
    seen: list[tuple[bool, bool]] = []

    def note(x: Tensor) -> Tensor:
        seen.append((recomputing(), _checkpointed()))
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    note(x)
    for reentrant in (False, True):
        checkpoint(note, x, use_reentrant=reentrant).backward()
    kept = StorageWeakRef((y := torch.ones(1)).untyped_storage())
    alive = not kept.expired()
    del y
    return alive and kept.expired() and seen == [(False, False), *[(False, True), (True, True)] * 2]


def _where(x: Tensor) -> tuple:
    return x.data_ptr(), tuple(x.shape), x.dtype


# --- what people call ------------------------------------------------------------------------------------------------


def _of(model: Any) -> tuple[Any, Optimized, Routing]:
    state = state_of(model)
    inner = unwrap(model)
    if not any(f.routes for f in state.program):
        raise MoefxError(
            f"no function of {type(inner).__name__} returns its routers' choices: is the pass 'routes' in the pipeline?"
        )
    return inner, state, inner._moefx_routing


@contextmanager
def record_routes(model: Any) -> Iterator[Routes]:
    """Within: the forward's choices of experts go into the dict that is yielded: experts module's path -> index [T, K] int64.

    A second forward replaces what the first recorded. Ready for :func:`replay_routes`, here or in another copy of the model.
    """
    _, _, routing = _of(model)
    before, routing.recorded = routing.recorded, {}
    try:
        yield routing.recorded
    finally:
        routing.recorded = before


@contextmanager
def replay_routes(model: Any, routes: Mapping[str, Tensor]) -> Iterator[None]:
    """Within: forwards send tokens to the experts in ``routes`` and compute the routers' weights for these (their gradients
    too), whatever the routers would choose now: a policy trained on the experts that its rollout used (arXiv 2510.11370).

    Raises:
        MoefxError: in the forward, if a layer has no routes, or routes of another shape than [tokens, experts per token].
    """
    _, _, routing = _of(model)
    before, routing.replayed = routing.replayed, dict(routes)
    try:
        yield
    finally:
        routing.replayed = before


def count_routes(model: Any, on: bool = True) -> None:
    """Counts, from now on, how many tokens each expert gets in training forwards; :func:`expert_load` reads the counts."""
    _, _, routing = _of(model)
    routing.counting = on
    routing.counts, routing.read = {}, {}


def expert_load(model: Any, reader: str = "") -> dict[str, Tensor]:
    """Tokens per expert over all ranks: experts module's path -> [E] int64. One all-reduce; all ranks call it.

    :func:`count_routes` comes first. A ``reader`` (a name) gets what was counted since it read last.
    """
    inner, _, routing = _of(model)
    if not routing.counting:
        raise MoefxError(f"nothing is counted yet: call moefx.count_routes({type(inner).__name__}) before the forward")
    experts = {r.path(path): r.num_experts for path, r in _routes(inner)}
    device = next(inner.parameters()).device
    mine = [routing.counts.get(p, torch.zeros(n, dtype=torch.int64)).to(device) for p, n in experts.items()]
    total = torch.cat(mine)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    everywhere = dict(zip(experts, total.split(list(experts.values())), strict=True))
    before, routing.read[reader] = routing.read.get(reader), everywhere
    return everywhere if before is None else {p: n - before[p].to(device) for p, n in everywhere.items()}


def load_metrics(load: Mapping[str, Tensor]) -> dict[str, float]:
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
        site = vars(module).get("_moefx_site")
        if site is not None and site.functions and site.functions[0].routes:
            yield from ((path, r) for r in site.functions[0].routes)


def warn_balanced(model: Any) -> None:
    warnings.warn(
        f"balanced_routing=True: {type(model).__name__} sends tokens to experts in turn, whatever its routers say. It learns "
        "nothing useful: for benchmarks only",
        stacklevel=3,
    )
