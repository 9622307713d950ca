"""FSDP2 and HSDP around expert parallelism: gradients, clipped norm and optimizer step of one process on the global batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from spawn import run
from torch.distributed.device_mesh import init_device_mesh


def start():
    """In a rank: makes the helpers of the tests importable."""
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def global_batch(world, accumulation, seed):
    """[accumulation][world] micro-batches: lengths that differ, labels masked unevenly, no label at all on one rank."""
    from tests.families import batch

    made = []
    for a in range(accumulation):
        row = []
        for r in range(world):
            b = batch(2, 5 + r + a, seed=100 * seed + 10 * a + r)
            b["labels"] = b["labels"].clone()
            b["labels"][:, : (r * 3) % 5] = -100
            if r == world - 1 and a == 0:
                b["labels"][:] = -100
            row.append(b)
        made.append(row)
    items = sum(int((b["labels"][:, 1:] != -100).sum()) for row in made for b in row)
    return made, items


def together(row):
    """The ranks' batches as one, padded on the right: the auxiliary loss is none of a sum of batches."""
    from torch.nn.functional import pad

    length = max(b["input_ids"].shape[1] for b in row)

    def join(tensors, value):
        return torch.cat([pad(t, (0, length - t.shape[1]), value=value) for t in tensors])

    ids, labels = join([b["input_ids"] for b in row], 0), join([b["labels"] for b in row], -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": join([torch.ones_like(b["input_ids"]) for b in row], 0)}


def z_loss(out, mask):
    """As arXiv 2202.08906 defines it, over the tokens that are not padding."""
    return sum(torch.logsumexp(x.float(), -1)[mask.reshape(-1) == 1].square().mean() for x in out.router_logits)


def evaluated(model, batch):
    """Loss and logits, in the middle of a step: nothing of it may be seen in the gradients, in the norm or by an optimizer."""
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    model.train()
    return out.loss, out.logits


def train_step(model, micro, items, scale, aux, accumulate=lambda last: None, z=0.0):
    found = []
    for i, b in enumerate(micro):
        accumulate(i == len(micro) - 1)
        out = model(**b, num_items_in_batch=items, output_router_logits=aux or None)
        loss = out.loss + z * z_loss(out, b["attention_mask"]) if z else out.loss
        (loss * scale).backward()
        found.append(float(out.aux_loss.detach()) if aux else 0.0)
        if i == 0 and len(micro) > 1:
            del out, loss
            evaluated(model, b)  # in the middle of the accumulation: gradients that are not reduced yet must survive
    return found


STARVED = "nemotron_h"


def some_experts_starve(model):
    """Nemotron-H's routers choose the first half of the experts only: with ep_size=2, a rank's experts get no token."""
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias") and model.config.model_type == STARVED:
            bias[: len(bias) // 2] = 10.0
    return model


def agrees(rank, world, cases):
    """Runs in each rank; what differs, as sentences."""
    start()
    import moefx
    from tests.families import build

    wrong = []
    for name, ep, replicas, accumulation, aux in cases:
        case = f"{name} ep={ep} dp_replicate={replicas} x{accumulation} aux={aux} rank {rank}"
        family, few = (QWEN, {"num_experts": 2}) if name == FEW else (name, {})
        one, model = (some_experts_starve(build(family, **few)) for _ in range(2))
        z = 0.1 if aux else 0.0
        options = {"compile": False, "strict": True, "router_z_loss": z}
        if replicas > 1 and ep > 1:  # the other way to say it
            sizes, names = (replicas, world // replicas // ep, ep), ("dp_replicate", "efsdp", "ep")
            model = moefx.optimize(model, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=names), **options)
        else:
            model = moefx.parallelize(model, ep_size=ep, dp_replicate=replicas, **options)
        evaluated(model, global_batch(world, 1, 0)[0][0][0])  # FSDP must not leave what it gathered to the optimizer
        steps = [torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3) for m in (model, one)]
        for step in range(2 if world < 8 else 1):
            micro, items = global_batch(world, accumulation, step)
            ours = train_step(model, [row[rank] for row in micro], items, world, aux, model.set_requires_gradient_sync)
            theirs = train_step(one, list(map(together, micro)), items, 1.0, aux, z=z)
            sizes = {p.to_local().numel() / p.numel() * world / replicas for n, p in model.named_parameters() if p.dim() == 3}
            if sizes != {1.0}:
                wrong.append(f"{case}: of an equal share of experts' weights the rank has {sizes}")
            b = micro[0][(rank + 1) % world]
            seen, wanted = evaluated(model, b), evaluated(one, b)
            if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in zip(seen, wanted)):
                wrong.append(f"{case}: evaluation: {seen[0]}, {wanted[0]}")
            starved = [g for n, g in ((n, p.grad) for n, p in one.named_parameters()) if name == STARVED and ".experts.down" in n]
            if any(g[g.shape[0] // 2 :].any() or not g[0].any() for g in starved) or (name == STARVED) != bool(starved):
                wrong.append(f"{case}: experts that should get no token get some")
            if not torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5):
                wrong.append(f"{case}: auxiliary losses {ours}, {theirs}")
            for (n, p), q in zip(model.named_parameters(), one.named_parameters(), strict=True):
                far, size = float((whole(p.grad) - q[1].grad).abs().max()), float(q[1].grad.abs().max())
                if not far <= 1e-4 * size + 1e-7:
                    wrong.append(f"{case}: gradient of {n}: {far:.1e} of {size:.1e}")
            limit = 0.5 * float(torch.nn.utils.get_total_norm([p.grad for p in one.parameters()]))
            norms = moefx.clip_grad_norm_(model, limit), torch.nn.utils.clip_grad_norm_(one.parameters(), limit)
            if not torch.allclose(*norms, rtol=1e-5):
                wrong.append(f"{case}: norms {norms}")
            for optimizer in steps:
                optimizer.step()
                optimizer.zero_grad()
            for (n, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
                far = float((whole(p) - q).detach().abs().max())
                if not far <= 2e-5:
                    wrong.append(f"{case}: {n} after step {step}: {far:.1e}")
        if moefx.report(model).fallbacks:
            wrong.append(f"{case}: {moefx.report(model).fallbacks}")
    return wrong


QWEN = "qwen3_moe"
FEW = "fewer experts than ranks"


@pytest.mark.parametrize(
    "world, cases",
    [
        (2, [(QWEN, 1, 1, 3, True), (QWEN, 2, 1, 1, False), (QWEN, 1, 2, 1, False), (STARVED, 2, 1, 3, False)]),
        (4, [(QWEN, 2, 1, 3, True), (QWEN, 2, 2, 1, True), (QWEN, 4, 1, 3, False), (QWEN, 1, 2, 3, False), ("gpt_oss", 2, 1, 1, False), (FEW, 2, 1, 1, True), (FEW, 1, 1, 1, False)]),
        (8, [(QWEN, 8, 1, 3, True), (QWEN, 2, 2, 3, False)]),
    ],
    ids=["2 ranks", "4 ranks", "8 ranks"],
)
def test_one_process_and_many(world, cases):
    assert [w for wrong in run(agrees, world, cases, timeout=600) for w in wrong] == []
