"""Attention with a short window against the operation's own body in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import ops  # noqa: E402
from moefx.kernels import window_attention as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Triton's interpreter multiplies matrices in float16 and float32; on a GPU these kernels run in 16 bits.
DTYPES = {"cpu": [torch.float32, torch.float16], "cuda": [torch.bfloat16, torch.float16]}[DEVICE]
FAR = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(batch, heads, shared, length, size, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, length, heads, size), (batch, length, shared, size), (batch, length, shared, size), (heads,)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def found(q, k, v, sinks, grad, scale, window):
    out, lse = kernels.forward(q, k, v, sinks, scale, window)
    return [out, lse, *kernels.backward(grad, q, k, v, out, lse, scale, window)]


def exact(q, k, v, sinks, grad, scale, window):
    given = [t.double().requires_grad_() for t in (q, k, v)]
    by_head = [t.transpose(1, 2) for t in given]
    to_sinks = None if sinks is None else sinks.double()
    out = ops.BODIES[ops.attention](*by_head, None, to_sinks, scale=scale, is_causal=True, window=window)
    repeats = q.shape[2] // k.shape[2]
    scores = by_head[0] @ by_head[1].repeat_interleave(repeats, 1).transpose(2, 3) * scale
    distance = torch.arange(q.shape[1], device=DEVICE)[:, None] - torch.arange(q.shape[1], device=DEVICE)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return [out, scores.logsumexp(-1), *torch.autograd.grad((out * grad.double()).sum(), given)]


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "plain"])
@pytest.mark.parametrize("batch,heads,shared,length,size,window", [
    (1, 1, 1, 1, 8, 1), (2, 4, 2, 67, 64, 16), (1, 8, 1, 130, 16, 128), (1, 3, 3, 200, 40, 65), (2, 2, 1, 129, 128, 1),
    (1, 2, 2, 70, 64, 1000),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(batch, heads, shared, length, size, window, sinks, dtype):
    q, k, v, sink = inputs(batch, heads, shared, length, size, dtype)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    given = (q, k, v, sink if sinks else None, grad, size**-0.5, window)
    for name, f, w in zip(("out", "lse", "q", "k", "v"), found(*given), map(Tensor.detach, exact(*given)), strict=True):
        assert f.shape == w.shape, name
        distance = float((f.double() - w).abs().max()) / max(float(w.abs().max()), 1.0)  # one key alone: q and k get zeros
        assert distance <= FAR[dtype], f"{name}: {distance:.1e}"


def test_large_scores_and_sinks_neither_overflow_nor_vanish():
    q, k, v, sinks = inputs(1, 2, 1, 40, 16, DTYPES[0])
    grad = torch.ones_like(q)
    for sink in (sinks + 300, sinks - 300):
        given = (q * 30, k * 30, v, sink.to(q.dtype), grad, 0.25, 8)
        for i, (f, w) in enumerate(zip(found(*given), map(Tensor.detach, exact(*given)), strict=True)):
            assert bool(f.isfinite().all())
            largest = max(1.0, float(w.abs().max())) * (90 if i in (2, 3) else 1)  # what a rounding of out is multiplied by
            assert float((f.double() - w).abs().max()) <= 2e-2 * largest


def test_two_runs_are_bitwise_equal():
    q, k, v, sinks = inputs(2, 4, 2, 150, 32, DTYPES[0])
    first, second = (found(q, k, v, sinks, q, 0.2, 50) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens():
    q, k, v, sinks = inputs(2, 4, 2, 0, 32, DTYPES[0])
    assert [t.numel() for t in found(q, k, v, sinks, q, 0.2, 50)] == [0] * 5
