"""The pass 'rotary': each layout that models write becomes ops.rotary, and what is refused."""

from __future__ import annotations

import pytest
import torch

from moefx import ops
from moefx.passes import (
    Rotary,
)
from tests.support.passes import calls, run


@pytest.mark.parametrize("layout", ops.ROTARY_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary(layout, dtype):
    def rope(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return ops.apply_rotary(q, cos, sin, layout), ops.apply_rotary(k, cos, sin, layout)

    table = torch.randn(3, 19, 16 if layout in ("half", "pairs") else 8)
    given = torch.randn(3, 4, 19, 16), torch.randn(3, 2, 19, 16), table, table + 1
    f, changes = run([Rotary()], rope, [t.to(dtype) for t in given])
    (node,) = calls(f, ops.rotary)
    assert node.kwargs == {"layout": layout, "unsqueeze_dim": 1} and len(changes.made) == 1


def test_rotary_with_tables_that_were_unsqueezed_before():
    """Ernie writes each angle twice after it has made room for the heads."""

    def rope(q, k, cos, sin):
        cos, sin = (t.unsqueeze(1)[..., :8].repeat_interleave(2, dim=-1) for t in (cos, sin))
        return ops.apply_rotary(q, cos, sin, "pairs"), ops.apply_rotary(k, cos, sin, "pairs")

    table = torch.randn(3, 19, 16)
    f, changes = run([Rotary()], rope, [torch.randn(3, 4, 19, 16), torch.randn(3, 2, 19, 16), table, table + 1])
    (node,) = calls(f, ops.rotary)
    assert node.kwargs == {"layout": "pairs", "unsqueeze_dim": 1} or node.kwargs == {"layout": "pairs"}
    assert len(changes.made) == 1


def _by_complex_numbers(dim, flat):
    """As DeepSeek-V2 (heads first) and Llama 4 (heads second, angles sliced for each of both) write it."""

    def rope(q, k, angles):
        table = torch.polar(torch.ones_like(angles), angles)

        def one(x):
            there = table.unsqueeze(1) if dim == 1 else table[:, :, None, :]
            turned = torch.view_as_real(torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * there)
            return (turned.flatten(3) if flat else turned.view(x.shape)).type_as(x)

        return one(q), one(k)

    return rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "flat"), [(1, True), (2, True), (2, False)])
def test_rotary_by_complex_numbers(dim, flat, dtype):
    q, k = (torch.randn(3, *((h, 19) if dim == 1 else (19, h)), 16, dtype=dtype) for h in (4, 2))
    f, changes = run([Rotary()], _by_complex_numbers(dim, flat), [q, k, torch.randn(3, 19, 8)])
    (node,) = calls(f, ops.rotary)
    assert node.kwargs == {"layout": "pairs", "unsqueeze_dim": dim} and len(changes.made) == 1
    assert len(calls(f, ops.rotary_table)) == 2


def test_rotary_refuses_complex_numbers_that_do_not_only_turn():
    def rope(q, k, angles):
        angles = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        return tuple(
            torch.view_as_real(torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * angles * 2.0).flatten(3)
            for x in (q, k)
        )

    f, _changes = run([Rotary()], rope, [torch.randn(3, 4, 19, 16), torch.randn(3, 2, 19, 16), torch.randn(3, 19, 8)])
    assert calls(f, ops.rotary) == []


def test_rotary_refuses_a_query_without_a_key():
    def rope(q, cos, sin):
        return ops.apply_rotary(q, cos.unsqueeze(1), sin.unsqueeze(1), "half")

    f, changes = run([Rotary()], rope, [torch.randn(3, 4, 19, 16), torch.randn(3, 19, 16), torch.randn(3, 19, 16)])
    assert calls(f, ops.rotary) == []
    assert "1 tensors are rotated by" in changes.missed[0].what and "expected a query and its key" in changes.missed[0].what
