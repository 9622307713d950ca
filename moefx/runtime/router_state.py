"""The routers of a model while it runs: routes that are forced, recorded, counted, and kept for recomputation.

A captured function returns its routers' choices (the pass ``ExposeRoutes``), and its replay function takes them as inputs. What
is done with the choices is Python around compiled code, and costs nothing unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from moefx.errors import MoefxError
from moefx.ops.exchange import RecordedDispatches
from moefx.runtime.blocks import Blocks
from moefx.runtime.recomputation import Kept, checkpointed, recomputing, where
from moefx.runtime.state import Optimized

if TYPE_CHECKING:
    from moefx.ir.program import Function, RouterOutputs

#: Recorded routes: path of an experts module -> expert ids [T, K], in the order of the model.
Routes = dict[str, Tensor]


class Block(Protocol):
    """What a block's forward (:class:`moefx.runtime.block.BlockForward`) lets its routers' state read and keep."""

    path: str
    state: Optimized
    kept: list[Any]


@dataclass(eq=False)
class RouterState:
    """The routers of one model while it runs."""

    recorded_routes: Routes | None = None  #: where to record routes; None: they are not recorded
    replayed_routes: Mapping[str, Tensor] | None = None  #: routes that replace the routers' own
    tracks_load: bool = False
    tokens_per_expert: dict[str, Tensor] = field(default_factory=dict)  #: on this rank, since tracking began
    reported: dict[str, dict[str, Tensor]] = field(default_factory=dict)  #: of all ranks, when each reader last read
    logits: list[Tensor] = field(default_factory=list)
    z_loss: Tensor | None = None  #: of the last forward with labels
    nonfinite: list[tuple[str, Tensor]] = field(default_factory=list)
    forwards: int = 0
    differentiates: bool = False  #: does the running forward of the model record gradients?
    blocks: Blocks = field(default_factory=Blocks)
    step: int | None = None  #: the optimizer step, set by moefx.trainer

    def __deepcopy__(self, memo: dict) -> RouterState:
        return type(self)(tracks_load=self.tracks_load)

    # --- around a call of a function ---

    def forced_routes(
        self, block: Block, function: Function, tensors: list[Tensor], training: bool
    ) -> tuple[list[Tensor], RecordedDispatches] | None:
        """The inputs of the replay function that force the routes of this call, and the dispatches that belong to them.

        None if the call can run the function in which the routers choose.
        """
        index, dispatches, x = None, RecordedDispatches(), tensors[0]
        if recomputing():
            kept = next((k for k in block.kept if k.where == where(x) and not k.storage.expired()), None)
            fixed = next((r.not_replayable for r in function.routes if r.not_replayable), "")
            if kept is None or fixed:
                why = fixed or "the input that it was checkpointed with is gone"
                block.state.report.note(block.path, f"its routes are recomputed in the backward: {why}")
            else:
                index, dispatches = kept.index, kept.dispatches
        elif self.replayed_routes is not None:
            counts = zip(function.routes, function.routed(tensors), strict=True)
            index = [self._replayed(r.path(block.path), r, tokens, x.device) for r, tokens in counts]
        if index is None and not (training and checkpointed()):
            return None
        # forward and recomputation must save the same tensors, so both run the replay function
        forced = index is not None
        if index is None:
            counts = zip(function.routes, function.routed(tensors), strict=True)
            index = [torch.zeros(tokens, r.top_k, dtype=torch.int64, device=x.device) for r, tokens in counts]
        return [*index, torch.full((), forced, device=x.device)], dispatches

    def _replayed(self, path: str, route: RouterOutputs, tokens: int, device: torch.device) -> Tensor:
        assert self.replayed_routes is not None
        if route.not_replayable:
            raise MoefxError(f"the routes of {path} cannot be replayed: {route.not_replayable}")
        index = self.replayed_routes.get(path)
        if index is None:
            raise MoefxError(
                f"there are no routes to replay for {path}, only for {', '.join(self.replayed_routes) or 'no module'}"
            )
        if tuple(index.shape) != (tokens, route.top_k):
            raise MoefxError(
                f"the routes to replay for {path} are {list(index.shape)}, this call wants [{tokens}, {route.top_k}] (tokens, "
                "experts per token): replay the batch that was recorded"
            )
        return index.to(device=device, dtype=torch.int64)

    def record(
        self,
        block: Block,
        function: Function,
        x: Tensor,
        training: bool,
        out: tuple,
        dispatches: RecordedDispatches | None,
    ) -> None:
        """Keeps what a call's routers returned as far as it is needed: for recomputation, recording, load tracking, losses."""
        if recomputing():
            return
        if dispatches is not None and training:
            index = [out[r.topk_ids].detach() for r in function.routes]
            block.kept = [k for k in block.kept if not k.storage.expired() and k.where != where(x)]
            block.kept.append(Kept(StorageWeakRef(x.untyped_storage()), where(x), index, dispatches))
        elif block.kept:
            block.kept = []
        for r in function.routes:
            path = r.path(block.path)
            if self.recorded_routes is not None:
                self.recorded_routes[path] = out[r.topk_ids].detach().clone()
            if self.tracks_load and training:
                self._count(path, r, out[r.topk_ids])
            if r.logits is not None and training:
                if self.differentiates and not torch.is_grad_enabled():
                    raise MoefxError(
                        f"router_z_loss: {block.path} is checkpointed with use_reentrant=True, which hides its routers' logits "
                        "from the loss, so that they would get no gradient from it: pass use_reentrant=False"
                    )
                self.logits.append(out[r.logits])
            if r.nonfinite is not None:
                self.nonfinite.append((path, out[r.nonfinite]))

    def _count(self, path: str, route: RouterOutputs, index: Tensor) -> None:
        before = self.tokens_per_expert.get(path)
        if before is None or before.device != index.device:  # the model may have moved
            before = torch.zeros(route.num_experts, dtype=torch.int64) if before is None else before
            self.tokens_per_expert[path] = before.to(index.device)
        flat = index.detach().reshape(-1)
        self.tokens_per_expert[path].scatter_add_(0, flat, torch.ones_like(flat))

    # --- around a forward of the model ---

    def find_blocks(self, model: nn.Module, state: Optimized) -> None:
        """Follows layers that were added, removed or exchanged since: counts of tokens begin anew."""
        added = None if getattr(model, "_is_replica", False) else self.blocks.update(model, self)
        if added is not None:
            self.tokens_per_expert, self.reported = {}, {}
        for path in added or ():
            why = "it was added after optimize: call moefx.restore(model), then moefx.optimize(model) again"
            state.report.fell_back(path, why, warn=True)

    def start(self, model: nn.Module, state: Optimized) -> None:
        """Begins a forward of the model."""
        self.find_blocks(model, state)
        self.logits, self.nonfinite, self.z_loss = [], [], None
        self.forwards += 1
        self.differentiates = torch.is_grad_enabled()

    def finish(self, state: Optimized, out: Any, mask: Tensor | None, total: Callable[[Tensor], Tensor]) -> Any:
        """Checks the forward's numbers and adds to its loss what the plan asks for.

        ``mask`` [B, S]: which tokens are not padding. ``total`` makes sums over this rank's tokens those over all ranks'.
        """
        if self.nonfinite:
            self._raise_if_not_finite()
        logits, self.logits, self.nonfinite = self.logits, [], []  # they hold the autograd graph
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
        many = torch.stack([n for _, n in self.nonfinite]).tolist()  # the one point where the host waits
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
