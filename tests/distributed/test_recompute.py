"""Activation checkpointing over ranks: recomputation must route tokens as the forward did."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tests.support.spawn import run


def selective():
    """Keeps what matrix products give, but not the routers' logits (of 8 experts)."""

    def policy(context, op, *args, **kwargs):
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and args[-1].shape[-1] != 8
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)}


HOW = {"full": lambda: {"use_reentrant": False}, "reentrant": lambda: {"use_reentrant": True}, "selective": selective}


def nearly_tied():
    """Four experts get the same logits, and the other four: the smallest rounding chooses two of them."""
    from tests.support.families import build

    model = build("qwen3_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight[:2].repeat_interleave(4, dim=0))
    return model


def nudge(model, seed):
    """The gates' shards change by a rounding, as a GPU's recomputation may."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        part = layer.mlp.gate.weight.to_local()
        with torch.no_grad():
            part.add_(torch.randn(part.shape, generator=generator), alpha=1e-6)


def agrees(rank, world, layouts):
    """Runs in each rank; what differs, as sentences."""
    import moefx
    from tests.support.families import batch

    wrong = []
    b = batch(2, 30 + rank, seed=rank)  # lengths that differ over ranks
    for ep, ways in layouts:
        options = {"ep_size": ep, "compile": False, "strict": True}
        plain = moefx.parallelize(nearly_tied(), **options)
        with moefx.record_routes(plain) as chosen:
            plain(**b).loss.backward()
        for way in ways:
            case = f"ep={ep} {way} rank {rank}"
            model = moefx.parallelize(nearly_tied(), **options)
            model.gradient_checkpointing_enable(HOW[way]())
            loss = model(**b).loss
            nudge(model, 7 + rank)
            loss.backward()
            for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                mine, wanted = p.grad.to_local(), q.grad.to_local()
                if not torch.allclose(mine, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()) + 1e-7):
                    wrong.append(f"{case}: gradient of {n} is {float((mine - wanted).abs().max()):.1e} off")
            wrong += [f"{case}: {note}" for note in moefx.report(model).notes]
            with moefx.record_routes(model) as now, torch.no_grad():
                model(**b)
            if not all((now[path].sort(-1).values != index.sort(-1).values).any() for path, index in chosen.items()):
                wrong.append(f"{case}: the nudge changes nobody's choice, so this test shows nothing")
    return wrong


@pytest.mark.parametrize(
    ("world", "layouts"), [(2, [(2, ["full", "reentrant", "selective"]), (1, ["full"])]), (4, [(2, ["full"])])]
)
def test_routes_are_those_of_the_forward(world, layouts):
    assert [w for wrong in run(agrees, world, layouts, timeout=300) for w in wrong] == []
