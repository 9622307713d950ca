"""The pass 'swiglu', and what it refuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moefx import ops
from moefx.passes import (
    SwiGLU,
)
from tests.support.passes import calls, run


def test_swiglu_and_its_refusal():
    f, changes = run([SwiGLU()], lambda g, u: F.silu(g) * u, [torch.randn(3, 17), torch.randn(3, 17)])
    assert len(calls(f, ops.swiglu)) == 1 and len(changes.made) == 1
    f, changes = run([SwiGLU()], lambda g, u: F.silu(g) + u, [torch.randn(3, 17), torch.randn(3, 17)])
    assert calls(f, ops.swiglu) == []


def test_a_gate_that_broadcasts_is_no_swiglu():
    f, changes = run([SwiGLU()], lambda gate, up: F.silu(gate) * up, [torch.randn(3, 1), torch.randn(3, 16)], [])
    assert not calls(f, ops.swiglu) and "must be equal" in str(changes.missed[0])
