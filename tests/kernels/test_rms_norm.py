"""Norms of rows in one kernel against the operations' own bodies in float64: results and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

import moefx
from moefx import Backend, Kernel, ops
from moefx.analysis.cost import Sizes, node_cost
from moefx.backends import triton as backend
from moefx.ir.graph import value
from moefx.kernels import norm as kernels
from moefx.kernels.partial_sums import partial_sums
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Two roundings. Triton's interpreter cuts off where a device rounds to the nearest.
BF16 = 2**-7 if DEVICE == "cuda" else 2**-6


#: Norms whose input is read again later in what is captured (Mamba layers are not).
LAYERS = {"qwen3_moe": 2, "nemotron_h": 3, "gemma4_text": 6}


def body_of_stream(x, weight, eps, **options):
    return ops.BODIES[ops.rms_norm](x, weight, eps, **options), x


NORMS = {
    "norm": (backend.rms_norm, ops.BODIES[ops.rms_norm]),
    "sum": (backend.add_rms_norm, ops.BODIES[ops.add_rms_norm]),
    "stream": (backend.normed_stream, body_of_stream),
}


def check(kind, shape, *, dtype=torch.float32, weighted=True, strided=False, used=(0, 1), how=lambda f: f, **options):
    g = torch.Generator().manual_seed(sum(shape))

    def normal(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    given = [(3 * normal(*shape[:-1], 2 * shape[-1]))[..., : shape[-1]] if strided else 3 * normal(*shape)]
    given += [normal(*shape)] if kind == "sum" else []
    weight = 1 + normal(shape[-1]) / 4 if weighted else None
    grads = [normal(*shape), normal(*shape[:-1], 1).expand(shape)]

    def run(function, to, device):
        leaves = [t.to(device, to).requires_grad_() for t in (*given, weight) if t is not None]
        out = function(*leaves[: len(given)], leaves[-1] if weighted else None, 1e-3, **options)
        out = out if isinstance(out, tuple) else (out,)
        some = [i for i in range(len(out)) if i in used]
        found = torch.autograd.grad([out[i] for i in some], leaves, [grads[i].to(device, to) for i in some], allow_unused=True)
        return [*out, *found]

    wanted = run(NORMS[kind][1], torch.float64, "cpu")
    found = run(how(NORMS[kind][0]), dtype, DEVICE)
    assert len(wanted) == len(found)
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        assert (f is None) == (w is None), i
        if w is not None and w.numel():
            assert f.dtype == dtype and f.shape == w.shape, i
            far = float((f.detach().double().cpu() - w).abs().max()) / (float(w.abs().max()) + 1e-9)
            assert far <= (2e-6 if dtype == torch.float32 else BF16), f"{i}: {far:.1e}"


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"cast_first": False}, {"offset": 1.0}, {"weighted": False}], ids=str)
def test_norms(kind, dtype, options):
    check(kind, (2, 5, 72), dtype=dtype, **options)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(1, 1, 512), (0, 3, 64), (1, 3, 2880), (3, 37, 16), (75, 600)], ids=str)
def test_sizes(kind, shape, monkeypatch):
    """One token, none, a width that is no power of two, more rows than the backward has programs."""
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    monkeypatch.setattr(kernels, "TILE", 1024)
    kernels._launch_forward.cache_clear()
    kernels._launch_backward.cache_clear()
    check(kind, shape)
    kernels._launch_forward.cache_clear()
    kernels._launch_backward.cache_clear()


@pytest.mark.parametrize("kind", NORMS)
def test_a_frozen_weight(kind, monkeypatch):
    """Its sums are not computed; the other gradients are the same numbers."""
    g = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((2, 5, 72), (2, 5, 72), (72,)))

    def gradients(trained):
        leaves = [t.clone().requires_grad_() for t in ((x, residual) if kind == "sum" else (x,))]
        out = NORMS[kind][0](*leaves, weight.clone().requires_grad_(trained), 1e-3)
        return torch.autograd.grad(sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,))), leaves)

    wanted = gradients(True)
    monkeypatch.setattr(kernels, "partial_sums", None)
    assert all(map(torch.equal, gradients(False), wanted))


@pytest.mark.parametrize("options", [{}, {"cast_first": False}, {"offset": 1.0}], ids=str)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_dtypes_are_promoted_as_by_the_body(kind, options, compiled):
    """Under autocast: the stream and the weight in float32, what attention and experts give in 16 bits, and others."""
    half, full = torch.bfloat16, torch.float32
    how = torch.compile(NORMS[kind][0], fullgraph=True) if compiled else NORMS[kind][0]
    for of_x, of_residual, of_weight in [(half, full, full)] if compiled else itertools.product((half, full), repeat=3):
        g = torch.Generator().manual_seed(0)
        given = [torch.randn(2, 3, 40, generator=g).to(of_x)]
        given += [torch.randn(2, 3, 40, generator=g).to(of_residual)] if kind == "sum" else []
        given += [(1 + torch.randn(40, generator=g) / 4).to(of_weight)]

        def run(function, device, given=given):
            leaves = [t.to(device, copy=True).requires_grad_() for t in given]
            out = function(*leaves, 1e-3, **options)
            out = out if isinstance(out, tuple) else (out,)
            return [*out, *torch.autograd.grad(sum((o.float() ** 2).sum() for o in out), leaves)]

        for i, (w, f) in enumerate(zip(run(NORMS[kind][1], "cpu"), run(how, DEVICE), strict=True)):
            assert f.dtype == w.dtype, (i, of_x, of_residual, of_weight)
            far = float((f.detach().float().cpu() - w.detach().float()).abs().max() / w.detach().abs().max())
            assert far <= (4e-2 if half in (of_x, of_residual, of_weight) else 2e-6), (i, far)


@pytest.mark.parametrize(("kind", "used"), [("sum", (0,)), ("sum", (1,)), ("stream", (0,))])
def test_a_result_that_nobody_reads(kind, used):
    check(kind, (2, 3, 40), used=used)


@pytest.mark.parametrize("kind", NORMS)
def test_rows_that_lie_apart_and_compiled(kind):
    check(kind, (2, 3, 40), strided=True)
    check(kind, (2, 3, 40), how=lambda f: torch.compile(f, fullgraph=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter cuts off where a device rounds")
@pytest.mark.parametrize("cast_first", [True, False])
def test_a_norm_in_bf16_is_rounded_where_the_model_rounds(cast_first):
    x, weight = (torch.randn(*shape, device=DEVICE).to(torch.bfloat16) for shape in ((300, 2048), (2048,)))
    wanted = [ops.BODIES[ops.rms_norm](x, weight, 1e-6, cast_first=c) for c in (cast_first, not cast_first)]
    found = backend.rms_norm(x, weight, 1e-6, cast_first=cast_first)
    other = [float((found != w).float().mean()) for w in wanted]
    assert other[0] < 0.01 < 0.1 < other[1], other


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (130, 40), (528, 2048)])
def test_partial_sums(rows, width):
    parts = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    found = partial_sums(parts.to(DEVICE), torch.bfloat16)
    torch.testing.assert_close(found.cpu(), parts.double().sum(0).to(torch.bfloat16), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("compiled", [False, True if DEVICE == "cuda" else "aot_eager"])
def test_the_pass_hands_streams_on(family, compiled):
    """A block's first norm adds the gradient of what reads its input after it; losses and gradients are the model's."""
    norms = ops.rms_norm, ops.add_rms_norm, (ops.rms_norm, "stream")
    mine = Backend("fused", {op: Kernel(backend.BACKEND.kernels[op].fn) for op in norms})
    plain, model = build(family).to(DEVICE), build(family).to(DEVICE)
    moefx.optimize(model, compile=compiled, backends=[mine, "torch"])
    report = moefx.report(model)["norm_streams"]
    assert report.made_count == LAYERS[family] and "later readers" in report.made[0].what
    given = {k: v.to(DEVICE) for k, v in batch(2, 9).items()}
    for m in (plain, model):
        m.train()
        m(**given, use_cache=False).loss.backward()
    assert not moefx.report(model).fallbacks
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-3, atol=1e-5 * float(a.grad.abs().max()) + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_stream_that_is_handed_on_is_not_written():
    fused = {ops.rms_norm: Kernel(backend.rms_norm), (ops.rms_norm, "stream"): Kernel(backend.normed_stream)}
    model = moefx.optimize(build("qwen3_moe"), compile=False, backends=[Backend("fused", fused), "torch"])
    function = next(f for f in moefx.report(model).program if f.module_class == "Qwen3MoeDecoderLayer")
    (stream,) = (n for n in function.graph.nodes if n.target is backend.normed_stream)
    cost, sizes = node_cost(stream, Sizes(function)), Sizes(function)
    assert cost.written == sizes.bytes(value(stream)[0]) and cost.read == sum(
        sizes.bytes(value(n)) for n in stream.all_input_nodes
    )


@pytest.mark.parametrize(("dtype", "width", "device", "said"), [
    (torch.float64, 2048, "cuda", "adds in float32, the input is torch.float64"),
    (torch.bfloat16, 256, "cuda", "rows of 512 to 16384 numbers, these have 256"),
    (torch.bfloat16, 20480, "cuda", "rows of 512 to 16384 numbers, these have 20480"),
    (torch.bfloat16, 2048, "cpu", "run on CUDA devices, the input is on cpu"),
    (torch.bfloat16, 2048, "cuda", None),
])  # fmt: skip
def test_what_it_refuses(dtype, width, device, said):
    """Not dtypes that differ: the kernel promotes them as the body does."""
    with FakeTensorMode():
        given = (
            torch.empty(3, width, dtype=dtype, device=device),
            torch.empty(3, width, device=device),
            torch.empty(width, device=device),
        )
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("x", "residual", "weight")]
    for node, val in zip(inputs, given, strict=True):
        node.meta["val"] = val
    found = backend.refuses_norm(graph.call_function(ops.add_rms_norm, (*inputs, 1e-6)))
    assert found is None if said is None else said in found


def test_norms_of_torch_keep_theirs():
    model = moefx.optimize(build("qwen3_moe"), compile=False, backends=["torch"])
    assert moefx.report(model)["norm_streams"].made_count == 0
