"""Attention with a short window, or in packed sequences, against the operation's own body in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import ops
from moefx.kernels import window_attention as kernels

pytestmark = pytest.mark.usefixtures("cached_captures")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Triton's interpreter multiplies matrices in float16 and float32; on a GPU these kernels run in 16 bits.
DTYPES = {"cpu": [torch.float32, torch.float16], "cuda": [torch.bfloat16, torch.float16]}[DEVICE]
FAR = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(batch, heads, shared, length, size, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, length, heads, size), (batch, length, shared, size), (batch, length, shared, size), (heads,)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def found(q, k, v, sinks, grad, scale, window, starts=None):
    out, lse = kernels.forward(q, k, v, sinks, scale, window, starts)
    return [out, lse, *kernels.backward(grad, q, k, v, out, lse, scale, window, starts)]


def exact(q, k, v, sinks, grad, scale, window, starts=None):
    given = [t.double().requires_grad_() for t in (q, k, v)]
    by_head = [t.transpose(1, 2) for t in given]
    to_sinks = None if sinks is None else sinks.double()
    out = ops.BODIES[ops.attention](*by_head, starts, to_sinks, scale=scale, is_causal=True, window=window)
    repeats = q.shape[2] // k.shape[2]
    scores = by_head[0] @ by_head[1].repeat_interleave(repeats, 1).transpose(2, 3) * scale
    scores = scores.masked_fill(~ops.visible(q.shape[1], q.shape[1], window, starts, DEVICE), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    delta = (out * grad.double()).sum(-1).transpose(1, 2)
    return [out, scores.logsumexp(-1), *torch.autograd.grad(delta.sum(), given), delta]


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "plain"])
@pytest.mark.parametrize(("batch", "heads", "shared", "length", "size", "window"), [
    (1, 1, 1, 1, 8, 1), (2, 4, 2, 67, 64, 16), (1, 8, 1, 130, 16, 128), (1, 3, 3, 200, 40, 65), (2, 2, 1, 129, 128, 1),
    (1, 2, 2, 70, 64, 1000),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(batch, heads, shared, length, size, window, sinks, dtype):
    q, k, v, sink = inputs(batch, heads, shared, length, size, dtype)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    given = (q, k, v, sink if sinks else None, grad, size**-0.5, window)
    for name, f, w in zip(
        ("out", "lse", "q", "k", "v", "delta"), found(*given), map(Tensor.detach, exact(*given)), strict=True
    ):
        assert f.shape == w.shape, name
        distance = float((f.double() - w).abs().max()) / max(float(w.abs().max()), 1.0)  # one key alone: q and k get zeros
        assert distance <= FAR[dtype], f"{name}: {distance:.1e}"


def beginnings(*rows):
    """Where each position's sequence begins, for rows of sequences of these lengths."""
    of_rows = [[start for n, start in zip(row, torch.tensor([0, *row]).cumsum(0).tolist()) for _ in range(n)] for row in rows]
    return torch.tensor(of_rows, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    "rows", [[[1]], [[7, 1, 60, 62], [130]], [[1] * 70], [[33, 64, 103], [64, 64, 72]], [[130, 70], [199, 1]]], ids=str
)
@pytest.mark.parametrize(
    ("heads", "shared", "size", "window", "sinks"), [(4, 2, 64, 1000, False), (2, 1, 24, 20, True), (2, 2, 128, 64, False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(rows, heads, shared, size, window, sinks, dtype):
    length = sum(rows[0])
    q, k, v, sink = inputs(len(rows), heads, shared, length, size, dtype, seed=2)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    given = (q, k, v, sink if sinks else None, grad, size**-0.5, window, beginnings(*rows))
    for name, f, w in zip(
        ("out", "lse", "q", "k", "v", "delta"), found(*given), map(Tensor.detach, exact(*given)), strict=True
    ):
        distance = float((f.double() - w).abs().max()) / max(float(w.abs().max()), 1.0)
        assert f.shape == w.shape and distance <= FAR[dtype], f"{name}: {distance:.1e}"


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
    assert [t.numel() for t in found(q, k, v, sinks, q, 0.2, 50)] == [0] * 6
