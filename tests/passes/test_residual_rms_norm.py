"""The pass 'residual_rms_norm': a sum and its norm become one operation."""

from __future__ import annotations

import torch
from torch import nn

from moefx import ops
from moefx.ir.graph import aten
from moefx.passes import (
    ResidualRMSNorm,
    RMSNorm,
)
from tests.support.passes import calls, norm, run


def test_residual_rms_norm():
    def block(weight, x, y):
        total = x + y
        return norm(weight, total), total

    f, _changes = run(
        [RMSNorm(), ResidualRMSNorm()],
        block,
        [torch.randn(3, 17, 16), torch.randn(3, 17, 16)],
        [nn.Parameter(torch.randn(16))],
    )
    assert len(calls(f, ops.add_rms_norm)) == 1 and calls(f, ops.rms_norm) == [] and calls(f, aten.add.Tensor) == []
