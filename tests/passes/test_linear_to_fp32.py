"""GEMMs with bfloat16 inputs and float32 results: the pass, and its kernel (on the CPU around a GEMM with such a result)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moefx
from moefx import ops
from moefx.integrations import transformers as hf
from moefx.kernels import linear_to_fp32 as kernel
from tests.support.families import batch, build
from tests.support.passes import calls, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def products(monkeypatch):
    if DEVICE == "cpu":  # torch.mm has no out_dtype there
        monkeypatch.setattr(kernel, "_mm", lambda a, b: a.float() @ b.float())


def inputs(shape, experts, hidden, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(*shape, hidden, generator=g), torch.randn(experts, hidden, generator=g)
    grad = torch.randn(*shape, experts, generator=g).to(DEVICE)
    return [t.to(DEVICE, d).requires_grad_() for t, d in ((x, torch.bfloat16), (weight, dtype))], grad


#: What a result of the dtype may be off, of its largest number: bfloat16 is rounded once, float32 summed in another order.
OFF = {torch.bfloat16: 2**-8, torch.float32: 2e-6}


@pytest.mark.parametrize(("shape", "experts", "hidden"), [((1,), 8, 16), ((2, 13), 6, 24), ((700,), 128, 64), ((0,), 8, 16)])
@pytest.mark.parametrize("dtype", OFF, ids=str)
def test_kernel(products, shape, experts, hidden, dtype):
    """Against float64; as near as the float32 product that it replaces."""
    (x, weight), grad = inputs(shape, experts, hidden, dtype)
    out = kernel.linear_to_fp32(x, weight)
    found = [out, *torch.autograd.grad(out, (x, weight), grad)]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = [F.linear(*exact)]
    wanted += torch.autograd.grad(wanted[0], exact, grad.double())
    for f, w, kind in zip(
        [t.detach() for t in found], [t.detach() for t in wanted], (torch.float32, torch.bfloat16, dtype), strict=True
    ):
        assert f.dtype == kind and f.shape == w.shape
        far, size = (float(t.abs().max()) if t.numel() else 0.0 for t in (f.double() - w, w))
        assert far <= OFF[kind] * size + 1e-12


@pytest.mark.parametrize("many", [1, 2, 3])
def test_parts(many):
    t = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-20, 20, 1000)
    found = kernel.parts(t, many)
    gap = (sum(p.double() for p in found) - t.double()).abs()
    assert len(found) == many and bool((gap <= 2.0 ** (-8 * many) * t.double().abs()).all())


@pytest.mark.parametrize("alone", [0, 1])
@pytest.mark.parametrize("dtype", OFF, ids=str)
def test_a_gradient_that_is_asked_for_alone(products, alone, dtype):
    given, grad = inputs((9,), 8, 16, dtype)
    wanted = torch.autograd.grad(kernel.linear_to_fp32(*given), given, grad)[alone]
    given[1 - alone].requires_grad_(False)
    kernel.linear_to_fp32(*given).backward(grad)
    assert torch.equal(given[alone].grad, wanted) and given[1 - alone].grad is None


@pytest.mark.parametrize("dtype", OFF, ids=str)
def test_compiled(products, dtype):
    given, grad = inputs((9,), 8, 16, dtype)
    results = []
    for function in (kernel.linear_to_fp32, torch.compile(kernel.linear_to_fp32, fullgraph=True, backend="aot_eager")):
        out = function(*given)
        results.append([out, *torch.autograd.grad(out, given, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_fakes_are_the_operations_shapes_and_dtypes(products):
    (x, weight), _ = inputs((9,), 8, 16, torch.bfloat16)
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    cut = weight.detach().clone()
    torch.library.opcheck(torch.ops.moefx.linear_to_fp32_in_parts.default, (x, weight, cut), test_utils=checks)
    torch.library.opcheck(torch.ops.moefx.product_to_fp32.default, (x.detach(), cut.t()), test_utils=checks[:2])


@pytest.mark.parametrize("dtype", OFF, ids=str)
def test_pass(dtype):
    def route(weight, x):
        return F.linear(x.float(), weight.float())

    weight = nn.Parameter(torch.randn(8, 16).to(dtype))
    f, changes = run([moefx.passes.LinearToFP32()], route, [torch.randn(17, 16).bfloat16()], [weight])
    assert len(calls(f, ops.linear_to_fp32)) == 1 and len(changes.made) == 1 and changes.missed == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pass_leaves_other_products_alone(dtype):
    """float32 has nothing to gain; float16's gradients may be too small for two halves."""

    def route(weight, bias, x):
        return F.linear(x.float(), weight.float()), F.linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float())

    parameters = [nn.Parameter(torch.randn(*shape).to(dtype)) for shape in ((8, 16), (8,))]
    f, changes = run([moefx.passes.LinearToFP32()], route, [torch.randn(17, 16).to(dtype)], parameters)
    assert calls(f, ops.linear_to_fp32) == [] and changes.made == [] and changes.missed == []


@pytest.mark.parametrize("name", ["deepseek_v3", "nemotron_h"])
def test_families(name):
    with hf.without_packages():  # Mamba's kernels take tensors on a GPU only
        model = moefx.optimize(build(name).bfloat16(), compile=False, strict=True)
        made = [op for op, _ in moefx.report(model).kernels() if op == "linear_to_fp32"]
        assert made and moefx.verify(model, batch(2, 7, 1), tolerance=0.12).ok
