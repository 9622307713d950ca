"""Specs: an option is typed and documented at its field, and reaches schema, body, kernels and opaque operations from there."""

import dataclasses

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import moefx
from moefx import ops
from moefx.backends import Backend, Kernel, builtin, resolve
from moefx.ops import RouterSpec, schema, takes_spec
from moefx.ops.custom_op import opaque


@dataclasses.dataclass(frozen=True)
class CappedRouterSpec(RouterSpec):
    """What somebody adds an option with: one field."""

    logit_cap: float = 0.0


LIBRARY = torch.library.Library("moefx_test_spec", "FRAGMENT")


@ops.op(f"capped_route(Tensor logits, Tensor? bias, int top_k, *, {schema(CappedRouterSpec)}) -> (Tensor, Tensor)", LIBRARY)
@takes_spec
def capped_route(logits: Tensor, bias: Tensor | None, top_k: int, *, spec: CappedRouterSpec) -> tuple[Tensor, Tensor]:
    capped = torch.tanh(logits / spec.logit_cap) * spec.logit_cap if spec.logit_cap else logits
    return ops.route_body(capped, bias, top_k, None, spec)


@opaque("test_capped_route")
def fused(logits: Tensor, top_k: int, spec: CappedRouterSpec, keep: bool) -> tuple[Tensor, Tensor]:
    SEEN.append((spec, keep))
    return ops.route_body(torch.tanh(logits / spec.logit_cap) * spec.logit_cap, None, top_k, None, spec)


@fused.register_fake
def _(logits, top_k, spec, keep):
    return ops.route_body(logits, None, top_k, None, spec)


@opaque("test_capped_route_backward", once=True)
def fused_backward(grad: Tensor, logits: Tensor, spec: CappedRouterSpec) -> Tensor:
    return torch.full_like(logits, spec.logit_cap)


@fused_backward.register_fake
def _(grad, logits, spec):
    return torch.empty_like(logits)


def _save(ctx, inputs, _, output):
    logits, _, ctx.spec, _ = inputs
    ctx.save_for_backward(logits)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return fused_backward(grad, *ctx.saved_tensors, ctx.spec), None, None, None


fused.register_autograd(_backward, setup_context=_save)
SEEN: list[tuple] = []


@takes_spec
def kernel(logits: Tensor, bias: Tensor | None, top_k: int, *, spec: CappedRouterSpec) -> tuple[Tensor, Tensor]:
    return fused(logits, top_k, spec, True)


def test_a_new_field_reaches_schema_body_kernel_and_opaque_operation():
    options = {a.name: a.default_value for a in capped_route._schema.arguments if a.kwarg_only}
    assert options == dataclasses.asdict(CappedRouterSpec())
    (mine, _) = resolve(Backend("mine", {capped_route: Kernel(kernel)}))
    logits = torch.randn(3, 8)
    wanted, chosen = ops.route(torch.tanh(logits / 0.5) * 0.5, None, 2, renormalize=True)
    for run in (capped_route, ops.BODIES[capped_route], mine.kernels[capped_route].fn):
        found, index = run(logits, None, 2, renormalize=True, logit_cap=0.5)
        assert torch.equal(found, wanted) and torch.equal(index, chosen)
    assert [(CappedRouterSpec(renormalize=True, logit_cap=0.5), True)] == SEEN
    names = [a.name for a in fused.overload._schema.arguments]
    assert names == ["logits", "top_k", *(f.name for f in dataclasses.fields(CappedRouterSpec)), "keep"]


def test_nodes_show_the_options_and_the_adapter_vanishes_when_it_is_traced():
    def run(logits):
        return kernel(logits, None, 2, score="sigmoid", logit_cap=0.5)[0]

    logits = torch.randn(3, 8, requires_grad=True)
    calls = [n for n in make_fx(run, tracing_mode="fake")(logits.detach()).graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls if n.target is fused.overload] and not any(callable(a) for n in calls for a in n.args)
    graphs = []

    def keep(module: fx.GraphModule, _):
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(logits), run(logits))
    compiled(torch.randn(3, 8, requires_grad=True))
    assert [n.target for n in graphs[0].nodes if n.op == "call_function" and n.target is fused.overload]
    assert len(graphs) == 1
    compiled(logits).sum().backward()
    assert torch.equal(logits.grad, torch.full((3, 8), 0.5))
    torch.library.opcheck(fused.overload, (logits, 2, *dataclasses.astuple(CappedRouterSpec(logit_cap=0.5)), True))


def test_a_field_that_no_schema_can_hold_is_named():
    bad = dataclasses.make_dataclass("BadSpec", [("table", Tensor)], frozen=True)
    with pytest.raises(moefx.MoefxError, match=r"BadSpec.table is a <class 'torch.Tensor'>: fields are bool, int, float, str"):
        schema(bad)
    with pytest.raises(moefx.MoefxError, match="has no parameter `spec`"):
        takes_spec(lambda x: x)


def test_required_options_and_defaults_are_those_of_the_spec():
    q = torch.randn(1, 2, 3, 4)
    attention = ops.BODIES[ops.attention]
    with pytest.raises(TypeError, match="is_causal"):
        attention(q, q, q, None, None, scale=0.5)
    with pytest.raises(TypeError, match="windw"):
        attention(q, q, q, None, None, scale=0.5, is_causal=True, windw=3)
    wanted = ops.attention(q, q, q, None, None, scale=0.5, is_causal=True)
    assert torch.equal(attention(q, q, q, None, None, scale=0.5, is_causal=True), wanted)


@pytest.mark.parametrize("name", builtin())
def test_kernels_with_a_spec_take_the_operations_own(name):
    specs = {op: body.spec for op, body in ops.BODIES.items() if hasattr(body, "spec")}
    assert len(specs) >= 8
    for op, kernel in builtin()[name].kernels.items():
        if op in specs and hasattr(kernel.fn, "spec"):
            assert kernel.fn.spec is specs[op]
