"""Experts in FP8: GEMMs against their rounded inputs in float64, experts against unrounded ones, and the pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import moefx
from moefx import ops
from moefx.backends import quack, triton
from moefx.kernels import counting_sort, fp8_grouped, fp8_quantize
from moefx.ops import grouped_mlp as grouped
from moefx.passes import FP8, default
from tests.kernels.test_experts import make, run
from tests.support.families import batch, build

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EXPERTS, GROUPED_MLP = (quack.BACKEND.kernel(op, "fp8").fn for op in (ops.experts, grouped.grouped_mlp))
products = pytest.mark.skipif(
    CUDA and quack.BACKEND.available() is not None, reason=f"no QuACK here: {quack.BACKEND.available()}"
)
BF16 = torch.bfloat16


def numbers(*shape, seed=0):
    """Rows of very different sizes, one of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.logspace(-6, 6, shape[-2]).unsqueeze(1)
    x[..., shape[-2] // 2, :] = 0
    return x.to(BF16)


def distance(found, wanted):
    return float((found.double().cpu() - wanted.double().cpu()).norm() / wanted.double().norm().clamp_min(1e-300))


def same_numbers(q, wanted):
    """Triton's interpreter does not carry where it rounds to e4m3: it makes 1.0 of 1.99."""
    assert q.dtype == wanted.dtype and q.shape == wanted.shape
    assert not CUDA or torch.equal(q.float().cpu(), wanted.float())


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 200), (3, 4100)])
def test_rows_are_rounded_with_a_scale_each(rows, width):
    x = numbers(rows, width)
    wanted, of_rows = fp8_grouped._rounded(x)
    q, scales = fp8_quantize.rows(x.to(DEVICE))
    torch.testing.assert_close(scales.cpu(), of_rows)
    same_numbers(q, wanted)
    assert distance(wanted.float() * of_rows.unsqueeze(1), x) < 2**-4
    assert torch.isfinite(wanted.float()).all() and (float(wanted.float().abs().max()) == 448 or rows == 1)


def test_tokens_are_rounded_once_for_all_their_rows():
    x, index = numbers(6, 48), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0], [1, 2]])
    order, inverse, _ = counting_sort.sort_by_expert(index.to(DEVICE), 3)
    q, scales = fp8_quantize.rows(x.to(DEVICE), inverse, 2)
    wanted, of_rows = fp8_grouped._rounded(x)
    token = order.cpu().long() // 2
    torch.testing.assert_close(scales.cpu(), of_rows[token])
    same_numbers(q, wanted.float()[token].to(wanted.dtype))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 40, 72), (2, 300, 70), (40, 272, 16)], ids=str)
def test_matrices_are_rounded_with_a_scale_a_column(shape, transposed):
    weight = numbers(*shape, seed=1)
    given = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    q, scales = fp8_quantize.matrices(given.to(DEVICE))
    wanted, of_columns = fp8_grouped._rounded(weight.transpose(1, 2))
    torch.testing.assert_close(scales.cpu(), of_columns)
    same_numbers(q, wanted)


@products
@pytest.mark.parametrize("counts", [[1], [3, 0, 5], [0, 0, 130], [200, 1, 0, 7]], ids=str)
@pytest.mark.parametrize(("deep", "columns"), [(64, 48), (16, 528), (528, 160)])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_are_those_of_the_rounded_numbers(counts, deep, columns, transposed):
    """And rows after the last, which may be anything, spoil none."""
    g = torch.Generator().manual_seed(2)
    many, bounds = sum(counts), torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    x, weight = numbers(many, deep, seed=3), torch.randn(len(counts), deep, columns, generator=g).to(BF16)
    given = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    beyond = torch.cat((x, torch.full((3, deep), float("nan"), dtype=BF16)))
    found = fp8_grouped.rows(beyond.to(DEVICE), given.to(DEVICE), bounds.to(DEVICE))[:many]
    (q, of_rows), (w, of_columns) = fp8_grouped._rounded(x), fp8_grouped._rounded(weight.transpose(1, 2))
    left, right = q.double() * of_rows.double().unsqueeze(1), w.double() * of_columns.double().unsqueeze(2)
    wanted = torch.cat([part @ right[e].T for e, part in enumerate(left.split(counts))])
    assert found.dtype == BF16
    for f, w, x_ in zip(found, wanted, x, strict=True):  # each row by itself: their sizes differ by 12 orders
        assert distance(f, w) < 2**-8 if x_.any() else not f.any()


@products
@pytest.mark.parametrize(("tokens", "experts", "top_k", "routing"), [
    (1, 5, 1, "random"), (1, 8, 8, "random"), (33, 3, 2, "skewed"), (50, 17, 4, "random"), (0, 4, 2, "random"),
])  # fmt: skip
@pytest.mark.parametrize("options", [
    {"activation": "swiglu"}, {"activation": "relu2"},
    {"activation": "oai_swiglu", "alpha": 1.7, "limit": 100.0, "transposed": True, "interleaved": True},
], ids=lambda o: o["activation"])  # fmt: skip
def test_experts_and_all_gradients_are_as_far_as_e4m3_rounds(tokens, experts, top_k, routing, options):
    """And farther than bf16 would be, so that it is known that FP8 ran."""
    layout = {"transposed": "transposed" in options, "biased": "transposed" in options}
    given = make(tokens, experts, top_k, 48, 80, activation=options["activation"], dtype=BF16, routing=routing, **layout)
    wanted = run(ops.BODIES[ops.experts], given, torch.float64, options, "cpu")
    found = run(EXPERTS, given, BF16, options, DEVICE)
    far = {name: distance(found[name], w) for name, w in wanted.items() if w.numel()}
    assert found.keys() == wanted.keys() and all(found[name].dtype == BF16 for name in wanted)
    assert all(x < 0.12 for x in far.values()), far
    assert not tokens or far["out"] > 0.015


@products
def test_a_ranks_experts_are_those_of_a_process_and_two_runs_are_bitwise_equal():
    x, index, weights, up, _, down, _ = make(40, 4, 2, 48, 80, dtype=BF16)
    order, _inverse, bounds = counting_sort.sort_by_expert(index.to(DEVICE), 4)
    token, counts = order.cpu().long() // 2, bounds.cpu().diff().long()
    found = []
    for _ in range(2):
        leaves = [t.to(DEVICE, BF16).requires_grad_() for t in (x[token], up, down)]
        permuted_probs = weights.flatten()[order.cpu().long()].to(DEVICE, torch.float32).requires_grad_()
        rows = GROUPED_MLP(
            leaves[0], counts.to(DEVICE), leaves[1], None, leaves[2], None, activation="swiglu", permuted_probs=permuted_probs
        )
        grads = torch.autograd.grad(rows, (*leaves, permuted_probs), torch.ones_like(rows))
        found.append([rows.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    y = torch.zeros(40, 48).index_add_(0, token, found[0][0].float().cpu())
    (one,) = (run(EXPERTS, [x, index, weights, up, None, down, None], BF16, {"activation": "swiglu"}, DEVICE)["out"],)
    assert distance(one, y) < 0.06  # the weight multiplies before the activation is rounded here, after the product there


# --- the pass --------------------------------------------------------------------------------------------------------


@pytest.fixture
def usable(monkeypatch):
    """On a CPU the products are multiplied in float32, and only these two functions would refuse."""
    if not CUDA:
        monkeypatch.setattr(quack, "BACKEND", replace(quack.BACKEND, available=lambda: None))
        monkeypatch.setattr(triton, "refuses_experts", lambda node: None)


@products
def test_a_models_experts_train_in_fp8(usable):
    model = build("qwen3_moe", hidden_size=32, moe_intermediate_size=48).to(DEVICE, BF16)
    given = {k: v.to(DEVICE) for k, v in batch(2, 9).items()}
    wanted = float(model(**given, use_cache=False).loss.detach())
    pipeline = default().before("lower", FP8(linear=False))
    moefx.optimize(model, pipeline=pipeline, compile=False, backends=["torch"])
    loss = model(**given, use_cache=False).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    report = moefx.report(model)
    assert report["fp8"].made_count == model.config.num_hidden_layers
    assert all("moefx.experts -> quack in FP8, numerics change" in c.what for c in report["fp8"].made)
    assert ("experts", "fp8") in report.kernels() and {c.what for c in report["fp8"].missed} == {"not asked for"}
    assert 0 < abs(float(loss.detach()) - wanted) < 0.02 * wanted


@products
def test_what_keeps_experts_from_fp8_is_said(usable):
    model = build("qwen3_moe", hidden_size=32, moe_intermediate_size=40).to(DEVICE, BF16)
    moefx.optimize(model, pipeline=default().before("lower", FP8(linear=False)), compile=False, backends=["torch"])
    missed = {c.what for c in moefx.report(model)["fp8"].missed}
    assert "moefx.experts keeps its precision: QuACK's GEMM wants multiples of 16, down has matrices (32, 40)" in missed
    moefx.restore(model)
    with pytest.raises(moefx.MoefxError, match="cannot run: linear and experts are False"):
        moefx.optimize(model, pipeline=default().before("lower", FP8(linear=False, experts=False)), compile=False)
