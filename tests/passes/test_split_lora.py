"""Low-rank updates of experts' matrices become factors of ``experts``; what is no such update stays."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import moefx
from moefx import ops
from moefx.ir.graph import arguments, aten, is_call, value
from moefx.passes import SplitLoRA
from tests.support import passes
from tests.support.families import batch, build

E, H, INNER, RANK, T, K = 3, 8, 6, 2, 5, 2


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    index = torch.rand(T, E, generator=g).topk(K).indices
    parameters = (normal(E, 2 * INNER, H), normal(E, H, INNER), normal(E, 2 * INNER, RANK), normal(E, RANK, H))
    return (normal(T, H), normal(T, K)), index, [nn.Parameter(p) for p in parameters]


def rewritten(update):
    """The pass over experts whose gate_up is ``update(W, B, A)``; values and gradients are compared."""
    (x, weights), index, parameters = inputs()

    def function(up, down, b, a, x, weights, index):
        return ops.experts(x, index, weights, update(up, b, a), None, down, None, activation="swiglu")

    return passes.run([SplitLoRA()], function, (x, weights, index), parameters)


FORMS = {
    "baddbmm": lambda w, b, a: torch.baddbmm(w, b, a, alpha=0.5),
    "twice": lambda w, b, a: torch.baddbmm(torch.baddbmm(w, b, a, alpha=0.5), 2 * b, a),
    "sum": lambda w, b, a: w + (b @ a) * 0.5,
    "sum with alpha": lambda w, b, a: torch.add(w, torch.bmm(b, a), alpha=0.5),
    "product first": lambda w, b, a: torch.bmm(b, a) * 2.0 * 0.25 + w,
    "no scale": lambda w, b, a: w + b @ a,
}


@pytest.mark.parametrize("form", FORMS)
def test_an_update_becomes_factors(form):
    f, changes = rewritten(FORMS[form])
    (node,) = passes.calls(f, ops.experts)
    given = arguments(node)
    many = 2 if form == "twice" else 1
    assert value(given["gate_up_lora_a"]).shape == (E, many * RANK, H)
    assert value(given["gate_up_lora_b"]).shape == (E, 2 * INNER, many * RANK)
    assert given["gate_up"].op == "placeholder" and given["down_lora_a"] is None
    assert changes.made and not passes.calls(f, aten.baddbmm.default)
    sizes = [value(n).numel() for n in f.graph.nodes if is_call(n) and isinstance(value(n), torch.Tensor)]
    assert max(sizes) < E * 2 * INNER * H  # nothing as large as the matrices


OTHERS = {
    "beta": lambda w, b, a: torch.baddbmm(w, b, a, beta=0.5),
    "scaled matrices": lambda w, b, a: w * 2,
    "alpha of the matrices": lambda w, b, a: torch.add(torch.bmm(b, a), w, alpha=0.5),
    "another sum": lambda w, b, a: w + w.flip(0),
    "one update for all experts": lambda w, b, a: w + (b[0] @ a[0]),
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_sums_stay(form):
    f, changes = rewritten(OTHERS[form])
    (node,) = passes.calls(f, ops.experts)
    assert arguments(node)["gate_up_lora_a"] is None and not changes.made


def test_one_factor_without_the_other():
    (x, weights), index, (up, down, _, a) = inputs()
    with pytest.raises(moefx.MoefxError, match="gate_up_lora_a is given without gate_up_lora_b"):
        ops.experts(x, index, weights, up, None, down, None, gate_up_lora_a=a, activation="swiglu")
    with pytest.raises(moefx.MoefxError, match=r"gate_up_lora_b \(3, 6, 6\)"):
        ops.experts(x, index, weights, up, None, down, None, gate_up_lora_a=a, gate_up_lora_b=down[:, :6], activation="swiglu")


def adapted(family, adapters):
    model = build(family)
    names = sorted({"experts." + n.rpartition(".")[2] for n, p in model.named_parameters() if "experts." in n and p.dim() == 3})
    for i, (r, alpha) in enumerate(adapters):
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=[], target_parameters=names)
        model = model.add_adapter(f"{i}", config) or model if i else get_peft_model(model, config, adapter_name="0")
    model.base_model.set_adapter([f"{i}" for i in range(len(adapters))])
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.requires_grad_().data.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return model


@pytest.mark.parametrize("adapters", [[(3, 4)], [(2, 4), (5, 7)]], ids=["one adapter", "two adapters"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_peft_trains_by_factors(family, adapters):
    plain = adapted(family, adapters)
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    losses = [m(**batch(2, 9)).loss for m in (plain, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    changes = moefx.report(model)["split_lora"]
    rank = sum(r for r, _ in adapters)
    assert changes.made and all(f"rank {rank}" in c.what for c in changes.made)
    assert not moefx.report(model).fallbacks


def test_a_backend_without_the_arguments_is_not_asked():
    """Kernels of users that were written before there were factors."""

    @ops.takes_spec
    def experts(x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias, *, spec: ops.ExpertsSpec):
        raise AssertionError("called without the factors")

    mine = moefx.Backend("mine", {ops.experts: moefx.Kernel(experts)})
    model = moefx.optimize(adapted("qwen3_moe", [(3, 4)]), backends=[mine, "torch"], compile=False)
    model(**batch(1, 5)).loss.backward()
    assert any("mine refused: its kernel has no argument gate_up_lora_a" in c.what for c in moefx.report(model)["lower"].made)
