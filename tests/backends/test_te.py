"""The te backend and the pass fp8 without Transformer Engine: its table of kernels, every refusal, the rewriting."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses import FakeTensorMode

import moefx
from moefx import ops
from moefx.backends import builtin, check_signature, resolve, te
from moefx.cli.doctor import diagnose
from moefx.ir.graph import aten, is_call, origin
from moefx.kernels import te as kernels
from moefx.kernels.te import linear
from moefx.ops import grouped_mlp as grouped
from moefx.passes import FP8, Canonicalize, Lower, Route, default
from moefx.rewriting.pipeline import run_pass
from tests.support import te_standin
from tests.support.passes import captured

BF16, FP32 = torch.bfloat16, torch.float32


def node(op, *values, device="cuda", **options):
    """A call of ``op`` on fakes; a tuple (dtype, size, ...) stands for a tensor."""
    graph, args = fx.Graph(), []
    with FakeTensorMode():
        for i, v in enumerate(values):
            if isinstance(v, tuple):
                place = graph.placeholder(f"a{i}")
                place.meta["val"] = torch.empty(v[1:], dtype=v[0], device=device)
                v = place
            args.append(v)
    return graph.call_function(op, tuple(args), options)


def refusal(op, *values, **options):
    return te.BACKEND.kernels[op].refuses(node(op, *values, **options))


def norm(x=(BF16, 3, 8), weight=(BF16, 8), **options):
    return refusal(ops.rms_norm, x, weight, 1e-6, **options)


def router(dtype=FP32, top_k=2, bias=None, device="cuda", **options):
    return refusal(ops.route, (dtype, 5, 32), bias, top_k, device=device, **options)


def attend(dtype=BF16, mask=None, sinks=None, device="cuda", length=9, **options):
    options = {"scale": 0.1, "is_causal": True, **options}
    return refusal(
        ops.attention,
        (dtype, 1, 4, 9, 64),
        (dtype, 1, 2, length, 64),
        (dtype, 1, 2, length, 64),
        mask,
        sinks,
        device=device,
        **options,
    )


SIGMOID = {"score": "sigmoid", "renormalize": True}
BIAS = (FP32, 32)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (lambda: norm(), None),
        (lambda: norm(offset=1.0), None),
        (lambda: norm(weight=None), "multiplies by a weight, this norm has none"),
        (lambda: norm(offset=0.5), "adds 0 or 1 to the weight, this norm 0.5"),
        (lambda: norm(weight=(FP32, 8)), "wants one dtype, the input is torch.bfloat16, the weight torch.float32"),
        (lambda: norm((torch.float64, 3, 8), (torch.float64, 8)), "takes bf16, fp16 or fp32, the input is torch.float64"),
        (lambda: norm(device="cpu"), "kernels run on cuda, a0 is on cpu"),
        (lambda: refusal(ops.add_rms_norm, (BF16, 3, 8), (FP32, 3, 8), (BF16, 8), 1e-6), "the input is torch.bfloat16, the residual torch.float32"),
        (lambda: router(renormalize=True), None),
        (lambda: router(BF16, renormalize=True), None),
        (lambda: router(topk_first=True), None),
        (lambda: router(bias=BIAS, gather=True, **SIGMOID), None),
        (lambda: router(top_k=8, groups=8, topk_groups=4, **SIGMOID), None),
        (lambda: router(top_k=4, groups=8, topk_groups=4, group_score="max"), None),
        (lambda: router(top_k=4, groups=8, topk_groups=8), None),
        (lambda: router(device="cpu"), "kernels run on cuda, a0 is on cpu"),
        (lambda: router(torch.float64), "takes bf16, fp16 or fp32, the logits are torch.float64"),
        (lambda: router(BF16, fp32=False), "computes in fp32, this softmax in torch.bfloat16"),
        (lambda: router(BF16, **SIGMOID), "computes in fp32, this sigmoid in torch.bfloat16"),
        (lambda: router(top_k=16), "does not sort 16 experts a token or more, this router sorts its 16"),
        (lambda: router(bias=BIAS), "adds a bias to sigmoid scores, this one to softmax"),
        (lambda: router(topk_first=True, renormalize=True), "sums to 1, this router divides by the sum once more"),
        (lambda: router(renormalize=True, eps=1e-9), "divides by the sum, this router by the sum + 1e-09"),
        (lambda: router(bias=BIAS, **SIGMOID), "this router's weights are the biased scores"),
        (lambda: router(bias=BIAS, gather=True, topk_first=True, **SIGMOID), "adds the bias to sigmoid scores, this router to the logits"),
        (lambda: router(score="sigmoid"), "renormalizes sigmoid scores of 2 experts a token, this router the other way round"),
        (lambda: router(top_k=1, **SIGMOID), "does not renormalize sigmoid scores of 1 experts a token"),
        (lambda: router(eps=1e-6, **SIGMOID), "by the sum + 1e-20, this router by the sum + 1e-06"),
        (lambda: router(score="sqrtsoftplus"), "knows the scores softmax and sigmoid, this router's are sqrtsoftplus"),
        (lambda: router(renormalize=True, min_sum=1e-12), "divides by any sum, this router by no less than 1e-12"),
        (lambda: router(groups=8, topk_groups=4, renormalize=True), "groups by logits where it renormalizes, this router by softmax"),
        (lambda: router(top_k=8, groups=8, topk_groups=4, topk_first=True, **SIGMOID), "groups by sigmoid, this router by logits"),
        (lambda: router(top_k=4, groups=8, topk_groups=4, group_score="max", zero_fill=True, bias=BIAS, gather=True, **SIGMOID), "gives them the score 0"),
        (lambda: router(top_k=4, groups=8, topk_groups=4), "topk_groups = 1 best experts, this router by 2"),
        (lambda: attend(), None),
        (lambda: attend(sinks=(BF16, 4), window=5), None),
        (lambda: attend(mask=(torch.bool, 1, 1, 9, 9)), "takes causal and window, this attention has a mask tensor"),
        (lambda: attend(softcap=30.0), "used with softcap 0, this attention has 30.0"),
        (lambda: attend(dropout=0.1), "used with dropout 0, this attention has 0.1"),
        (lambda: attend(is_causal=False, window=4), "the window of 4 is for causal attention"),
        (lambda: attend(FP32), "wants q, k, v in bf16 or fp16, they are torch.float32"),
        (lambda: attend(length=11), "used with one length, q has 9, k 11"),
        (lambda: attend(device="cpu"), "kernels run on cuda, a0 is on cpu"),
    ],
)  # fmt: skip
def test_refusals_name_the_two_values_that_disagree(monkeypatch, found, sentence):
    te_standin.install(monkeypatch)
    said = found()
    te_standin.forget()
    if sentence is None:
        assert said is None
    else:
        assert said is not None and sentence in said, said


def test_attention_that_would_run_unfused_is_refused(monkeypatch):
    te_standin.install(monkeypatch)
    q = (BF16, 1, 4, 9, 512)
    said = refusal(ops.attention, q, q, q, None, None, scale=1.0, is_causal=True)
    te_standin.forget()
    assert said.endswith("has no fused attention for this: Disabling FusedAttention: head_dim_qk = 512")


def test_experts(monkeypatch):
    te_standin.install(monkeypatch)
    given = [(BF16, 5, 64), (torch.int64, 5, 2), (FP32, 5, 2), (BF16, 8, 96, 64), None, (BF16, 8, 64, 48), None]
    assert refusal(ops.experts, *given, activation="swiglu") is None
    assert "kernels run on cuda, a0 is on cpu" in refusal(ops.experts, *given, activation="swiglu", device="cpu")
    odd = [(BF16, 5, 20), *given[1:3], (BF16, 8, 96, 20), None, (BF16, 8, 20, 48), None]
    assert "rows of whole 16 bytes, this hidden size is 20" in refusal(ops.experts, *odd, activation="swiglu")
    some = [*given[:5], (BF16, 6, 64, 48), None]
    assert "here only 6 of 8 experts compute something" in refusal(ops.experts, *some, activation="swiglu")
    mlp = [(BF16, 9, 64), (torch.int64, 8), *given[3:]]
    assert refusal(grouped.grouped_mlp, *mlp, activation="swiglu") is None
    spare = node(grouped.grouped_mlp, *mlp, activation="swiglu")
    with spare.graph.inserting_before(spare.args[0].next):
        rows = spare.graph.call_function(aten.clone.default, (spare.args[0],))  # as a dispatch's
    rows.meta["val"], rows.kwargs = spare.args[0].meta["val"], {"capacity": 20}
    with spare.graph.inserting_before(spare):
        item = spare.graph.call_function(aten.alias.default, (rows,))
    item.meta["val"], spare.args = rows.meta["val"], (item, *spare.args[1:])
    said = te.BACKEND.kernels[grouped.grouped_mlp].refuses(spare)
    assert said == "GroupedLinear's groups are all of its rows, with dispatch_capacity=20 rows are left over"
    old = te_standin.Extension("old")
    old.get_cublasLt_version = lambda: 130_100
    kernels.extension.cache_clear()
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", old)
    said = refusal(grouped.grouped_mlp, *mlp, activation="swiglu")
    te_standin.forget()
    assert said == "below cuBLASLt 13.4 GroupedLinear is one cuBLAS call an expert, this is 13.1"


@pytest.mark.parametrize("op", te.BACKEND.kernels, ids=str)
def test_kernels_have_their_operations_signature(op):
    check_signature("te", op, te.BACKEND.kernels[op])


def test_the_backend_is_used_by_name_only_and_says_what_is_missing():
    assert te.BACKEND.opt_in and "te" not in [b.name for b in resolve(None)]
    names = list(builtin())
    assert names.index("te") > names.index("triton") and names.index("te") > names.index("torch")
    if kernels.available() is None:
        pytest.skip("Transformer Engine is usable here")
    with pytest.raises(
        moefx.MoefxError, match="backend 'te' cannot be used here: .*(not installed: pip install|no CUDA|there is none)"
    ):
        resolve(["te", "torch"])
    assert any(r["what"] == "backend te" and ("not installed" in r["state"] or "CUDA" in r["state"]) for r in diagnose())


def test_the_auxiliary_loss_is_the_kernels_where_nothing_is_padded(monkeypatch):
    """Loss and gradients of a whole model; with padding, and while verifying, the model's own function."""
    from moefx.distributed import aux_loss
    from tests.support.families import batch, build

    te_standin.install(monkeypatch)
    monkeypatch.setattr(aux_loss, "_served", lambda logits: True)
    asked = []

    def kernel(logits, top_k):
        asked.append(tuple(logits.shape))
        return te.load_balancing_loss(logits, top_k)

    backend = moefx.Backend("mine", {ops.load_balancing_loss: moefx.Kernel(kernel, why="counts its calls")})
    model, given = build("qwen3_moe").train(), batch(2, 9)

    def step(**more):
        model.zero_grad()
        out = model(**given, **more, output_router_logits=True, use_cache=False)
        out.loss.backward()
        return float(out.aux_loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}

    wanted, gradients = step()
    mask = torch.ones_like(given["input_ids"])
    padded, _ = step(attention_mask=mask.scatter(1, torch.zeros(2, 1, dtype=torch.int64), 0))
    moefx.optimize(model, backends=[backend, "torch"], compile=False)
    loss, found = step()
    te_standin.forget()
    experts = model.config.num_experts
    assert asked == [(18 * model.config.num_hidden_layers, experts)] and loss == pytest.approx(wanted, rel=1e-5)
    for name, g in gradients.items():
        torch.testing.assert_close(found[name], g, rtol=1e-3, atol=1e-5, msg=name)
    again, _ = step(attention_mask=mask.scatter(1, torch.zeros(2, 1, dtype=torch.int64), 0))
    assert len(asked) == 1 and again == pytest.approx(padded, rel=1e-5)


# --- the pass fp8 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def standin(monkeypatch):
    te_standin.install(monkeypatch)
    monkeypatch.setattr(kernels, "available", lambda: None)
    yield
    te_standin.forget()


def _parameters(*shapes):
    return [torch.nn.Parameter((torch.randn(s) * s[-1] ** -0.5).to(BF16)) for s in shapes]


def _mlp(a, b, x):
    return F.linear(F.silu(F.linear(x, a)), b)


def test_linear_layers_become_fp8_and_the_report_says_that_numerics_change(standin):
    x, parameters = torch.randn(2, 7, 32).to(BF16), _parameters((48, 32), (32, 48))
    module, f = captured(_mlp, [x], parameters)
    for p in (Canonicalize(), FP8(), Lower()):
        changes = run_pass(p, f, moefx.Plan(resolve(["reference"])))[0]
        if p.name == "fp8":
            assert len(changes.made) == 2 and not changes.missed
            assert all("numerics change: Float8CurrentScaling" in c.what for c in changes.made)
    assert sum(origin(n).kernel == "te" for n in f.graph.nodes if is_call(n)) == 2
    assert not any(is_call(n, aten.linear.default) for n in f.graph.nodes)
    f.graph_module.recompile()
    (found,) = f.graph_module(*parameters, x)
    wanted = module(x)
    assert 1e-3 < (found - wanted).float().norm() / wanted.float().norm() < 0.1
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)  # the parameters are the module's own


def _routed(gate, x):
    logits = F.linear(x, gate)
    weights, index = torch.topk(torch.softmax(logits.float(), dim=-1), 2, dim=-1)
    return weights / weights.sum(-1, keepdim=True), index


@pytest.mark.parametrize("raised", [True, False])
def test_routers_keep_their_precision(standin, raised):
    _, f = captured(_routed, [torch.randn(5, 32).to(BF16)], _parameters((16, 32)))
    for p in (Canonicalize(), *([Route()] if raised else []), FP8()):
        changes = run_pass(p, f, moefx.Plan(resolve(["reference"])))[0]
    assert [c.what for c in changes.missed] == ["these are a router's logits: in FP8 tokens would go to other experts"]
    assert not changes.made and any(is_call(n, aten.linear.default) for n in f.graph.nodes)


@pytest.mark.parametrize(
    ("shape", "dtype", "sentence"),
    [
        ((48, 36), BF16, r"Float8CurrentScaling wants features in multiples of 16, the weight is \(48, 36\)"),
        ((1, 32), BF16, r"wants features in multiples of 16, the weight is \(1, 32\)"),
        ((48, 32), FP32, "wants input and weight in one 16-bit dtype, they are torch.float32 and torch.float32"),
    ],
)
def test_products_that_cannot_are_missed_with_the_reason(standin, shape, dtype, sentence):
    _, f = captured(
        lambda w, x: F.linear(x, w), [torch.randn(5, shape[1]).to(dtype)], [torch.nn.Parameter(torch.randn(shape).to(dtype))]
    )
    run_pass(Canonicalize(), f, None)
    changes = run_pass(FP8(), f, None)[0]
    assert not changes.made and re.search(sentence, changes.missed[0].what), changes.missed


def test_a_recipe_that_does_not_exist_or_cannot_run_is_an_error(standin, monkeypatch):
    with pytest.raises(moefx.MoefxError, match="no fp8 recipe 'mxfp8'; there are: current, block"):
        FP8("mxfp8")
    _, f = captured(_mlp, [torch.randn(2, 32).to(BF16)], _parameters((48, 32), (32, 48)))
    with pytest.raises(
        moefx.MoefxError, match="cannot run: Transformer Engine has no Float8BlockScaling here: FP8 block scaled GEMM requires"
    ):
        run_pass(FP8("block"), f, None)
    monkeypatch.setattr(kernels, "available", lambda: "there is no CUDA device")
    with pytest.raises(moefx.MoefxError, match="the pass fp8 was asked for, and cannot run: there is no CUDA device"):
        run_pass(FP8(), f, None)
    assert set(linear.RECIPES) == {"current", "block"}


def test_a_model_trains_in_fp8_with_its_own_parameters(standin):
    """Through optimize: state dict untouched, a gradient for every parameter, the loss near bf16's; experts and head missed."""
    from tests.support.families import batch, build

    model = build("qwen3_moe").to(BF16)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    given = batch(2, 9)
    wanted = float(model(**given, use_cache=False).loss.detach())
    moefx.optimize(model, pipeline=default().before("lower", FP8()), compile=False, backends=["torch"])
    loss = model(**given, use_cache=False).loss
    loss.backward()
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    report = moefx.report(model)["fp8"]
    assert report.made_count and abs(float(loss.detach()) - wanted) < 0.05 * wanted
    assert any("moefx.experts keeps its precision: the package quack-kernels" in c.what for c in report.missed)
