"""Joining a sink to a softmax against the softmax with the sink in it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from moefx.kernels import sinks as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("batch", "length", "heads", "size"), [(1, 1, 1, 8), (2, 70, 3, 24), (1, 130, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_join(batch, length, heads, size, dtype):
    g = torch.Generator().manual_seed(length)
    scores, values = torch.randn(batch, heads, length, 9, generator=g) * 20, torch.randn(batch, heads, 9, size, generator=g)
    sinks = (torch.randn(heads, generator=g) * 20).to(dtype)
    lse = scores.logsumexp(-1)
    out = (scores.softmax(-1) @ values).transpose(1, 2).to(dtype)
    whole = torch.cat([scores, sinks.float()[None, :, None, None].expand(batch, -1, length, 1)], -1).double()
    wanted = (whole.softmax(-1)[..., :-1] @ values.double()).transpose(1, 2)
    if dtype == torch.bfloat16:  # what was rounded before does not count
        wanted = out.double() * (1 - whole.softmax(-1)[..., -1]).transpose(1, 2).unsqueeze(-1)
    found, total = out.to(DEVICE, copy=True).contiguous(), lse.to(DEVICE, copy=True)
    kernels.join_(found, total, sinks.to(DEVICE))
    assert float((total.cpu() - whole.logsumexp(-1)).abs().max()) <= 1e-4
    assert (
        float((found.cpu() - wanted).abs().max())
        <= {torch.float32: 2e-5, torch.bfloat16: 2**-7 * float(wanted.abs().max())}[dtype]
    )


@pytest.mark.parametrize(("batch", "length", "heads", "size"), [(1, 1, 1, 8), (2, 70, 3, 24), (3, 1030, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient(batch, length, heads, size, dtype):
    g = torch.Generator().manual_seed(length)
    grad, out = (torch.randn(batch, length, heads, size, generator=g).to(dtype) for _ in range(2))
    sinks = (torch.randn(heads, generator=g) * 3).to(dtype)
    lse = torch.logaddexp(torch.randn(batch, heads, length, generator=g) * 3, sinks.float()[:, None])
    dots = (grad.double() * out.double()).sum(-1).transpose(1, 2)
    wanted = -((sinks.double()[:, None] - lse.double()).exp() * dots).sum((0, 2))
    delta = kernels.delta(grad.to(DEVICE), out.to(DEVICE))
    assert float((delta.cpu() - dots).abs().max()) <= 1e-4
    found = kernels.gradient(sinks.to(DEVICE), lse.to(DEVICE), delta)
    far = {torch.float32: 1e-4, torch.bfloat16: 2**-8 * float(wanted.abs().max())}[dtype]
    assert found.dtype == dtype and float((found.cpu() - wanted).abs().max()) <= far
