"""FSDP2 and HSDP around expert parallelism: gradients, clipped norm and optimizer step of one process on the global batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import run


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def global_batch(world, accumulation, seed):
    """[accumulation][world] micro-batches: lengths that differ, labels masked unevenly, no label at all on one rank."""
    from tests.support.families import batch

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
    """Runs in each rank; what differs, as sentences. The one process is a part of rank 0, which does all comparing."""
    import moefx
    from tests.support.families import KNOWN

    wrong = []
    for i, (name, ep, replicas, accumulation, aux) in enumerate(cases):
        case = f"{name} ep={ep} dp_replicate={replicas} x{accumulation} aux={aux}"
        one = some_experts_starve(KNOWN[name]())
        model = copy.deepcopy(one)
        z = 0.1 if aux else 0.0
        options = {"compile": False, "strict": True, "router_z_loss": z}
        model = moefx.parallelize(model, ep_size=ep, dp_replicate=replicas, **options)
        evaluated(model, global_batch(world, 1, 0)[0][0][0])  # FSDP must not leave what it gathered to the optimizer
        ours = Many(model, world, replicas)
        theirs = One(one) if rank == 0 else None
        for step in range(2 if i < 1 and world < 8 else 1):  # a second step shows that the first left nothing behind
            micro, items = global_batch(world, accumulation, step)
            aux_losses = train_step(model, [row[rank] for row in micro], items, world, aux, model.set_requires_gradient_sync)
            found = ours.after(aux_losses, micro[0][(rank + 1) % world])
            limit = [0.0]
            if theirs:
                aux_losses = train_step(one, list(map(together, micro)), items, 1.0, aux, z=z)
                wanted = theirs.after(aux_losses, [micro[0][(r + 1) % world] for r in range(world)])
                wrong += [f"{case}: {text}" for text in theirs.compare(found, wanted, starving=name == STARVED)]
                limit = [0.5 * float(torch.nn.utils.get_total_norm([p.grad for p in one.parameters()]))]
            dist.broadcast_object_list(limit)
            norm, weights = ours.step(moefx.clip_grad_norm_(model, limit[0]))
            if theirs:
                wanted_norm, wanted_weights = theirs.step(torch.nn.utils.clip_grad_norm_(one.parameters(), limit[0]))
                if not all(torch.allclose(n, wanted_norm, rtol=1e-5) for n in norm):
                    wrong.append(f"{case}: norms {norm}, {wanted_norm}")
                for n, w in wanted_weights.items():
                    far = float((weights[n] - w).abs().max())
                    if not far <= 2e-5:
                        wrong.append(f"{case}: {n} after step {step}: {far:.1e}")
        if moefx.report(model).fallbacks:
            wrong.append(f"{case}, rank {rank}: {moefx.report(model).fallbacks}")
    return wrong


class Many:
    """The model of all ranks. Every method is called by all of them; what it returns, rank 0 compares."""

    def __init__(self, model, world, replicas):
        self.model, self.shares = model, world / replicas
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)

    def after(self, aux_losses, batch):
        shares = {p.to_local().numel() / p.numel() * self.shares for p in self.model.parameters() if p.dim() == 3}
        return {
            "aux": gathered(aux_losses),
            "shares": gathered(shares),
            "seen": gathered(evaluated(self.model, batch)),
            "grads": {n: whole(p.grad) for n, p in self.model.named_parameters()},
        }

    def step(self, norm):
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gathered(norm), {n: whole(p).detach() for n, p in self.model.named_parameters()}


class One:
    """The untouched model, on the global batch."""

    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)

    def after(self, aux_losses, batches):
        grads = {n: p.grad for n, p in self.model.named_parameters()}
        return {"aux": aux_losses, "seen": [evaluated(self.model, b) for b in batches], "grads": grads}

    def step(self, norm):
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, {n: p.detach() for n, p in self.model.named_parameters()}

    @staticmethod
    def compare(found, wanted, *, starving):
        for rank, shares in enumerate(found["shares"]):
            if shares != {1.0}:
                yield f"of an equal share of experts' weights rank {rank} has {shares}"
        for rank, (seen, right) in enumerate(zip(found["seen"], wanted["seen"], strict=True)):
            if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in zip(seen, right)):
                yield f"rank {rank}: evaluation: {seen[0]}, {right[0]}"
        for rank, aux in enumerate(found["aux"]):
            if not torch.allclose(torch.tensor(aux), torch.tensor(wanted["aux"]), rtol=1e-5):
                yield f"rank {rank}: auxiliary losses {aux}, {wanted['aux']}"
        starved = [g for n, g in wanted["grads"].items() if starving and ".experts.down" in n]
        if any(g[g.shape[0] // 2 :].any() or not g[0].any() for g in starved) or starving != bool(starved):
            yield "experts that should get no token get some"
        assert found["grads"].keys() == wanted["grads"].keys()
        for n, g in wanted["grads"].items():
            far, size = float((found["grads"][n] - g).abs().max()), float(g.abs().max())
            if not far <= 1e-4 * size + 1e-7:
                yield f"gradient of {n}: {far:.1e} of {size:.1e}"


def gathered(value):
    """Of all ranks, in order, on each."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


QWEN = "qwen3_moe"
FEW = "fewer experts than ranks"  #: of tests/support/families.py


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (
            2,
            [
                (QWEN, 1, 1, 3, True),
                (QWEN, 1, 2, 1, False),
                (STARVED, 2, 1, 3, False),
                ("llama4_text", 2, 1, 1, False),
            ],
        ),
        (
            4,
            [
                (QWEN, 2, 1, 3, True),
                (QWEN, 2, 2, 1, True),
                ("gpt_oss", 4, 1, 1, False),
                (FEW, 2, 1, 1, True),
            ],
        ),
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_one_process_and_many(world, cases):
    assert [w for wrong in run(agrees, world, cases, timeout=600, all_calls=True) for w in wrong] == []
