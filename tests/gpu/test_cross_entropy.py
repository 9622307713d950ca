"""The Triton cross entropy against torch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from moefx.chunked import linear_cross_entropy


def wanted(logits, at, share):
    """Losses and gradients in fp64."""
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, at, reduction="none")
    (losses * share.double()).sum().backward()
    return losses.detach(), x.grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows, columns", ((1, 1), (3, 7), (5, 8192), (4, 8193), (2, 151_936), (700, 999), (0, 5)))
def test_losses_and_gradient(rows, columns, dtype):
    from moefx.kernels.cross_entropy import cross_entropy_

    torch.manual_seed(columns)
    logits = (torch.randn(rows, columns, device="cuda") * 8).to(dtype)
    at = torch.randint(columns, (rows,), device="cuda")
    share = torch.rand(rows, device="cuda") * (torch.arange(rows, device="cuda") % 3 != 1)  # some rows count nothing
    losses, gradient = wanted(logits, at, share)
    found = cross_entropy_(logits, at, share)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=2**-8 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("value", (float("-inf"), 1e4, -1e4))
def test_extreme_logits(value):
    from moefx.kernels.cross_entropy import cross_entropy_

    logits = torch.randn(4, 9000, device="cuda")
    logits[:, 3:8500] = value
    at, share = torch.tensor([0, 1, 8999, 2], device="cuda"), torch.ones(4, device="cuda")
    losses, gradient = wanted(logits, at, share)
    found = cross_entropy_(logits, at, share)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_not_a_number_is_not_hidden():
    from moefx.kernels.cross_entropy import cross_entropy_

    logits = torch.randn(2, 100, device="cuda")
    logits[1, 50] = float("nan")
    found = cross_entropy_(logits, torch.zeros(2, dtype=torch.int64, device="cuda"), torch.ones(2, device="cuda"))
    assert found.isnan().tolist() == [False, True]
    assert logits.isnan().any(dim=1).tolist() == [False, True]


def test_rows_twice_are_bitwise_equal():
    from moefx.kernels.cross_entropy import cross_entropy_

    logits = torch.randn(64, 50_000, device="cuda", dtype=torch.bfloat16)
    at, share = torch.randint(50_000, (64,), device="cuda"), torch.ones(64, device="cuda")
    first, second = logits.clone(), logits.clone()
    assert torch.equal(cross_entropy_(first, at, share), cross_entropy_(second, at, share))
    assert torch.equal(first, second)


def test_strided_rows_are_refused():
    from moefx.kernels.cross_entropy import cross_entropy_

    with pytest.raises(ValueError, match="stride 4 along a row"):
        cross_entropy_(torch.randn(8, 4, device="cuda").T, torch.zeros(4, dtype=torch.int64, device="cuda"), torch.ones(4))


@pytest.mark.parametrize("tokens", (0, 1, 37, 600))
@pytest.mark.parametrize("biased", (False, True))
def test_linear_cross_entropy(monkeypatch, tokens, biased):
    """Chunks that do not divide the tokens; labels that do not count; loss and all gradients in bf16 against fp64."""
    monkeypatch.setattr("moefx.chunked.CHUNK", 1000 * 128)
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(1000, device="cuda", dtype=torch.bfloat16, requires_grad=True) if biased else None
    labels = torch.randint(1000, (tokens,), device="cuda")
    labels[::3] = -100
    given = [t for t in (hidden, weight, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in given]
    loss = linear_cross_entropy(hidden, weight, bias, labels, reduction="sum")
    right = F.cross_entropy(F.linear(*exact), labels, reduction="sum")
    torch.testing.assert_close(loss.double(), right, rtol=1e-2, atol=1e-3)
    (loss / 3).backward()
    (right / 3).backward()
    for t, e in zip(given, exact, strict=True):
        assert (t.grad.double() - e.grad).norm() <= 2e-2 * e.grad.norm()
