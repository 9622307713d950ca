"""The pass 'rms_norm': each norm that models write becomes ops.rms_norm, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moefx import ops
from moefx.passes import (
    RMSNorm,
)
from tests.support.passes import calls, norm, run


def norm_after(weight, x):
    h = x.to(torch.float32)
    return (weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


def norm_zero_centred(weight, x):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + weight.float())).type_as(x)


def norm_nemotron(weight, x):
    h = x.to(torch.float32)
    return (weight.to(torch.float32) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


def norm_gemma4(weight, x):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5) * weight.float()).type_as(x)


def norm_gemma4_weightless(x):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5)).type_as(x)


def norm_inkling2_weightless(x):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "options"),
    [(norm, {}), (norm_after, {"cast_first": False}), (norm_zero_centred, {"offset": 1.0}), (norm_nemotron, {"cast_first": False}),
     (norm_gemma4, {"cast_first": False}), (norm_gemma4_weightless, {}), (norm_inkling2_weightless, {})],
)  # fmt: skip
def test_rms_norm(dtype, function, options):
    weights = [] if "weightless" in function.__name__ else [nn.Parameter(torch.randn(16).to(dtype))]
    f, changes = run([RMSNorm()], function, [torch.randn(3, 17, 16).to(dtype)], weights)
    (node,) = calls(f, ops.rms_norm)
    assert node.args[2] == 1e-5 and len(changes.made) == 1 and changes.missed == []
    # in fp32 casts do nothing: which of two forms it was cannot be told, nor does it matter
    assert node.kwargs == options or (dtype == torch.float32 and "offset" not in options)


def test_rms_norm_refuses_a_sum_for_the_mean():
    def wrong(weight, x):
        return weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5))

    f, changes = run([RMSNorm()], wrong, [torch.randn(3, 17, 16)], [nn.Parameter(torch.randn(16))])
    assert calls(f, ops.rms_norm) == []
    assert any("expected aten.mean.dim, found sum_1 = aten.sum.dim_IntList" in c.what for c in changes.missed), changes.missed


def test_rms_norm_refuses_another_power():
    def wrong(weight, x):
        return weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5))

    f, changes = run([RMSNorm()], wrong, [torch.randn(3, 17, 16)], [nn.Parameter(torch.randn(16))])
    assert calls(f, ops.rms_norm) == [] and any("expected exponent=2, found the constant 4" in c.what for c in changes.missed)


@pytest.mark.parametrize("weight", [(), (1,), (1, 1)])
def test_a_factor_that_broadcasts_is_no_weight(weight):
    """Kernels read a weight [H]: a factor of any other shape stays a product after a norm without weight."""
    factor = nn.Parameter(torch.randn(weight))
    f, changes = run([RMSNorm()], norm, [torch.randn(3, 17, 16)], [factor])
    (node,) = calls(f, ops.rms_norm)
    assert node.args[1] is None and len(changes.made) == 1
