"""Each pass: rewritten (what becomes what), refused (the exact reason), numerics (forward and all gradients)."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moefx
from moefx import f64, ops
from moefx.frontend.call_signature import Call, flatten
from moefx.frontend.export import capture_module
from moefx.ir.graph import aten, is_call
from moefx.passes import (
    Canonicalize,
    Changes,
    LinearCrossEntropy,
    Lower,
    NormRotary,
    ResidualRMSNorm,
    RMSNorm,
    Rotary,
    Route,
    SwiGLU,
    default,
)
from moefx.rewriting.pipeline import run_pass


class Wrap(nn.Module):
    """A function as a module, so that it is captured as blocks are."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(parameters)

    def forward(self, *inputs):
        return self.function(*self.weights, *inputs)


def captured(function, inputs, parameters=()):
    module = Wrap(function, *parameters)
    tensors, template = flatten(tuple(inputs), {})
    f = capture_module(module, Call.of(tensors, template, True), {}, "f")
    f.instances.append("f")
    return module, f


def run(passes, function, inputs, parameters=(), **close):
    """The function after the passes, the last pass's changes; outputs and gradients are those of the plain function.

    ``close``: tolerances where the function rounds more often than the operation does.
    """
    module, f = captured(function, inputs, parameters)
    plan = moefx.Plan(moefx.resolve(["reference"]))
    changes = Changes()
    for p in (Canonicalize(), *passes):
        changes = run_pass(p, f, plan)[0]
    f.graph_module.recompile()
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = module(*inputs)
    found = f.graph_module(*[dict(module.named_parameters())[n] for n in f.parameters], *f.constants, *inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    leaves = [t for t in (*module.parameters(), *inputs) if t.requires_grad]
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, **close)

    def grads(outs):
        return torch.autograd.grad(
            sum((o.float() ** 2).sum() for o in outs if o.is_floating_point()), leaves, allow_unused=True
        )

    for a, b in zip(grads(wanted), grads(found), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, **close)
    return f, changes


def calls(f, op):
    return [n for n in f.graph.nodes if is_call(n, op)]


def norm(weight, x, eps=1e-5):
    h = x.to(torch.float32)
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_after(weight, x):
    h = x.to(torch.float32)
    return (weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


def norm_zero_centred(weight, x):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + weight.float())).type_as(x)


def norm_nemotron(weight, x):
    h = x.to(torch.float32)
    return (weight.to(torch.float32) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


def norm_gemma4(weight, x):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5) * weight.float()).type_as(x)


def norm_gemma4_weightless(x):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5)).type_as(x)


def norm_inkling2_weightless(x):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "options"),
    [(norm, {}), (norm_after, {"cast_first": False}), (norm_zero_centred, {"offset": 1.0}), (norm_nemotron, {"cast_first": False}),
     (norm_gemma4, {"cast_first": False}), (norm_gemma4_weightless, {}), (norm_inkling2_weightless, {})],
)  # fmt: skip
def test_rms_norm(dtype, function, options):
    weights = [] if "weightless" in function.__name__ else [nn.Parameter(torch.randn(16).to(dtype))]
    f, changes = run([RMSNorm()], function, [torch.randn(3, 17, 16).to(dtype)], weights)
    (node,) = calls(f, ops.rms_norm)
    assert node.args[2] == 1e-5 and len(changes.made) == 1 and changes.missed == []
    # in fp32 casts do nothing: which of two forms it was cannot be told, nor does it matter
    assert node.kwargs == options or (dtype == torch.float32 and "offset" not in options)


def test_rms_norm_refuses_a_sum_for_the_mean():
    def wrong(weight, x):
        return weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5))

    f, changes = run([RMSNorm()], wrong, [torch.randn(3, 17, 16)], [nn.Parameter(torch.randn(16))])
    assert calls(f, ops.rms_norm) == []
    assert any("expected aten.mean.dim, found sum_1 = aten.sum.dim_IntList" in c.what for c in changes.missed), changes.missed


def test_rms_norm_refuses_another_power():
    def wrong(weight, x):
        return weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5))

    f, changes = run([RMSNorm()], wrong, [torch.randn(3, 17, 16)], [nn.Parameter(torch.randn(16))])
    assert calls(f, ops.rms_norm) == [] and any("expected exponent=2, found the constant 4" in c.what for c in changes.missed)


def route_mixtral(logits):
    p = torch.softmax(logits.float(), dim=-1)
    value, index = torch.topk(p, 2, dim=-1)
    value /= value.sum(dim=-1, keepdim=True)
    return value, index


def route_gpt_oss(logits):
    value, index = torch.topk(logits, 2, dim=-1)
    return F.softmax(value, dim=1, dtype=value.dtype), index


def _limited(scores, fill):
    """Scores of the two best of four groups of experts; the others' become ``fill``."""
    groups = scores.view(-1, 4, 2).topk(2, dim=-1)[0].sum(dim=-1)
    chosen = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups)
    mask.scatter_(1, chosen, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    return scores.masked_fill(~mask.bool(), fill)


def route_deepseek(logits):
    scores = logits.sigmoid()
    index = torch.topk(_limited(scores, float("-inf")), k=2, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5, index


def route_mistral4(logits):
    scores = logits.softmax(-1)
    index = torch.topk(_limited(scores, 0.0), k=2, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, index


def route_deepseek_v2(logits):
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    groups = scores.view(-1, 4, 2).max(dim=-1).values
    chosen = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups)
    mask.scatter_(1, chosen, 1)
    mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    weights, index = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=2, dim=-1, sorted=False)
    return weights * 2.5, index


def route_deepseek_v4(bias, logits):
    scores = F.softplus(logits).sqrt()
    index = torch.topk(scores + bias, 2, dim=-1, sorted=False).indices
    weights = scores.gather(1, index)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * 1.5, index


def route_ernie(bias, logits):
    scores = F.softmax(logits, dim=1, dtype=torch.float)
    _, index = torch.topk(scores + bias, 2, dim=-1)
    weights = torch.gather(scores, dim=-1, index=index)
    return weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=1e-12), index


def route_gemma4(scale, logits):
    scores = F.softmax(logits, dim=-1, dtype=torch.float32)
    weights, index = torch.topk(scores, k=2, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights * scale[index], index


def route_kolibri(bias, logits):
    index = torch.topk(logits + bias, 2, dim=-1).indices
    weights = logits.gather(1, index).sigmoid()
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20), index


def route_cohere2(logits):
    value, index = torch.topk(logits, 2, dim=-1)
    value = F.sigmoid(value)
    return (value / torch.sum(value, dim=-1, keepdims=True)).to(logits.dtype), index


ROUTERS = [
    (route_mixtral, {"renormalize": True}),
    (route_gpt_oss, {"topk_first": True}),
    (route_deepseek, {"score": "sigmoid", "groups": 4, "topk_groups": 2, "scale": 2.5, "eps": 1e-20, "sorted": False}),
    (route_mistral4, {"groups": 4, "topk_groups": 2, "zero_fill": True, "renormalize": True, "eps": 1e-20, "scale": 2.5}),
    (route_deepseek_v2, {"groups": 4, "topk_groups": 2, "group_score": "max", "zero_fill": True, "scale": 2.5}),
    (route_deepseek_v4, {"score": "sqrtsoftplus", "gather": True, "renormalize": True, "eps": 1e-20, "scale": 1.5}),
    (route_ernie, {"gather": True, "renormalize": True, "least": 1e-12}),
    (route_gemma4, {"renormalize": True}),
    (route_kolibri, {"score": "sigmoid", "topk_first": True, "gather": True, "renormalize": True, "eps": 1e-20}),
    (route_cohere2, {"score": "sigmoid", "topk_first": True, "renormalize": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("function", "options"), ROUTERS)
def test_route(function, options, dtype):
    """Logits as a router has them: bf16 ones are neither tied nor near a tie."""
    given = [n for n in inspect.signature(function).parameters if n != "logits"]
    parameters = [nn.Parameter(torch.rand(8).to(torch.float32 if n == "bias" else dtype)) for n in given]
    logits = torch.stack([torch.randperm(8) / 4 - 1 for _ in range(17)]).to(dtype)
    f, changes = run([Route()], function, [logits], parameters)
    (node,) = calls(f, ops.route)
    assert node.args[2] == 2 and options.items() <= node.kwargs.items() and len(changes.made) == 1
    assert (node.args[1] is not None) == ("bias" in given) and (node.kwargs.get("expert_scale") is not None) == (
        "scale" in given
    )


@pytest.mark.parametrize("function", [f for f, _ in ROUTERS])
def test_routes_weights_are_the_same_at_the_experts_it_chose(function):
    """``route_at``, given what ``route`` chose."""
    given = [n for n in inspect.signature(function).parameters if n != "logits"]
    f, _ = run([Route()], function, [torch.randn(17, 8)], [nn.Parameter(torch.rand(8)) for _ in given])
    (node,) = calls(f, ops.route)
    logits, bias = torch.randn(17, 8), torch.rand(8) if node.args[1] is not None else None
    kwargs = {k: torch.rand(8) if k == "expert_scale" else v for k, v in node.kwargs.items()}
    weights, index = ops.route(logits, bias, 2, **kwargs)
    at = {k: v for k, v in kwargs.items() if k in {a.name for a in ops.route_at._schema.arguments}}
    torch.testing.assert_close(ops.route_at(logits, bias, index, **at), weights)


def test_route_refuses_another_score():
    def wrong(logits):
        value, index = torch.topk(torch.softmax(logits, -1).sqrt(), 2, dim=-1)
        return value / value.sum(dim=-1, keepdim=True), index

    f, changes = run([Route()], wrong, [torch.randn(17, 8)])
    assert calls(f, ops.route) == [] and any("found sqrt = aten.sqrt" in c.what for c in changes.missed), changes.missed


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


def test_swiglu_and_its_refusal():
    f, changes = run([SwiGLU()], lambda g, u: F.silu(g) * u, [torch.randn(3, 17), torch.randn(3, 17)])
    assert len(calls(f, ops.swiglu)) == 1 and len(changes.made) == 1
    f, changes = run([SwiGLU()], lambda g, u: F.silu(g) + u, [torch.randn(3, 17), torch.randn(3, 17)])
    assert calls(f, ops.swiglu) == []


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(reduction):
    def head(weight, hidden, labels):
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits.view(-1, 32), labels.view(-1), ignore_index=-100, reduction=reduction)

    labels = torch.randint(0, 32, (3, 17))
    labels[0, :5] = -100
    f, changes = run([LinearCrossEntropy()], head, [torch.randn(3, 17, 16), labels], [nn.Parameter(torch.randn(32, 16))])
    (node,) = calls(f, ops.linear_cross_entropy)
    assert node.kwargs.get("reduction", "mean") == reduction and len(changes.made) == 1


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (lambda x: x * 0.3, {"scale": 0.3}), (lambda x: x / 6.0, {"scale": 1 / 6.0}), (lambda x: x, {}),
        (lambda x: (x / 30.0).tanh() * 30.0, {"softcap": 30.0}), (lambda x: (x.float() / 30.0).tanh() * 30.0, {"softcap": 30.0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_of_scaled_and_capped_logits(form, options, dtype):
    def head(weight, hidden, labels):
        return F.cross_entropy(form(F.linear(hidden, weight)).float().view(-1, 32), labels.view(-1))

    given = [torch.randn(3, 17, 16, dtype=dtype), torch.randint(0, 32, (3, 17))]
    close = dict(rtol=2**-6, atol=0.05) if dtype == torch.bfloat16 else {}
    f, _changes = run([LinearCrossEntropy()], head, given, [nn.Parameter(torch.randn(32, 16, dtype=dtype))], **close)
    (node,) = calls(f, ops.linear_cross_entropy)
    assert node.kwargs == options


def test_linear_cross_entropy_refuses_a_cap_that_is_not_undone():
    def head(weight, hidden, labels):
        return F.cross_entropy((F.linear(hidden, weight) / 30.0).tanh().mul(20.0).view(-1, 32), labels.view(-1))

    f, changes = run(
        [LinearCrossEntropy()],
        head,
        [torch.randn(3, 17, 16), torch.randint(0, 32, (3, 17))],
        [nn.Parameter(torch.randn(32, 16))],
    )
    assert calls(f, ops.linear_cross_entropy) == [] and changes.made == []


def test_linear_cross_entropy_refuses_smoothing():
    def head(weight, hidden, labels):
        return F.cross_entropy(F.linear(hidden, weight).view(-1, 32), labels.view(-1), label_smoothing=0.1)

    f, changes = run(
        [LinearCrossEntropy()],
        head,
        [torch.randn(3, 17, 16), torch.randint(0, 32, (3, 17))],
        [nn.Parameter(torch.randn(32, 16))],
    )
    assert calls(f, ops.linear_cross_entropy) == [] and changes.made == []
    assert "expected label_smoothing=0.0, found the constant 0.1 at cross_entropy_loss" in changes.missed[0].what


def test_residual_rms_norm():
    def block(weight, x, y):
        total = x + y
        return norm(weight, total), total

    f, _changes = run(
        [RMSNorm(), ResidualRMSNorm()],
        block,
        [torch.randn(3, 17, 16), torch.randn(3, 17, 16)],
        [nn.Parameter(torch.randn(16))],
    )
    assert len(calls(f, ops.add_rms_norm)) == 1 and calls(f, ops.rms_norm) == [] and calls(f, aten.add.Tensor) == []


def heads(weight, x, cos, sin, computed=False, normalise=True):
    """Query and key of two heads each, normalised and rotated as the models write it."""
    scale = weight * 2 if computed else weight
    q, k = (
        (norm(scale, part) if normalise else part * 1.5).transpose(1, 2) for part in x.view(*x.shape[:2], 4, 16).chunk(2, dim=2)
    )
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(t):
        return t * cos + torch.cat((-t[..., 8:], t[..., :8]), dim=-1) * sin

    return turn(q), turn(k)


@pytest.mark.parametrize("computed", [False, True])
def test_norm_rotary(computed):
    angle = torch.randn(3, 17, 16)
    inputs = [torch.randn(3, 17, 64), angle.cos(), angle.sin()]
    f, changes = run(
        [RMSNorm(), Rotary(), NormRotary()],
        lambda *a: heads(*a, computed=computed),
        inputs,
        [nn.Parameter(torch.randn(16))],
    )
    if computed:
        assert len(calls(f, ops.rotary)) == 1 and calls(f, ops.norm_rotary) == []
        assert "is computed" in changes.missed[0].what
    else:
        assert len(calls(f, ops.norm_rotary)) == 2 and calls(f, ops.rotary) == calls(f, ops.rms_norm) == []


@pytest.mark.parametrize("keys_first", [False, True])
def test_norm_rotary_of_heads_that_follow_positions(keys_first):
    """Gemma 4 rotates before it transposes, and reads the query, transposed, before there is a key."""

    def heads(weight, x, cos, sin):
        parts = x.view(*x.shape[:2], 4, 16).chunk(2, dim=2)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)

        def turn(t):
            t = norm(weight, t)
            return (t * cos + torch.cat((-t[..., 8:], t[..., :8]), dim=-1) * sin).transpose(1, 2)

        first, second = (turn(part) for part in (reversed(parts) if keys_first else parts))
        return first @ second.transpose(2, 3), first, second

    angle = torch.randn(3, 17, 16)
    inputs = [torch.randn(3, 17, 64), angle.cos(), angle.sin()]
    f, changes = run([RMSNorm(), Rotary(), NormRotary()], heads, inputs, [nn.Parameter(torch.randn(16))])
    assert len(calls(f, ops.norm_rotary)) == 2 and calls(f, ops.rotary) == calls(f, ops.rms_norm) == []
    assert changes.missed == []


def test_a_router_whose_scores_are_returned():
    def route(logits):
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        weights, index = torch.topk(scores, k=2, dim=-1)
        return scores, weights / weights.sum(dim=-1, keepdim=True), index

    f, changes = run([Route()], route, [torch.randn(17, 8)])
    assert len(calls(f, ops.route)) == 1 and changes.missed == []


def test_norm_rotary_leaves_rotations_of_other_things_alone():
    angle = torch.randn(3, 17, 16)
    inputs = [torch.randn(3, 17, 64), angle.cos(), angle.sin()]
    f, changes = run([RMSNorm(), Rotary(), NormRotary()], lambda *a: heads(None, *a, normalise=None), inputs)
    assert len(calls(f, ops.rotary)) == 1 and changes.made == [] and changes.missed == []


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


def test_lower_keeps_the_choice_and_the_refusals():
    _module, f = captured(norm, [torch.randn(3, 17, 16)], [nn.Parameter(torch.randn(16))])
    never = moefx.Backend(
        "never", {ops.rms_norm: moefx.Kernel(lambda x, weight, eps, *, cast_first, offset: x, lambda n: "16 is too small")}
    )
    plan = moefx.Plan(moefx.resolve([never, "reference"]))
    for p in (Canonicalize(), RMSNorm(), Lower()):
        changes = run_pass(p, f, plan)[0]
    assert "never refused: 16 is too small" in changes.made[0].what


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


def test_capture_refuses_an_autograd_function():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 7

    with pytest.raises(moefx.CaptureError, match="autograd.Function .*Twice, whose backward a captured graph would lose"):
        captured(Twice.apply, [torch.randn(3, 17)])


def test_capture_refuses_a_baked_length_and_data_dependent_python():
    def loops(x):
        return sum(x[:, i] for i in range(x.shape[1]))

    with pytest.raises(moefx.CaptureError, match="its graph would hold for one value only of the sequence length"):
        captured(loops, [torch.randn(3, 17, 4)])
    with pytest.raises(moefx.CaptureError, match="data"):
        captured(lambda x: x * 2 if x.sum() > 0 else x, [torch.randn(3, 17, 4)])


@pytest.mark.parametrize(
    ("asks", "question"),
    [
        (lambda x: x * 2 if x.shape[1] > 8 else x, r"n > 8, for lengths, .*test_passes.py:\d+\): here it is so"),
        (lambda x: x * 2 if x.shape[1] == 1 else x, r"Eq\(n, 1\), .*: here it is not so"),
        (lambda x: x * 2 if x.shape[1] % 2 else x, r"Mod\(n, 2\)"),
        (lambda x: x * 2 if x.shape[0] * x.shape[1] < 4096 else x, r"m\*n < 4096|n\*m < 4096"),
    ],
)
def test_capture_refuses_python_that_asks_for_a_length(asks, question):
    with pytest.raises(moefx.CaptureError, match=question):
        captured(asks, [torch.randn(3, 17, 4)])


def test_capture_takes_python_whose_question_has_one_answer():
    def asks(x, y):
        return x + y if x.shape[1] == y.shape[1] and x.shape[1] > 0 else x

    captured(asks, [torch.randn(3, 17, 4), torch.randn(3, 17, 4)])


def test_capture_refuses_floats_from_no_grad():
    def hidden(x):
        with torch.no_grad():
            scale = x.sum(-1, keepdim=True)
        return x * scale

    with pytest.raises(moefx.CaptureError, match="no_grad"):
        captured(hidden, [torch.randn(3, 17, 4)])
