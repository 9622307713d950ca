"""The pass asks whichever backend runs a norm for its variant "stream"; without one the norm stays as it is."""

import copy

import pytest
import torch

import moefx
from moefx import ops
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")


def rms_norm(x, weight, eps, *, cast_first=True, offset=0.0):
    return ops.BODIES[ops.rms_norm](x, weight, eps, cast_first=cast_first, offset=offset)


def norm_and_stream(x, weight, eps, *, cast_first=True, offset=0.0):
    return rms_norm(x, weight, eps, cast_first=cast_first, offset=offset), x


NORMS = {ops.rms_norm: moefx.Kernel(rms_norm)}


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_the_stream_comes_from_the_norm_and_gradients_are_the_models(name):
    plain = build(name)
    mine = moefx.Backend("mine", {**NORMS, (ops.rms_norm, "stream"): moefx.Kernel(norm_and_stream)})
    model = moefx.optimize(copy.deepcopy(plain), backends=[mine, "torch"], compile=False)
    report = moefx.report(model)["norm_streams"]
    assert report.made_count == plain.config.num_hidden_layers
    for shape in ((2, 9), (1, 1)):
        given, grads = batch(*shape), []
        for m in (plain, model):
            m.zero_grad()
            m(**given).logits.square().mean().backward()
            grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for n, g in grads[0].items():
            torch.testing.assert_close(grads[1][n], g, rtol=1e-4, atol=1e-5, msg=n)


def test_a_backend_without_the_variant_keeps_its_norm():
    model = moefx.optimize(build("qwen3_moe"), backends=[moefx.Backend("mine", NORMS), "torch"], compile=False)
    assert moefx.report(model)["norm_streams"].made_count == 0
    assert ("rms_norm", "mine") in moefx.report(model).kernels()
