"""The Triton cross entropy against torch in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import ops
from moefx.kernels.cross_entropy import cross_entropy_
from moefx.kernels.linear_cross_entropy import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = 2**-8 if DEVICE == "cuda" else 2**-7  # Triton's interpreter truncates where a GPU rounds
FORMS = {"plain": {}, "scaled": {"scale": -0.3}, "capped": {"softcap": 7.5}, "both": {"scale": 1.7, "softcap": 5.0}}


def transformed(x, scale=1.0, softcap=0.0):
    x = x * scale
    return torch.tanh(x / softcap) * softcap if softcap else x


def wanted(logits, at, share, **form):
    """Losses and gradients in fp64."""
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(transformed(x, **form), at, reduction="none")
    (losses * share.double()).sum().backward()
    return losses.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 8192), (4, 8193), (2, 151_936), (70, 999), (0, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradient(rows, columns, dtype, form):
    torch.manual_seed(columns)
    logits = (torch.randn(rows, columns, device=DEVICE) * 8).to(dtype)
    at = torch.randint(columns, (rows,), device=DEVICE)
    share = torch.rand(rows, device=DEVICE) * (torch.arange(rows, device=DEVICE) % 3 != 1)  # some rows count nothing
    losses, gradient = wanted(logits, at, share, **FORMS[form])
    found = cross_entropy_(logits, at, share, **FORMS[form])
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=BF16 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("-inf"), 1e4, -1e4])
@pytest.mark.parametrize("form", [{}, {"softcap": 30.0}])
def test_extreme_logits(value, form):
    logits = torch.randn(4, 9000, device=DEVICE)
    logits[:, 3:8500] = value
    at, share = torch.tensor([0, 1, 8999, 2], device=DEVICE), torch.ones(4, device=DEVICE)
    losses, gradient = wanted(logits, at, share, **form)
    found = cross_entropy_(logits, at, share, **form)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_not_a_number_is_not_hidden():
    logits = torch.randn(2, 100, device=DEVICE)
    logits[1, 50] = float("nan")
    found = cross_entropy_(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.ones(2, device=DEVICE))
    assert found.isnan().tolist() == [False, True]
    assert logits.isnan().any(dim=1).tolist() == [False, True]


def test_rows_twice_are_bitwise_equal():
    logits = torch.randn(8, 50_000, device=DEVICE, dtype=torch.bfloat16)
    at, share = torch.randint(50_000, (8,), device=DEVICE), torch.ones(8, device=DEVICE)
    first, second = logits.clone(), logits.clone()
    assert torch.equal(cross_entropy_(first, at, share), cross_entropy_(second, at, share))
    assert torch.equal(first, second)


def test_strided_rows_are_refused():
    with pytest.raises(ValueError, match="stride 4 along a row"):
        cross_entropy_(torch.randn(8, 4, device=DEVICE).T, torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.ones(4))


@pytest.mark.parametrize("tokens", [0, 1, 37, 600])
@pytest.mark.parametrize(("biased", "form"), [(False, "plain"), (True, "plain"), (True, "scaled"), (False, "both")])
def test_linear_cross_entropy(monkeypatch, tokens, biased, form):
    """Chunks that do not divide the tokens; labels that do not count; loss and all gradients in bf16 against fp64."""
    monkeypatch.setattr("moefx.kernels.linear_cross_entropy.CHUNK", 1000 * 128)
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(1000, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) if biased else None
    labels = torch.randint(1000, (tokens,), device=DEVICE)
    labels[::3] = -100
    given = [t for t in (hidden, weight, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in given]
    loss = linear_cross_entropy(hidden, weight, bias, labels, reduction="sum", **FORMS[form])
    right = F.cross_entropy(transformed(F.linear(*exact), **FORMS[form]), labels, reduction="sum")
    body = ops.linear_cross_entropy(hidden, weight, bias, labels, reduction="sum", **FORMS[form])
    torch.testing.assert_close(body.double(), right, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(loss.double(), right, rtol=1e-2, atol=1e-3)
    (loss / 3).backward()
    (right / 3).backward()
    for t, e in zip(given, exact, strict=True):
        assert (t.grad.double() - e.grad).norm() <= 2e-2 * e.grad.norm()
