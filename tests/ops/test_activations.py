"""Each activation against Transformers (bitwise), and its derivative against autograd."""

from types import SimpleNamespace

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling2.modeling_inkling2 import Inkling2SoftcappedSwiGLU

from moefx.ops.activations import ACTIVATIONS, join, split

ALPHA, LIMIT = 1.702, 1.5
SOFTCAPPED = Inkling2SoftcappedSwiGLU(SimpleNamespace(mlp_gate_softcap=ALPHA, mlp_up_softcap=LIMIT))
LIMITED = SimpleNamespace(alpha=ALPHA, limit=LIMIT, act_fn=ACT2FN["silu"])


def _gate_with(name):
    return lambda h: _default_apply_gate(SimpleNamespace(act_fn=ACT2FN[name]), h)


#: What the models call: on [gate | up], except GPT-OSS, whose halves alternate.
MODELS = {
    "swiglu": _gate_with("silu"),
    "geglu": _gate_with("gelu"),
    "geglu_tanh": _gate_with("gelu_pytorch_tanh"),
    "reglu": _gate_with("relu"),
    "clamped_swiglu": lambda h: DeepseekV4Experts._apply_gate(LIMITED, h),
    "oai_swiglu": lambda h: GptOssExperts._apply_gate(LIMITED, h),
    "softcapped_swiglu": lambda h: SOFTCAPPED(*h.chunk(2, dim=-1)),
    "relu2": ACT2FN["relu2"],
    "silu": ACT2FN["silu"],
    "gelu": ACT2FN["gelu"],
    "gelu_tanh": ACT2FN["gelu_pytorch_tanh"],
    "relu": ACT2FN["relu"],
}


def _input(rows=7, width=12, dtype=torch.float64):
    """Random values, with zeros and values at the limit and far beyond it: where the derivatives have their corners."""
    h = 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if rows:
        corners = torch.tensor([0.0, LIMIT, -LIMIT, 60.0, -60.0, 2 * LIMIT], dtype=torch.float64)
        h[0], h[1], h[2, ::2] = corners.repeat(2), corners.repeat_interleave(2), 0.0
    return h.to(dtype)


def test_table_names_what_the_models_use():
    assert set(ACTIVATIONS) == set(MODELS)
    assert all(name == a.name for name, a in ACTIVATIONS.items())
    assert {n for n, a in ACTIVATIONS.items() if not a.gated} == {"relu2", "silu", "gelu", "gelu_tanh", "relu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_bitwise_that_of_transformers(name, dtype):
    h = _input(dtype=dtype)
    ours = ACTIVATIONS[name].forward(h, ALPHA, LIMIT, name == "oai_swiglu")
    theirs = MODELS[name](h)
    assert ours.dtype == dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_backward_is_autograd_of_the_forward(name, interleaved):
    act = ACTIVATIONS[name]
    h = _input().requires_grad_()
    a = act.forward(h, ALPHA, LIMIT, interleaved)
    assert a.shape == (7, 6 if act.gated else 12)
    grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=a.dtype)
    (expected,) = torch.autograd.grad(a, h, grad)
    with torch.no_grad():
        found = act.backward(h, grad, ALPHA, LIMIT, interleaved)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_backward_in_bf16_rounds_a_few_times(name):
    """At most eight roundings of 2**-9, of products that do not exceed |grad| * alpha * (|h| + 1)**2."""
    act = ACTIVATIONS[name]
    h = _input(dtype=torch.bfloat16)[3:]  # without the rows of corners, which would make the bound loose
    grad = torch.randn(4, 6 if act.gated else 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = act.backward(h, grad, ALPHA, LIMIT, False).double()
    exact = act.backward(h.double(), grad.double(), ALPHA, LIMIT, False)
    scale = grad.abs().amax(dim=1, keepdim=True).double() * ALPHA * (h.double().abs().amax(dim=1, keepdim=True) + 1) ** 2
    assert ((found - exact).abs() <= 8 * 2**-9 * scale).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_no_rows(interleaved):
    for act in ACTIVATIONS.values():
        h = _input(rows=0)
        a = act.forward(h, ALPHA, LIMIT, interleaved)
        assert a.shape == (0, 6 if act.gated else 12)
        assert act.backward(h, a, ALPHA, LIMIT, interleaved).shape == h.shape


@pytest.mark.parametrize("interleaved", [False, True])
def test_join_is_the_inverse_of_split(interleaved):
    h = _input()
    assert torch.equal(join(*split(h, interleaved), interleaved), h)
    halves = [t.tolist() for t in split(torch.arange(4.0), interleaved)]
    assert halves == ([[0, 2], [1, 3]] if interleaved else [[0, 1], [2, 3]])
