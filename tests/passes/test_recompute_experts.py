"""The pass takes the variant "recompute" of whichever backend runs the experts; it says where there is none."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moefx
from moefx import ops
from moefx.passes import RecomputeExperts, default
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")
BODY = ops.BODIES[ops.experts]


@ops.takes_spec
def experts(x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias, *, spec: ops.ExpertsSpec):
    given = (x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias)
    return BODY(*given, **vars(spec))


@ops.takes_spec
def recomputed(x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias, *, spec: ops.ExpertsSpec):
    given = (x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias)
    return checkpoint(lambda *tensors: BODY(*tensors, **vars(spec)), *given, use_reentrant=False)


TABLE = {ops.experts: moefx.Kernel(experts), (ops.experts, "recompute"): moefx.Kernel(recomputed)}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_users_variant_trains_as_the_model(name):
    plain = build(name)
    pipeline = default().after("lower", RecomputeExperts())
    model = moefx.optimize(
        copy.deepcopy(plain), pipeline=pipeline, backends=[moefx.Backend("mine", TABLE), "torch"], compile=False
    )
    report = moefx.report(model)["recompute_experts"]
    assert report.made_count > 0 and not report.missed
    assert all("by mine: the backward recomputes pre-activations" in c.what for c in report.made)
    given = batch(2, 9)
    losses = [m(**given).loss for m in (plain, model)]
    [loss.backward() for loss in losses]
    torch.testing.assert_close(*losses)
    for (n, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=n)


@pytest.mark.parametrize(
    ("at", "text"),
    [("after", "moefx.experts by mine has no variant 'recompute'"), ("before", "the pass has to run after lower")],
)
def test_where_there_is_none_the_report_says_why(at, text):
    mine = moefx.Backend("mine", {ops.experts: moefx.Kernel(experts)})
    pipeline = getattr(default(), at)("lower", RecomputeExperts())
    model = moefx.optimize(build("qwen3_moe"), pipeline=pipeline, backends=[mine, "torch"], compile=False)
    report = moefx.report(model)["recompute_experts"]
    assert report.made_count == 0 and report.missed
    assert all(text in c.what for c in report.missed)
