"""The pass expert_parallel, in one process with the mesh of several: what it makes, and what it refuses."""

import functools

import pytest

import moefx
from moefx import ops
from moefx.ir.graph import arguments, is_call
from moefx.ops import dispatch_combine
from moefx.ops.grouped_mlp import grouped_mlp
from moefx.passes import default
from tests.support.passes import rewritten_over_ranks

pytestmark = pytest.mark.usefixtures("cached_captures")


@functools.cache
def report_of(name, ep, **changes):
    with rewritten_over_ranks(name, ep, default().without("overlap", "lower"), **changes) as report:
        return report


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
