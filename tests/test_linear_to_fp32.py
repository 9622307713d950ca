"""Products of bfloat16 numbers in float32: the pass, and its kernel (on the CPU with a product that gives float32 there)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moefx
from moefx import ops
from moefx.kernels import linear_to_fp32 as kernel

from .families import batch, build
from .test_passes import calls, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def products(monkeypatch):
    if DEVICE == "cpu":  # torch.mm has no out_dtype there
        monkeypatch.setattr(kernel, "_product", lambda a, b: a.float() @ b.float())


def inputs(shape, experts, hidden, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(*shape, hidden, generator=g), torch.randn(experts, hidden, generator=g)
    grad = torch.randn(*shape, experts, generator=g).to(DEVICE)
    return [t.bfloat16().to(DEVICE).requires_grad_() for t in (x, weight)], grad


@pytest.mark.parametrize("shape,experts,hidden", [((1,), 8, 16), ((2, 13), 6, 24), ((700,), 128, 64), ((0,), 8, 16)])
def test_kernel(products, shape, experts, hidden):
    (x, weight), grad = inputs(shape, experts, hidden)
    out = kernel.linear_to_fp32(x, weight)
    wanted = F.linear(x.detach().double(), weight.detach().double())
    assert out.dtype == torch.float32 and out.shape == wanted.shape
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5 * hidden**0.5)
    found = torch.autograd.grad(out, (x, weight), grad)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    for f, w in zip(found, torch.autograd.grad(F.linear(*exact), exact, grad.double()), strict=True):
        assert f.dtype == torch.bfloat16  # rounded once
        far = float((f.double() - w).abs().max()) if w.numel() else 0.0
        assert far <= 2**-8 * (float(w.abs().max()) if w.numel() else 0.0) + 1e-12


@pytest.mark.parametrize("alone", [0, 1])
def test_a_gradient_that_is_asked_for_alone(products, alone):
    given, grad = inputs((9,), 8, 16)
    wanted = torch.autograd.grad(kernel.linear_to_fp32(*given), given, grad)[alone]
    given[1 - alone].requires_grad_(False)
    kernel.linear_to_fp32(*given).backward(grad)
    assert torch.equal(given[alone].grad, wanted) and given[1 - alone].grad is None


def test_fakes_are_the_operations_shapes_and_dtypes(products):
    given, _ = inputs((9,), 8, 16)
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(torch.ops.moefx.linear_to_fp32_bf16.default, given, test_utils=checks)


def test_pass():
    def route(weight, x):
        return F.linear(x.float(), weight.float())

    f, changes = run([moefx.passes.LinearToFP32()], route, [torch.randn(17, 16).bfloat16()], [nn.Parameter(torch.randn(8, 16).bfloat16())])
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
    pipeline = moefx.passes.default().before("lower", moefx.passes.LinearToFP32())
    model = moefx.optimize(build(name).bfloat16(), pipeline=pipeline, compile=False, strict=True)
    made = [op for op, _ in moefx.report(model).kernels() if op == "linear_to_fp32"]
    assert made and moefx.verify(model, batch(2, 7, 1), tolerance=0.12).ok
