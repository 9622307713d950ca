"""Compares an optimized model with its original forward on a batch: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefx.distributed.expert_sharding import gather_experts
from moefx.errors import MoefxError, VerifyError
from moefx.integrations import transformers as hf
from moefx.integrations.peft import unwrap
from moefx.runtime.state import Optimized, state_of

#: Largest difference allowed, relative to the tensor's largest value: some thousand roundings in sums.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}


@dataclass(frozen=True)
class Row:
    """One tensor: the largest difference, absolute and relative to the largest value of the original."""

    name: str
    absolute: float
    relative: float
    tolerance: float
    noise: float = 0.0  #: absolute difference that is rounding, relative to the largest gradient of the model

    @property
    def ok(self) -> bool:
        """Is the difference within the tolerance?"""
        return self.relative <= self.tolerance or self.absolute <= self.noise


@dataclass(frozen=True)
class Verification:
    """``print`` shows the table; ``ok`` says whether every row is within its tolerance; ``worst`` is the worst row."""

    rows: tuple[Row, ...]
    forward_only: bool = False  #: nothing requires a gradient, so outputs alone were compared

    @property
    def ok(self) -> bool:
        """Are all rows within their tolerances?"""
        return all(r.ok for r in self.rows)

    @property
    def worst(self) -> Row:
        """The row with the largest difference, relative to its tolerance."""
        return max(self.rows, key=lambda r: (not r.ok, r.relative / r.tolerance))

    def raise_if_wrong(self) -> None:
        """Raises VerifyError, naming the worst row, if a row is not within its tolerance."""
        if not self.ok:
            w = self.worst
            raise VerifyError(
                f"{w.name} differs by {w.relative:.1e} of its largest value, {w.tolerance:.0e} is allowed; "
                f"{sum(not r.ok for r in self.rows)} of {len(self.rows)} tensors differ: print(moefx.verify(model, batch))"
            )

    def __str__(self) -> str:
        from rich.table import Table

        from moefx.analysis.text import render

        table = Table("tensor", "max abs", "max rel", "allowed", "")
        for r in self.rows:
            table.add_row(r.name, f"{r.absolute:.1e}", f"{r.relative:.1e}", f"{r.tolerance:.0e}", "" if r.ok else "WRONG")
        notes = ["forward only: nothing that the loss depends on requires a gradient"] if self.forward_only else []
        return render(table, *notes)


def compare(
    name: str, original: Tensor | None, new: Tensor | None, tolerance: float | None = None, largest: float = 0.0
) -> Row:
    """The row of two tensors.

    A tensor that exists on one side only, or has NaN in other places, differs infinitely. Exception: zeros where the original
    has no gradient, as a loop over experts gives none to experts without tokens.

    Args:
        name: of the tensor.
        original: of the original model.
        new: of the optimized model.
        tolerance: relative to the largest value; None: by dtype.
        largest: largest value of all gradients. A gradient that is zero except for rounding (the query's, with a single token)
            is compared with it.
    """
    if original is None and (new is None or not new.any()):
        return Row(name, 0.0, 0.0, 1.0)
    if original is None or new is None or original.shape != new.shape:
        return Row(name, float("inf"), float("inf"), 1.0)
    allowed = TOLERANCE[original.dtype] if tolerance is None else tolerance
    a, b = original.detach().double(), new.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return Row(name, float("inf"), float("inf"), allowed)
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    gap = float((a - b).abs().max()) if a.numel() else 0.0
    size = float(a.abs().max()) if a.numel() else 0.0
    noise = 4 * torch.finfo(original.dtype).eps * largest
    return Row(name, gap, gap / size if size else (0.0 if gap == 0 else float("inf")), allowed, noise)


def verify(model: Any, batch: Mapping[str, Any], *, tolerance: float | None = None) -> Verification:
    """Runs a batch through the original and the optimized model, and compares loss, logits and all gradients.

    Where nothing requires a gradient, only loss and logits are compared (:attr:`Verification.forward_only`). Gradients and mode
    of the model are not changed. Under expert parallelism every rank gathers all experts for the original run, which takes
    memory, and compares its own shards.

    Args:
        model: optimized. All ranks call it, each with its own batch.
        batch: keyword arguments of the model's forward.
        tolerance: largest relative difference allowed; None: by dtype, :data:`TOLERANCE`.

    Returns:
        The differences; :meth:`Verification.raise_if_wrong` raises if one is not within its tolerance.

    Raises:
        MoefxError: the model is not optimized, or returns neither loss nor logits.
    """
    state = state_of(model)
    model = unwrap(model)
    kept = {n: p.grad for n, p in model.named_parameters()}
    try:
        with _original(model, state):
            wanted_out, wanted = _run(model, batch)
        wanted = _local(model, wanted, state)
        new_out, new = _run(model, batch)
    finally:
        for n, p in model.named_parameters():
            p.grad = kept.get(n)
    new = {n: g.to_local() if isinstance(g, DTensor) else g for n, g in new.items()}
    return _compared(wanted_out, wanted, new_out, new, tolerance)


def against(original: Any, model: Any, batch: Mapping[str, Any], *, tolerance: float | None = None) -> Verification:
    """As :func:`verify`, in one process, against a separate unmodified model with the same weights."""
    return _compared(*_run(original, batch), *_run(model, batch), tolerance)


def _compared(
    wanted_out: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor | None],
    new_out: Mapping[str, Tensor],
    new: Mapping[str, Tensor | None],
    tolerance: float | None,
) -> Verification:
    rows = [compare(k, wanted_out[k], new_out[k], tolerance) for k in wanted_out]
    largest = max((float(g.abs().max()) for g in wanted.values() if g is not None and g.numel()), default=0.0)
    rows += [compare(f"grad {n}", wanted[n], new[n], tolerance, largest) for n in new]
    return Verification(tuple(rows), forward_only=all(g is None for g in (*wanted.values(), *new.values())))


@contextmanager
def _original(model: nn.Module, state: Optimized) -> Iterator[None]:
    sharded = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
    state.bypass = True
    if state.shards_experts:
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", None)
        gather_experts(model)
    try:
        with hf.named(model, state.implementations):
            yield
    finally:
        state.bypass = False
        for name, parameter in sharded.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, parameter)
        if state.shards_experts:
            model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def _local(model: nn.Module, grads: dict[str, Tensor | None], state: Optimized) -> dict[str, Tensor | None]:
    """Experts' gradients as under expert parallelism: this rank's shard of the mean over ranks."""
    if not state.shards_experts:
        return {n: g.to_local() if isinstance(g, DTensor) else g for n, g in grads.items()}
    out = dict(grads)
    for name, p in model.named_parameters():
        g = grads.get(name)
        if isinstance(p, DTensor) and g is not None:
            dist.all_reduce(g)
            ep = p.device_mesh
            out[name] = (g / dist.get_world_size()).chunk(ep.size())[ep.get_local_rank()]
    return out


def _run(model: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    devices = [next(model.parameters()).device] if next(model.parameters()).is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        # autograd cannot save tensors that the caller made in inference mode
        out = model(**{k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in batch.items()})
        kept = {}
        if getattr(out, "loss", None) is not None:
            kept["loss"] = out.loss
        if getattr(out, "aux_loss", None) is not None:
            kept["aux_loss"] = out.aux_loss
        if "loss" not in kept:
            if not isinstance(getattr(out, "logits", None), Tensor):
                raise MoefxError(
                    f"the model returned {type(out).__name__} with neither loss nor logits: add labels to the batch"
                )
            kept["logits"] = out.logits
        objective = kept.get("loss")
        if objective is None:
            objective = (out.logits.float() * torch.linspace(-1, 1, out.logits.shape[-1], device=out.logits.device)).mean()
        if objective.requires_grad:
            objective.backward()
        if "logits" not in kept and isinstance(getattr(out, "logits", None), Tensor):
            with torch.no_grad():
                kept["logits"] = out.logits * 1
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
    return kept, grads
