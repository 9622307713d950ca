"""FSDP2 policies given to parallelize, and models built on the meta device."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from tests.support.spawn import run


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


POLICIES = {
    "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def policies(rank, world):
    """Runs in each rank; what is wrong, as sentences. Against one process in the dtype of the work."""
    import moefx
    from tests.support.families import batch, build

    wrong = []
    for name, options in POLICIES.items():
        work = torch.bfloat16 if name == "mixed" else torch.float32
        one = build("qwen3_moe")
        if name == "mixed":  # the weights that bf16 can say, so that the casts of one process change nothing
            one = one.bfloat16().float()
        model = moefx.parallelize(build("qwen3_moe").to(work).float(), ep_size=2, compile=False, strict=True, **options)
        b = [batch(2, 9, seed=r) for r in range(world)]
        out = model(**b[rank])
        loss = out.loss
        loss.backward()
        if out.logits.logits is not None:
            wrong.append(f"{name}: logits were computed, though nobody reads them")
        try:
            out.logits.sum()
        except moefx.MoefxError as error:
            wrong += [] if "read them before loss.backward()" in str(error) else [str(error)]
        else:
            wrong.append(f"{name}: logits after the backward were computed with a shard")
        reference = one.to(work)
        theirs = [reference(**x).loss for x in b]
        sum(x / world for x in theirs).backward()
        if not torch.allclose(loss.float(), theirs[rank].float(), rtol=2e-2 if name == "mixed" else 1e-5):
            wrong.append(f"{name}: loss {loss}, {theirs[rank]}")
        if any(p.dtype != torch.float32 or p.grad.dtype != torch.float32 for p in model.parameters()):
            wrong.append(f"{name}: weights or gradients are not in fp32")
        if name == "offloaded" and any(p.device.type != "cpu" for p in model.parameters()):
            wrong.append("offloaded: not on the CPU")
        for (n, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            far, size = float((whole(p.grad) - q.grad.float()).norm()), float(q.grad.float().norm())
            if not far <= (5e-2 if name == "mixed" else 1e-4) * size + 1e-7:
                wrong.append(f"{name} rank {rank}: gradient of {n}: {far:.1e} of {size:.1e}")
        moefx.clip_grad_norm_(model, 1.0)
        torch.optim.AdamW(model.parameters()).step()
        if moefx.report(model).fallbacks:
            wrong.append(f"{name}: {moefx.report(model).fallbacks}")
    return wrong


def a_mesh_of_all_parameters(rank, world):
    from torch.distributed.device_mesh import init_device_mesh

    import moefx
    from tests.support.families import build

    try:
        moefx.optimize(build("qwen3_moe"), mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep")))
    except moefx.MoefxError as error:
        return str(error)


def test_optimize_leaves_dense_parameters_to_parallelize():
    for said in run(a_mesh_of_all_parameters, 2, timeout=200):
        assert "the mesh has the dimensions ('efsdp', 'ep')" in said and "call moefx.parallelize(model, ep_size=" in said


def from_meta(rank, world, cases):
    """A model without weights gets those of Transformers' initialization, the same on every mesh, whatever a rank's own seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import moefx
    from tests.support.families import COMMON, FAMILIES, batch

    found = {}
    for name, ep, replicas in cases:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**COMMON, **FAMILIES[name]}))
        torch.manual_seed(5 + rank)
        model = moefx.parallelize(model, ep_size=ep, dp_replicate=replicas, compile=False, strict=True)
        state = {n: whole(t.detach()).clone() for n, t in model.state_dict().items()}
        found[name, ep] = state
        loss = model(**batch(1, 9)).loss
        loss.backward()
        found[name, ep, "loss"] = float(loss.detach())
    return found


def test_policies():
    assert [w for wrong in run(policies, 2, timeout=300) for w in wrong] == []


CASES = [("qwen3_moe", 2, 1), ("deepseek_v3", 1, 1), ("qwen3_moe", 1, 2)]


def test_from_meta():
    from tests.support.families import build

    first, second = run(from_meta, 2, CASES, timeout=300)
    for key, state in first.items():
        if key[-1] == "loss":
            assert state == second[key] and abs(state - 5.55) < 0.3  # log 256: nothing is known yet
            continue
        assert all(torch.equal(t, second[key][n]) for n, t in state.items())
        usual = build(key[0]).state_dict()  # twice as large: see tests/support/families.py
        assert state.keys() == usual.keys()
        for n, t in state.items():
            std = 1.0 if t.dim() == 1 or not usual[n].std() else float(t.std() / usual[n].std())
            assert t.isfinite().all() and (0.4 < std < 1.1), (key, n, std)
    assert all(torch.equal(t, first["qwen3_moe", 1][n]) for n, t in first["qwen3_moe", 2].items())
