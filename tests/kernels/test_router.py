"""The router's kernel against the operation's own body in float64: weights, experts and the logits' gradient."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import ops
from moefx.backends import triton as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(tokens, experts, top_k, *, biased=False, dtype=torch.float32, **options):
    g = torch.Generator().manual_seed(tokens + experts)
    logits = (torch.randn(tokens, experts, generator=g) * 2).to(dtype)
    bias = torch.randn(experts, generator=g).to(torch.float32) if biased else None
    options = {"gather": biased, **options}
    exact = logits.double().requires_grad_()
    wanted, chosen = ops.route(exact, None if bias is None else bias.double(), top_k, **options)
    ours = logits.to(DEVICE).requires_grad_()
    found, index = backend.route(ours, None if bias is None else bias.to(DEVICE), top_k, **options)
    fake, _ = ops.route(logits.to(DEVICE), None if bias is None else bias.to(DEVICE), top_k, **options)
    assert found.dtype == fake.dtype and index.dtype == torch.int64
    order, theirs = (torch.sort(i, dim=1) for i in (index.cpu(), chosen))
    assert torch.equal(order.values, theirs.values)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        found.cpu().double().gather(1, order.indices), wanted.double().gather(1, theirs.indices), rtol=tolerance, atol=tolerance
    )
    if options.get("sorted", True) and not biased:
        assert torch.equal(index.cpu(), chosen)
    if tokens:
        by_expert = torch.randn(experts, generator=g)
        (found * by_expert.to(DEVICE)[index]).sum().backward()
        (wanted * by_expert.double()[chosen]).sum().backward()
        size = float(exact.grad.abs().max()) + 1e-12
        assert float((ours.grad.cpu().double() - exact.grad).abs().max()) <= tolerance * size + 1e-6


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topk_first", [False, True])
@pytest.mark.parametrize(("renormalize", "eps", "scale"), [(False, 0.0, 1.0), (True, 0.0, 2.5), (True, 1e-2, 1.0)])
def test_kinds(score, topk_first, renormalize, eps, scale):
    check(9, 12, 3, score=score, topk_first=topk_first, renormalize=renormalize, eps=eps, routed_scaling_factor=scale)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_groups(score, group_score):
    options = {"score": score, "groups": 4, "topk_groups": 2, "group_score": group_score, "sorted": False}
    check(11, 32, 5, **options)
    check(11, 32, 5, zero_fill=True, **options)
    if group_score == "top2":
        check(11, 32, 5, biased=True, renormalize=True, routed_scaling_factor=2.5, eps=1e-20, **options)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 8, 2), (1, 8, 8), (1, 1, 1), (33, 128, 8), (5, 60, 4), (3, 300, 6)]
)
def test_sizes(tokens, experts, top_k):
    check(tokens, experts, top_k, renormalize=True)
    check(tokens, experts, top_k, biased=True, score="sigmoid")


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("fp32", [True, False])
def test_bf16(cast, fp32):
    check(17, 16, 2, dtype=torch.bfloat16, renormalize=True, cast=cast, fp32=fp32)


def test_nan_is_chosen_and_every_expert_exists():
    logits = torch.full((2, 6), float("nan"), device=DEVICE)
    logits[0, :3] = 1.0
    weights, index = backend.route(logits, None, 3, score="sigmoid")
    assert bool(weights.isnan().any()) and int(index.min()) >= 0 and int(index.max()) < 6
