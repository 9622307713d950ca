"""The pass 'lower' keeps which backend was chosen, and why others were not."""

from __future__ import annotations

import torch
from torch import nn

import moefx
from moefx import ops
from moefx.passes import (
    Canonicalize,
    Lower,
    RMSNorm,
)
from moefx.rewriting.pipeline import run_pass
from tests.support.passes import captured, norm


def test_lower_keeps_the_choice_and_the_refusals():
    _module, f = captured(norm, [torch.randn(3, 17, 16)], [nn.Parameter(torch.randn(16))])
    never = moefx.Backend(
        "never", {ops.rms_norm: moefx.Kernel(lambda x, weight, eps, *, cast_first, offset: x, lambda n: "16 is too small")}
    )
    plan = moefx.Plan(moefx.resolve([never, "reference"]))
    for p in (Canonicalize(), RMSNorm(), Lower()):
        changes = run_pass(p, f, plan)[0]
    assert "never refused: 16 is too small" in changes.made[0].what
