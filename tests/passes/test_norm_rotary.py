"""The pass 'norm_rotary': heads that are normalised and rotated become one operation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moefx import ops
from moefx.passes import (
    NormRotary,
    RMSNorm,
    Rotary,
)
from tests.support.passes import calls, norm, run


def heads(weight, x, cos, sin, computed=False, normalise=True):
    """Query and key of two heads each, normalised and rotated as the models write it."""
    scale = weight * 2 if computed else weight
    q, k = (
        (norm(scale, part) if normalise else part * 1.5).transpose(1, 2) for part in x.view(*x.shape[:2], 4, 16).chunk(2, dim=2)
    )
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(t):
        return t * cos + torch.cat((-t[..., 8:], t[..., :8]), dim=-1) * sin

    return turn(q), turn(k)


@pytest.mark.parametrize("computed", [False, True])
def test_norm_rotary(computed):
    angle = torch.randn(3, 17, 16)
    inputs = [torch.randn(3, 17, 64), angle.cos(), angle.sin()]
    f, changes = run(
        [RMSNorm(), Rotary(), NormRotary()],
        lambda *a: heads(*a, computed=computed),
        inputs,
        [nn.Parameter(torch.randn(16))],
    )
    if computed:
        assert len(calls(f, ops.rotary)) == 1 and calls(f, ops.norm_rotary) == []
        assert "is computed" in changes.missed[0].what
    else:
        assert len(calls(f, ops.norm_rotary)) == 2 and calls(f, ops.rotary) == calls(f, ops.rms_norm) == []


@pytest.mark.parametrize("keys_first", [False, True])
def test_norm_rotary_of_heads_that_follow_positions(keys_first):
    """Gemma 4 rotates before it transposes, and reads the query, transposed, before there is a key."""

    def heads(weight, x, cos, sin):
        parts = x.view(*x.shape[:2], 4, 16).chunk(2, dim=2)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)

        def turn(t):
            t = norm(weight, t)
            return (t * cos + torch.cat((-t[..., 8:], t[..., :8]), dim=-1) * sin).transpose(1, 2)

        first, second = (turn(part) for part in (reversed(parts) if keys_first else parts))
        return first @ second.transpose(2, 3), first, second

    angle = torch.randn(3, 17, 16)
    inputs = [torch.randn(3, 17, 64), angle.cos(), angle.sin()]
    f, changes = run([RMSNorm(), Rotary(), NormRotary()], heads, inputs, [nn.Parameter(torch.randn(16))])
    assert len(calls(f, ops.norm_rotary)) == 2 and calls(f, ops.rotary) == calls(f, ops.rms_norm) == []
    assert changes.missed == []


def test_norm_rotary_leaves_rotations_of_other_things_alone():
    angle = torch.randn(3, 17, 16)
    inputs = [torch.randn(3, 17, 64), angle.cos(), angle.sin()]
    f, changes = run([RMSNorm(), Rotary(), NormRotary()], lambda *a: heads(None, *a, normalise=None), inputs)
    assert len(calls(f, ops.rotary)) == 1 and changes.made == [] and changes.missed == []
