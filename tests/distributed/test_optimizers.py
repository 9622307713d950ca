"""Optimizers, clipping and other calls on parameters and gradients on several meshes: the results of one process."""

from __future__ import annotations

import contextlib
import copy
import sys

import pytest
import torch

from tests.support.spawn import run

#: Arguments that keep steps apart from rounding.
BASE = {
    "AdamW": {"lr": 1e-2, "eps": 1e-3}, "Adam": {"lr": 1e-2, "eps": 1e-3, "amsgrad": True}, "SGD": {"lr": 0.1, "momentum": 0.9,
    "nesterov": True}, "Adagrad": {}, "Adadelta": {"lr": 0.1}, "Adamax": {"eps": 1e-3}, "NAdam": {"eps": 1e-3}, "RAdam": {},
    "RMSprop": {"eps": 1e-3, "momentum": 0.9, "centered": True}, "Rprop": {}, "ASGD": {}, "Adafactor": {},
}  # fmt: skip
FUSED = ("AdamW", "Adam", "SGD", "Adagrad")
NOT_CAPTURABLE = ("SGD", "Adagrad", "Adafactor")


def forms(name):
    """The default, and what CUDA takes by default or can be asked for."""
    yield {}
    yield {"foreach": True}
    if name in FUSED:
        yield {"fused": True}
    if name not in NOT_CAPTURABLE:
        yield {"foreach": True, "capturable": True}


def whole(t):
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def start(how, ep):
    """The model over ranks, what to call in a step, and the same in one process."""
    from torch.nn.parallel import DistributedDataParallel

    import moefx
    from tests.support.families import build

    one = build("qwen3_moe", num_hidden_layers=1)
    if how == "parallelize":
        model = moefx.parallelize(copy.deepcopy(one), ep_size=ep, compile=False, lost_after=0)
        return model, model, one
    model = moefx.optimize(copy.deepcopy(one), ep_size=ep, compile=False)
    return model, DistributedDataParallel(model), one


def off(model, one, of=lambda p: p):
    """How far the farthest parameter is from one process's, in that one's largest numbers."""
    pairs = [(whole(of(p)), of(q).detach()) for p, q in zip(model.parameters(), one.parameters(), strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


def backward(step, one, rank, world, seed):
    from tests.support.families import batch

    batches = [batch(2, 9, seed=10 * seed + r) for r in range(world)]
    loss = step(**batches[rank]).loss
    loss.backward()
    losses = [one(**b).loss for b in batches]
    (sum(losses) / world).backward()
    return abs(float(loss.detach() - losses[rank].detach()))


def give(model, one, seed):
    """The same gradients to both, so that many optimizers can be tried without a forward."""
    from moefx.integrations import fsdp

    torch.manual_seed(seed)
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        q.grad = torch.randn_like(q)
        p.grad = torch.zeros_like(p)
        (fsdp.fill(p.grad, q.grad) if hasattr(p, "full_tensor") else p.grad.copy_(q.grad))


def capturable_on_the_cpu():
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.optim") and hasattr(module, "_get_capturable_supported_devices"):
            module._get_capturable_supported_devices = lambda supports_xla=True: ["cpu"]


def steps_agree(rank, world, how, ep, few):
    """Runs in each rank: three steps of every optimizer in every form; what differs, as sentences."""
    import moefx

    model, step, one = start(how, ep)
    capturable_on_the_cpu()
    first = copy.deepcopy(one.state_dict())
    wrong = []
    for name, base in BASE.items():
        for form in forms(name):
            if few and not form.get("foreach"):
                continue
            model.load_state_dict(first)
            one.load_state_dict(first)
            ours, theirs = (getattr(torch.optim, name)(m.parameters(), **base, **form) for m in (model, one))
            for seed in range(3):
                give(model, one, seed)
                ours.step()
                theirs.step()
            far = off(model, one)
            if not far < 1e-5:
                wrong.append(f"{name} {form}: {far:.1e}")
    with pytest.raises(moefx.MoefxError, match="LBFGS decides by the loss of this rank alone"):
        torch.optim.LBFGS(model.parameters()).step(lambda: torch.tensor(1.0))
    model.load_state_dict(first)
    one.load_state_dict(first)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3, foreach=m is model) for m in (model, one))
    for seed in range(2):
        far = backward(step, one, rank, world, seed)
        wrong += [f"loss {far}"] if far > 1e-4 else []
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        state, ours = ours.state_dict(), torch.optim.AdamW(model.parameters(), fused=True)
        ours.load_state_dict(state)
    return wrong + ([f"two steps: {off(model, one):.1e}"] if off(model, one) > 1e-4 else [])


@pytest.mark.parametrize(
    ("world", "how", "ep", "few"),
    [(2, "optimize", 2, False), (2, "parallelize", 1, True), (4, "parallelize", 2, False)],
)
def test_steps(world, how, ep, few):
    assert [w for wrong in run(steps_agree, world, how, ep, few, timeout=300) for w in wrong] == []


def calls_agree(rank, world, how, ep):
    """Runs in each rank: norms, clipping, the scaler, state dicts, averages; what differs, as sentences."""
    import moefx

    model, _step, one = start(how, ep)
    wrong = []

    def check(what, holds):
        if not holds:
            wrong.append(f"rank {rank}: {what}")

    def gradients():
        return off(model, one, lambda p: p.grad)

    for order in (2.0, 1.0, float("inf")):
        for foreach in (None, True, False):
            for clip in (torch.nn.utils.clip_grad_norm_, moefx.clip_grad_norm_):
                give(model, one, 0)
                found = float(clip(model.parameters(), 0.1, order, foreach=foreach))
                wanted = float(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1, order))
                check(f"norm {order} {foreach}: {found} {wanted}", abs(found - wanted) < 1e-4 * wanted and gradients() < 1e-4)
                everybody = [torch.zeros(()) for _ in range(world)]
                torch.distributed.all_gather(everybody, torch.tensor(found))
                check(f"norm {order} {foreach} of others: {everybody}", len({float(n) for n in everybody}) == 1)
    for foreach in (None, True, False):
        give(model, one, 0)
        for m in (model, one):
            torch.nn.utils.clip_grad_value_(m.parameters(), 0.5, foreach=foreach)
        check(f"clipped values {foreach}", gradients() < 1e-5)
    experts = next(p for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
    check("a number", abs(float(experts.detach().norm(1)) / float(whole(experts).norm(1)) - 1) < 1e-5)

    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [whole(p).clone() for p in model.parameters()]
    scaler.scale(torch.zeros(()))
    give(model, one, 0)
    if rank % ep == 0:  # and its replicas
        experts.grad.to_local().view(-1)[0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    check("a step was taken with an infinite gradient", all(map(torch.equal, before, map(whole, model.parameters()))))
    check(f"the scale is {scaler.get_scale()}", scaler.get_scale() == 2.0)

    from tests.support.families import build

    other = build("qwen3_moe", seed=3, num_hidden_layers=1)
    check("whole tensors", not model.load_state_dict(other.state_dict()).missing_keys and off(model, other) == 0)
    lost = {n: t for n, t in one.state_dict().items() if not n.endswith("experts.down_proj")}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(lost)
    kept = [id(p) for p in model.parameters()]
    with pytest.raises(moefx.MoefxError, match="assign=True"):
        model.load_state_dict(one.state_dict(), assign=True)
    check("a parameter was replaced", kept == [id(p) for p in model.parameters()])
    with torch.no_grad():
        vector = torch.nn.utils.parameters_to_vector(one.parameters())
        torch.nn.utils.vector_to_parameters(vector, model.parameters())
        check("a vector into parameters", off(model, one) == 0)
        check("parameters into a vector", torch.equal(whole(torch.nn.utils.parameters_to_vector(model.parameters())), vector))
        experts.data = experts.data * 2
        check(".data", torch.equal(whole(experts), 2 * one.model.layers[0].mlp.experts.down_proj))
        experts.data = experts.data / 2
    with pytest.raises(moefx.MoefxError, match="cannot become"):
        experts.data = experts.data.double()

    averages = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    with pytest.raises(AssertionError, match="deepcopy") if how == "parallelize" else contextlib.nullcontext():
        ours, theirs = (torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=averages) for m in (model, one))
        for m, average in ((model, ours), (one, theirs)):
            average.update_parameters(m)
            m.load_state_dict(other.state_dict())
            average.update_parameters(m)
        check("averages", off(ours.module, theirs.module) < 1e-5)
        check("a copy is not the model", off(ours.module, other) > 1e-2)
        ours.zero_grad()
        copied = torch.nn.parallel.DistributedDataParallel(ours.module)  # its gradients are averaged over replicas too
        backward(copied, theirs.module, rank, world, 5)
        check("gradients of a copy", off(ours.module, theirs.module, lambda p: p.grad) < 1e-4)
    return wrong


@pytest.mark.parametrize(("world", "how", "ep"), [(4, "optimize", 2), (2, "parallelize", 2)])
def test_calls(world, how, ep):
    assert [w for wrong in run(calls_agree, world, how, ep, timeout=300) for w in wrong] == []
