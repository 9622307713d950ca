"""PEFT LoRA on attention and on fused experts' weights, over ranks: gradients and a step of one process; the saved adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.spawn import run


def adapted(name):
    """The model with LoRA on attention and on both of the experts' weights, its factors not zero."""
    from peft import LoraConfig, get_peft_model

    from tests.support.families import build

    torch.manual_seed(1)
    up = "up_proj" if name == "nemotron_h" else "gate_up_proj"
    part = "mixer" if name == "nemotron_h" else "mlp"
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        target_parameters=[f"{part}.experts.{up}", f"{part}.experts.down_proj"],
    )
    return get_peft_model(build(name), config)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def agrees(rank, world, cases, folder):
    """Runs in each rank; what differs, as sentences."""
    from torch.nn.parallel import DistributedDataParallel

    import moefx
    from tests.support.families import batch

    wrong = []
    for name, how, ep in cases:
        one, model = adapted(name), adapted(name)
        if how == "parallelize":
            model = moefx.parallelize(model, ep_size=ep, compile=False, strict=True)
            step_model = model
        else:
            model = moefx.optimize(model, ep_size=ep, compile=False, strict=True)
            step_model = DistributedDataParallel(model)
        optimizers = [
            torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-3) for m in (model, one)
        ]
        for step in range(2):
            batches = [batch(2, 9, seed=10 * step + r) for r in range(world)]
            step_model(**batches[rank]).loss.backward()
            sum(one(**b).loss / world for b in batches).backward()
            trained = [
                (n, p, q) for (n, p), q in zip(model.named_parameters(), one.parameters(), strict=True) if q.grad is not None
            ]
            if any(p.grad is not None and q.grad is None for p, q in zip(model.parameters(), one.parameters(), strict=True)):
                wrong.append(f"{name} {how}: a frozen parameter got a gradient")
            for n, p, q in trained:
                far, size = float((whole(p.grad) - q.grad).abs().max()), float(q.grad.abs().max())
                if not far <= 1e-4 * size + 1e-7:
                    wrong.append(f"{name} {how} ep={ep} rank {rank}: gradient of {n}: {far:.1e} of {size:.1e}")
            if not any("experts" in n for n, _, _ in trained):
                wrong.append(f"{name}: no LoRA on experts")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        path = Path(folder, f"{name}-{how}")
        if how == "parallelize" or rank == 0:
            model.save_pretrained(path)
        torch.distributed.barrier()
        if rank == 0:
            wrong += saved_as_one(name, path, one)
        model.eval()
        with torch.no_grad():
            prompt = batch(1, 5, seed=3, labels=False)
            ours = model.generate(**prompt, max_new_tokens=4, do_sample=False)
            theirs = one.eval().generate(**prompt, max_new_tokens=4, do_sample=False)
        if not torch.equal(ours, theirs):
            wrong.append(f"{name} {how}: generates {ours.tolist()}, PEFT alone {theirs.tolist()}")
    return wrong


def saved_as_one(name, path, one):
    """Loads the adapter as anybody would: plain Transformers and PEFT."""
    from peft import PeftModel

    from tests.support.families import batch, build

    plain = PeftModel.from_pretrained(build(name), path).eval()
    one.eval()
    with torch.no_grad():
        a, b = (m(**batch(2, 7, seed=9)).logits for m in (plain, one))
    one.train()
    return (
        []
        if torch.allclose(a, b, atol=1e-4)
        else [f"{name}: the saved adapter's logits are off by {float((a - b).abs().max()):.1e}"]
    )


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, [("nemotron_h", "optimize", 1)]),
        (2, [("qwen3_moe", "optimize", 2), ("gpt_oss", "parallelize", 2), ("qwen3_moe", "parallelize", 1)]),
    ],
)
def test_lora(world, cases, tmp_path):
    assert [w for wrong in run(agrees, world, cases, str(tmp_path), timeout=300) for w in wrong] == []


def merges(rank, world, name, how, ep, folder):
    """Runs in each rank: merged, taken out, disabled, merged for good and saved; what differs from PEFT alone, as sentences."""
    import moefx
    from tests.support.families import batch

    one, model = adapted(name), adapted(name)
    if how == "parallelize":
        model = moefx.parallelize(model, ep_size=ep, compile=False, lost_after=0)
    else:
        model = moefx.optimize(model, ep_size=ep, compile=False)
    wrong = []

    def compare(what, model, one):
        with torch.no_grad():
            found, wanted = (m(**batch(2, 9, seed=rank)).logits for m in (model, one))
        if not torch.allclose(found, wanted, atol=1e-4):
            wrong.append(f"{name} {how} ep={ep} rank {rank} {what}: {float((found - wanted).abs().max()):.1e}")

    for what, do in (
        ("merged", lambda m: m.merge_adapter()),
        ("taken out", lambda m: m.unmerge_adapter()),
        ("merged safely", lambda m: m.merge_adapter(safe_merge=True)),
    ):
        compare(f"before it is {what}", model, one)  # a forward leaves FSDP's root gathered
        for m in (model, one):
            do(m)
        compare(what, model, one)
    with model.disable_adapter(), one.disable_adapter():
        compare("disabled", model, one)
    compare("enabled again", model, one)
    if how == "parallelize":  # not by PEFT's model, which takes merged ones out first
        model.merge_adapter()
        layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
        for layer in layers:
            layer.enable_adapters(False)
        with pytest.raises(moefx.MoefxError, match="merged into the weights and disabled"):
            model(**batch(2, 9, seed=rank))
        for layer in layers:
            layer.enable_adapters(True)
        for layer in model.modules():
            if isinstance(layer, torch.distributed.fsdp.FSDPModule):
                layer.reshard()
        model.unmerge_adapter()
    model, one = (m.merge_and_unload() for m in (model, one))
    compare("merged for good", model, one)
    model.save_pretrained(folder)
    torch.distributed.barrier()
    saved, wanted = dict(type(one).from_pretrained(folder).named_parameters()), dict(one.named_parameters())
    if saved.keys() != wanted.keys() or not all(torch.allclose(saved[n], p, atol=1e-5) for n, p in wanted.items()):
        wrong.append(f"{name} {how} rank {rank}: the saved model is another")
    return wrong


@pytest.mark.parametrize(("how", "name", "world", "ep"), [("optimize", "qwen3_moe", 2, 2), ("parallelize", "gpt_oss", 4, 2)])
def test_merging(how, name, world, ep, tmp_path):
    assert [w for wrong in run(merges, world, name, how, ep, str(tmp_path), timeout=300) for w in wrong] == []
