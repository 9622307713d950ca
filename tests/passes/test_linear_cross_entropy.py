"""The pass 'linear_cross_entropy': head and loss become one operation, also of scaled and capped logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moefx import ops
from moefx.passes import (
    LinearCrossEntropy,
)
from tests.support.passes import calls, run


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(reduction):
    def head(weight, hidden, labels):
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits.view(-1, 32), labels.view(-1), ignore_index=-100, reduction=reduction)

    labels = torch.randint(0, 32, (3, 17))
    labels[0, :5] = -100
    f, changes = run([LinearCrossEntropy()], head, [torch.randn(3, 17, 16), labels], [nn.Parameter(torch.randn(32, 16))])
    (node,) = calls(f, ops.linear_cross_entropy)
    assert node.kwargs.get("reduction", "mean") == reduction and len(changes.made) == 1


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (lambda x: x * 0.3, {"scale": 0.3}), (lambda x: x / 6.0, {"scale": 1 / 6.0}), (lambda x: x, {}),
        (lambda x: (x / 30.0).tanh() * 30.0, {"softcap": 30.0}), (lambda x: (x.float() / 30.0).tanh() * 30.0, {"softcap": 30.0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_of_scaled_and_capped_logits(form, options, dtype):
    def head(weight, hidden, labels):
        return F.cross_entropy(form(F.linear(hidden, weight)).float().view(-1, 32), labels.view(-1))

    given = [torch.randn(3, 17, 16, dtype=dtype), torch.randint(0, 32, (3, 17))]
    close = dict(rtol=2**-6, atol=0.05) if dtype == torch.bfloat16 else {}
    f, _changes = run([LinearCrossEntropy()], head, given, [nn.Parameter(torch.randn(32, 16, dtype=dtype))], **close)
    (node,) = calls(f, ops.linear_cross_entropy)
    assert node.kwargs == options


def test_linear_cross_entropy_refuses_a_cap_that_is_not_undone():
    def head(weight, hidden, labels):
        return F.cross_entropy((F.linear(hidden, weight) / 30.0).tanh().mul(20.0).view(-1, 32), labels.view(-1))

    f, changes = run(
        [LinearCrossEntropy()],
        head,
        [torch.randn(3, 17, 16), torch.randint(0, 32, (3, 17))],
        [nn.Parameter(torch.randn(32, 16))],
    )
    assert calls(f, ops.linear_cross_entropy) == [] and changes.made == []


def test_linear_cross_entropy_refuses_smoothing():
    def head(weight, hidden, labels):
        return F.cross_entropy(F.linear(hidden, weight).view(-1, 32), labels.view(-1), label_smoothing=0.1)

    f, changes = run(
        [LinearCrossEntropy()],
        head,
        [torch.randn(3, 17, 16), torch.randint(0, 32, (3, 17))],
        [nn.Parameter(torch.randn(32, 16))],
    )
    assert calls(f, ops.linear_cross_entropy) == [] and changes.made == []
    assert "expected label_smoothing=0.0, found the constant 0.1 at loss" in changes.missed[0].what
