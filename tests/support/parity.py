"""Comparisons that several tests make: one step of two models, gradients in 16 bits, a checkpoint over ranks with one process."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import moefx
from tests.support.families import batch


def step(model: Any, **given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch(2, 9), **given).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: Any, other: Any) -> None:
    (loss, gradients), (wanted, expected) = step(model), step(other)
    torch.testing.assert_close(loss, wanted)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def distances_in_bf16(plain: Any, batch: Mapping[str, Any], **options: Any) -> tuple[float, float]:
    """How far all gradients in bf16 are from fp32's, relatively: with moefx, and without. No gradient counts as zeros."""
    rounded = copy.deepcopy(plain).bfloat16()
    model = moefx.optimize(copy.deepcopy(rounded), compile=False, **options)
    found = []
    for m in (copy.deepcopy(plain), rounded, model):
        m.zero_grad()
        m(**batch).loss.backward()
        found.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in m.parameters()])
        )
    own, ours = (float((g - found[0]).norm() / found[0].norm()) for g in found[1:])
    return ours, own


def of_a_checkpoint(rank: int, world: int, folder: str, auto: Any, batches: Sequence[Mapping[str, Any]]) -> list[str]:
    """FSDP2 and experts over all ranks, each with its own of ``batches``: what differs from one process, which has the mean of all.

    A parameter that no batch meets may have no gradient or zeros.
    """
    plain = auto.from_pretrained(folder).train()
    losses = [plain(**b).loss for b in batches]
    (sum(losses) / world).backward()
    model = moefx.parallelize(folder, ep_size=world, compile=False, strict=True, lost_after=0).train()
    loss = model(**batches[rank]).loss
    loss.backward()
    wrong = [] if abs(loss - losses[rank]) < 1e-5 * losses[rank] else [f"loss {loss} instead of {losses[rank]}"]
    if not type(model).__name__.endswith(type(plain).__name__):  # FSDP puts its own before it
        wrong.append(f"{type(model).__name__} instead of {type(plain).__name__}")
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        exact, found = p.grad, None if q.grad is None else q.grad.full_tensor()
        if exact is None or found is None:
            wrong += [name] if (exact is None or not exact.any()) != (found is None or not found.any()) else []
            continue
        far = (found - exact).abs().max() / exact.abs().max().clamp(min=1e-7)
        wrong += [f"{name}: {far:.1e}"] if far > 1e-3 else []
    return wrong
