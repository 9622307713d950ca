"""The pass 'canonicalize' drops what does nothing."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from moefx.ir.graph import aten
from tests.support.passes import calls, run


def test_canonicalize_drops_whole_slices_only():
    f, _ = run([], lambda x: (x[:, :, None, :] + 1, x[:, 1:] + 1, x[:, :, :4] + 1, x[:, ::2] + 1), [torch.randn(3, 17, 5)])
    assert [n.args[1:] for n in calls(f, torch.ops.aten.slice.Tensor)] == [
        (1, 1, sys.maxsize),
        (2, 0, 4),
        (1, 0, sys.maxsize, 2),
    ]


def test_canonicalize_drops_what_does_nothing():
    f, _ = run([], lambda x: F.dropout(x.float().clone(), 0.0).contiguous().view(x.shape) + 1, [torch.randn(3, 17, 16)])
    assert [n.target for n in f.graph.nodes if n.op == "call_function" and n.target is not aten.sym_size.int] == [
        aten.add.Tensor
    ]
