"""Norm and rotation of heads in one kernel against the operation's own body in float64: the result and all gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import ops
from moefx.backends import triton as backend
from moefx.kernels import heads as heads_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(
    batch, length, heads, size, *, layout="half", dtype=torch.float32, weighted=True, shared=True, strided=False, **options
):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    x = normal(batch, length, heads, 2 * size)[..., :size] if strided else normal(batch, length, heads, size)
    weight = normal(size) if weighted else None
    angle = torch.randn(1 if shared else batch, length, size if layout == "half" else size // 2, generator=g)
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    grad = normal(batch, heads, length, size)

    def run(fn, to, device):
        leaves = [t.to(device, to).requires_grad_() for t in (x, weight) if t is not None]
        out = fn(
            leaves[0], leaves[1] if weighted else None, *(t.to(device, to) for t in tables), 1e-3, layout=layout, **options
        )
        return [out, *torch.autograd.grad(out, leaves, grad.to(device, to))]

    wanted = run(ops.BODIES[ops.norm_rotary], torch.float64, "cpu")
    found = run(backend.norm_rotary, dtype, DEVICE)
    for name, f, w in zip(("out", "x", "weight"), found, wanted, strict=False):
        assert f.dtype == dtype and f.shape == w.shape, name
        size_of = float(w.abs().max()) + 1e-9
        far = float((f.double().cpu() - w).abs().max()) / size_of
        assert far <= (2e-5 if dtype == torch.float32 else 1.5e-2), f"{name}: {far:.1e}"


@pytest.mark.parametrize("layout", backend.ROTARY_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout, dtype):
    check(2, 5, 3, 16, layout=layout, dtype=dtype)


@pytest.mark.parametrize(("batch", "length", "heads", "size"), [(1, 1, 1, 32), (3, 7, 17, 64), (1, 75, 1, 16)])
def test_sizes(batch, length, heads, size, monkeypatch):
    """One token; more heads than a program holds; more tokens than the backward has programs."""
    monkeypatch.setattr(heads_kernel, "PROGRAMS", 32)
    check(batch, length, heads, size)


def test_tables_of_their_own_per_sequence_no_weight_an_offset_and_strides():
    check(2, 4, 2, 16, shared=False)
    check(2, 4, 2, 16, weighted=False)
    check(2, 4, 2, 16, offset=1.0)
    check(2, 4, 2, 16, strided=True)


def test_a_frozen_weight(monkeypatch):
    """Its sums are not computed; the other gradient is the same."""
    g = torch.Generator().manual_seed(0)
    x, weight, angle = (torch.randn(shape, generator=g).to(DEVICE) for shape in ((2, 4, 3, 16), (16,), (2, 4, 16)))

    def gradient(trained):
        leaf = x.clone().requires_grad_()
        out = backend.norm_rotary(leaf, weight.clone().requires_grad_(trained), angle.cos(), angle.sin(), 1e-3, layout="half")
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    wanted = gradient(True)
    monkeypatch.setattr(heads_kernel, "partial_sums", None)
    assert torch.equal(gradient(False), wanted)
