"""The pipeline: its order can be edited, and a pass that leaves a broken graph is named."""

from __future__ import annotations

import pytest
import torch

import moefx
from moefx import f64, ops
from moefx.ir.graph import aten
from moefx.passes import (
    Changes,
    default,
)
from moefx.rewriting.pipeline import run_pass
from tests.support.passes import captured


def test_a_pass_that_breaks_the_graph_is_named():
    class Breaks:
        name = "breaks"

        def run(self, function, plan):
            node = next(n for n in function.graph.nodes if n.op == "call_function")
            with function.graph.inserting_after(node):
                function.graph.call_function(aten.neg.default, (node,))
            return Changes()

    _, f = captured(lambda x: x * 2, [torch.randn(3, 17)])
    with pytest.raises(moefx.PassError, match=r"pass 'breaks' left neg.* without meta\['val'\]"):
        run_pass(Breaks(), f, moefx.Plan(()))


def test_pipeline_edits_and_unknown_names():
    swiglu = moefx.Raise("mine", ops.swiglu, {"gate": f64(2, 3), "up": f64(2, 3)})
    names = default().before("route", swiglu).names
    assert names.index("mine") == names.index("route") - 1
    assert default().after("route", swiglu).names.index("mine") == default().names.index("route") + 1
    assert "swiglu" not in default().without("swiglu").names and "mine" in default().replace("swiglu", swiglu).names
    with pytest.raises(
        moefx.MoefxError, match="no pass is named 'rote'; the pipeline has: canonicalize, dense_experts, rms_norm, route"
    ):
        default().before("rote", swiglu)
