"""The pass expert_parallel, in one process with the mesh of several: what it makes, and what it refuses."""

import functools

import pytest
import torch

import moefx
from moefx import backends, ops
from moefx.api import rewrite
from moefx.cli.inspect import ranks
from moefx.distributed import expert_sharding
from moefx.frontend.capture import capture
from moefx.integrations import transformers as hf
from moefx.ir.graph import arguments, is_call
from moefx.ops import dispatch_combine
from moefx.ops.grouped_mlp import grouped_mlp
from moefx.options import Options
from moefx.passes import default
from tests.support.families import build

pytestmark = pytest.mark.usefixtures("cached_captures")


@functools.cache
def report_of(name, ep, **changes):
    with torch.device("meta"):
        model = build(name, **changes)
    hf.check(model)
    with ranks(ep) as mesh:
        size, mesh = expert_sharding.make_mesh(model, ep, mesh)
        plan = expert_sharding.plan(model, Options(), backends.resolve(None), size, mesh)
        return rewrite(capture(model), plan, default().without("overlap", "lower"), model)


@pytest.mark.parametrize("ep", [2, 4, 8])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_experts_become_an_exchange_around_local_experts(name, ep):
    report = report_of(name, ep)
    made = report["expert_parallel"]
    assert made.made_count > 0 and not made.missed
    for function in report.program:
        calls = [n for n in function.graph.nodes if is_call(n)]
        assert not any(n.target is ops.experts for n in calls)
        local = [n for n in calls if n.target is grouped_mlp]
        assert len(local) == sum(n.target is dispatch_combine.combine for n in calls)
        for node in local:
            given = arguments(node)
            assert moefx.value(given["gate_up"]).shape[0] == 8 // ep
            assert given["grad_scale"] == 1 / ep


def test_experts_that_ranks_cannot_share_are_refused():
    with pytest.raises(moefx.MoefxError, match="6 experts"):
        report_of("qwen3_moe", 4, num_experts=6)
