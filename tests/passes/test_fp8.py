"""The pass fp8 takes the FP8 variants of the plan's backends, a user's too; who has none is named."""

import copy

import pytest
import torch

import moefx
from moefx import ops
from moefx.passes import FP8, default
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")


@ops.takes_spec
def rounded(x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias, *, spec: ops.ExpertsSpec):
    """Experts whose tokens are rounded to e4m3."""
    x = x + (x.to(torch.float8_e4m3fn).to(x.dtype) - x).detach()
    return ops.BODIES[ops.experts](x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias, **vars(spec))


MINE = moefx.Backend("mine", {(ops.experts, "fp8"): moefx.Kernel(rounded, why="e4m3 tokens")})


def test_a_users_experts_in_fp8():
    plain = build("qwen3_moe")
    pipeline = default().before("lower", FP8(linear=False))
    model = moefx.optimize(copy.deepcopy(plain), pipeline=pipeline, backends=[MINE, "torch"], compile=False)
    report, layers = moefx.report(model), plain.config.num_hidden_layers
    assert [c.what for c in report["fp8"].made] == ["moefx.experts -> mine in FP8, numerics change: e4m3 tokens"] * (
        len(report["fp8"].made)
    )
    assert report["fp8"].made_count == layers and {c.what for c in report["fp8"].missed} == {"not asked for"}
    given = batch(2, 9)
    wanted, found = (m(**given).loss for m in (plain, model))
    found.backward()
    assert 0 < abs(float(found - wanted)) < 0.02 * float(wanted)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"linear": False, "experts": False}, "linear and experts are False"),
        ({"recipe": "fp4"}, "there is no fp8 recipe 'fp4'"),
    ],
)
def test_a_pass_that_can_do_nothing_is_an_error(given, text):
    with pytest.raises(moefx.MoefxError, match=text):
        moefx.optimize(build("qwen3_moe"), pipeline=default().before("lower", FP8(**given)), compile=False)
