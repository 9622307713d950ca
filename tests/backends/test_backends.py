"""Selection of backends, refusals, and every kernel of the torch backend against its operation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses import FakeTensorMode

import moefx
from moefx import ops
from moefx.backends import Backend, Kernel, builtin, choose, known, resolve
from moefx.backends import torch as torch_backend
from moefx.kernels import linear_cross_entropy as chunked
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped

MINE = torch.ops.moefx.swiglu.default


def _random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _node(op, *values, **options):
    """A call of ``op`` in a graph; tensors become placeholders that carry fake values."""
    graph = fx.Graph()
    args = []
    for i, v in enumerate(values):
        if isinstance(v, torch.Tensor):
            place = graph.placeholder(f"a{i}")
            place.meta["val"] = v
            v = place
        args.append(v)
    return graph.call_function(op, tuple(args), options)


def _attention_node(sinks=None, **options):
    q = torch.empty(2, 4, 5, 8, device="meta")
    return _node(ops.attention, q, q, q, None, sinks, **{"scale": 0.5, "is_causal": True, **options})


def _norm_node(x=torch.float32, weight=torch.float32, **options):
    x, weight = torch.empty(3, 8, dtype=x, device="meta"), torch.empty(8, dtype=weight, device="meta")
    return _node(ops.rms_norm, x, weight, 1e-6, **options)


# --- the list of backends --------------------------------------------------------------------------------------------


def _names(backends):
    return [b.name for b in resolve(backends)]


def _mine(fn=lambda gate, up: gate, op=MINE, **options):
    return Backend("mine", {op: Kernel(fn)}, **options)


def test_order_is_the_callers_and_the_reference_comes_last():
    usable = [name for name, b in builtin().items() if b.available() is None]
    assert _names(None) == usable and usable[-1] == "reference" and "torch" in usable
    assert _names(["reference"]) == _names("reference") == _names([]) == ["reference"]
    assert _names("torch") == ["torch", "reference"]
    assert _names([_mine(), "torch"]) == ["mine", "torch", "reference"] and _names(_mine()) == ["mine", "reference"]


@pytest.mark.parametrize(
    ("backends", "message"),
    [
        (["tourch"], r"no backend is named 'tourch'; there are: .*triton, torch, .*reference"),
        ([3], r"3 is not a backend: pass a name \(.*\) or a moefx.Backend"),
        ([_mine(available=lambda: "needs an H100, got none")], r"'mine' cannot be used here: needs an H100, got none"),
        ([_mine(op="swiglu")], r"'mine' has a kernel for 'swiglu', which is not an operation"),
        (
            [_mine(lambda x: x)],
            r"'mine': the kernel of moefx.swiglu takes \(x\), the operation has \(gate, up\): give it the",
        ),
        (
            [_mine(lambda x, weight, eps, *, cast=True, offset=0.0: x, ops.rms_norm)],
            r"takes \(x, weight, eps, \*, cast, offset\), the operation has \(x, weight, eps, \*, cast_first, offset\)",
        ),
        (
            [_mine(lambda x, weight, eps, cast_first, offset: x, ops.rms_norm)],
            r"takes \(x, weight, eps, cast_first, offset\), the operation has",
        ),
    ],
)  # fmt: skip
def test_bad_backends_are_named_with_the_two_values_that_disagree(backends, message):
    with pytest.raises(moefx.MoefxError, match=message):
        resolve(backends)


def test_any_callable_with_the_signature_is_a_kernel():
    """Positional arguments count by place; a builtin that does not tell its signature is taken at its word."""
    for fn in (lambda a, b: a, lambda *args, **options: args[0], MINE, torch.mul):
        assert _names(_mine(fn)) == ["mine", "reference"]


@pytest.mark.parametrize("name", builtin())
def test_kernels_of_this_package_have_their_operations_signature(name):
    backend = builtin()[name]
    if backend.available() is None:
        assert name in _names([name])
    assert all(kernel.why for kernel in backend.kernels.values())


# --- the choice ------------------------------------------------------------------------------------------------------


def test_first_that_accepts_is_chosen_and_refusals_are_kept():
    choosy = Backend("choosy", {ops.attention: Kernel(ops.attention, lambda node: "needs 5 heads, got 4")})
    choice = choose(_attention_node(), resolve([choosy, "torch"]))
    assert choice.backend.name == "torch" and choice.kernel.fn is torch_backend.attention
    assert choice.why == choice.kernel.why and choice.refusals == [("choosy", "needs 5 heads, got 4")]


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (
            _attention_node(torch.empty(4, device="meta")),
            "scaled_dot_product_attention has no sinks, and flash attention runs on CUDA devices in 16 bits, q is torch.float32 "
            "on meta",
        ),
        (_attention_node(softcap=30.0), "scaled_dot_product_attention has no softcap, this attention has 30.0"),
        (_norm_node(offset=1.0), "F.rms_norm multiplies by the weight, this norm by 1.0 + weight"),
        (
            _norm_node(x=torch.bfloat16),
            "F.rms_norm wants one dtype, the input is torch.bfloat16, the weight torch.float32",
        ),
    ],
    ids=["sinks", "softcap", "offset", "dtypes"],
)  # fmt: skip
def test_torch_refuses_with_the_reason_and_the_reference_runs(node, sentence):
    choice = choose(node, resolve("torch"))
    assert choice.backend.name == "reference" and choice.kernel.fn is node.target
    assert choice.refusals == [("torch", sentence)]


@pytest.mark.parametrize(("inner", "accepted"), [(24, True), (18, False), (20, False)])
def test_torch_refuses_experts_that_the_grouped_gemm_cannot_read(inner, accepted):
    with FakeTensorMode():
        up, down = (torch.empty(4, *s, dtype=torch.bfloat16, device="cuda") for s in ((2 * inner, 16), (16, inner)))
        x, index, weights = torch.empty(5, 16), torch.empty(5, 2, dtype=torch.int64), torch.empty(5, 2)
    node = _node(ops.experts, x, index, weights, up, None, down, None, activation="swiglu")
    choice = choose(node, resolve("torch"))
    assert choice.backend.name == ("torch" if accepted else "reference")
    if not accepted:
        assert "rows of whole 16 bytes" in choice.refusals[0][1]


def test_an_operation_that_nobody_has():
    node = _node(torch.ops.aten.relu.default, torch.empty(3, device="meta"))
    assert not known(node.target, resolve(None)) and known(ops.rms_norm, resolve(None))
    with pytest.raises(moefx.MoefxError, match="no backend takes aten.relu: none has a kernel for it"):
        choose(node, resolve(None))
    with pytest.raises(moefx.MoefxError, match="no backend takes moefx.attention: torch: .*has no sinks"):
        choose(_attention_node(torch.empty(4, device="meta")), [torch_backend.BACKEND])


def test_reference_has_every_operation_and_those_that_users_add():
    @moefx.op("test_backends_double(Tensor x) -> Tensor")
    def double(x):
        return x + x

    (reference,) = resolve("reference")
    opaque = (dispatch_combine.dispatch, dispatch_combine.combine, grouped.grouped_mlp)
    for op in (*ops.BODIES, *opaque):
        assert reference.kernel(op).fn is op
    assert double in ops.BODIES and len(reference.kernels) == len(list(reference.kernels)) == len(ops.BODIES) + len(opaque)


# --- the torch backend's kernels against the operations --------------------------------------------------------------


def _run(function, inputs, options, grad_of=1.0):
    """The result and the gradients of all inputs that need one."""
    inputs = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs]
    y = function(*inputs, **options)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    grad = _random(*y.shape, dtype=y.dtype, seed=99) * grad_of
    return y.detach(), *torch.autograd.grad(y, wanted, grad)


def _compare(kernel, op, inputs, options, grad_of=1.0):
    """fp32: to rounding. 16 bits: both against the operation in fp64; the kernel may err as much as the operation does,
    twice (its roundings differ), and by one rounding of the largest value."""
    found, right = _run(kernel, inputs, options, grad_of), _run(op, inputs, options, grad_of)
    wide = [
        t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in inputs
    ]
    exact = _run(op, wide, options, grad_of)
    for a, b, e in zip(found, right, exact):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            bound = 2 * (b - e).abs().max() + torch.finfo(a.dtype).eps * e.abs().max()
            assert b.isfinite().all() and (a - e).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cast_first", "weighted"), [(True, True), (False, True), (True, False)])
def test_rms_norm(dtype, cast_first, weighted):
    weight = (1 + _random(24, seed=1) / 4).to(dtype).requires_grad_() if weighted else None
    x = _random(2, 3, 24, dtype=dtype).requires_grad_()
    _compare(torch_backend.rms_norm, ops.rms_norm, (x, weight, 1e-6), dict(cast_first=cast_first))


def _mask(kind, batch, length):
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].repeat(batch, 1, 1, 1)
    if kind == "left padding":
        causal[0, :, :, : length // 2] = False  # its first queries see nothing at all
    return causal if kind != "float" else torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "value_width"), [(4, 8), (2, 8), (1, 8), (4, 6), (2, 6)])
@pytest.mark.parametrize("kind", ["causal", "all", "window", "wide window", "bool", "float", "left padding"])
def test_attention(kind, kv_heads, value_width, dtype):
    length = 7
    q, k = _random(2, 4, length, 8, dtype=dtype), _random(2, kv_heads, length, 8, dtype=dtype, seed=1)
    v = _random(2, kv_heads, length, value_width, dtype=dtype, seed=2)
    mask = _mask(kind, 2, length) if kind in ("bool", "float", "left padding") else None
    mask = mask.to(dtype) if kind == "float" else mask
    options = dict(scale=0.3, is_causal=kind != "all", window={"window": 3, "wide window": 8}.get(kind))
    inputs = (*(t.requires_grad_() for t in (q, k, v)), mask, None)
    y = torch_backend.attention(*inputs, **options)
    assert y.shape == (2, length, 4, value_width) and y.is_contiguous()
    _compare(torch_backend.attention, ops.attention, inputs, options)


E, H, INNER = 4, 16, 8
LAYOUTS = {
    "qwen3": dict(activation="swiglu"),
    "gpt_oss": dict(activation="oai_swiglu", alpha=1.702, limit=1.0, transposed=True, interleaved=True),
    "nemotron_h": dict(activation="relu2"),
    "deepseek_v4": dict(activation="clamped_swiglu", limit=1.0),
    "inkling2": dict(activation="softcapped_swiglu", alpha=2.0, limit=1.0),
}


def _experts_inputs(tokens=9, top_k=2, layout="qwen3", dtype=torch.float32, allowed=range(E)):
    transposed, wide = LAYOUTS[layout].get("transposed", False), INNER if layout == "nemotron_h" else 2 * INNER
    up = _random(E, *((H, wide) if transposed else (wide, H)), dtype=dtype, seed=2) / 4
    down = _random(E, *((INNER, H) if transposed else (H, INNER)), dtype=dtype, seed=3) / 4
    bias = [_random(E, n, dtype=dtype, seed=4) if layout == "gpt_oss" else None for n in (wide, H)]
    scores = torch.rand(tokens, len(allowed), generator=torch.Generator().manual_seed(5))
    index = torch.tensor(list(allowed))[scores.topk(min(top_k, len(allowed)), dim=1).indices]
    weights = torch.rand(index.shape, generator=torch.Generator().manual_seed(6))
    x = _random(tokens, H, dtype=dtype)
    floats = [None if t is None else t.requires_grad_() for t in (x, weights, up, bias[0], down, bias[1])]
    return floats[0], index, *floats[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts(layout, top_k, dtype):
    inputs = _experts_inputs(top_k=top_k, layout=layout, dtype=dtype)
    _compare(torch_backend.experts, ops.experts, inputs, LAYOUTS[layout])


@pytest.mark.parametrize(("tokens", "allowed"), [(0, range(E)), (1, range(E)), (7, [2]), (7, [0, 3]), (31, range(E))])
def test_experts_for_few_tokens_and_unused_experts(tokens, allowed):
    inputs = _experts_inputs(tokens=tokens, allowed=allowed)
    _compare(torch_backend.experts, ops.experts, inputs, LAYOUTS["qwen3"])
    *_, to_up, to_down = _run(torch_backend.experts, inputs, LAYOUTS["qwen3"])
    for e in set(range(E)) - set(allowed):
        assert not to_up[e].any() and not to_down[e].any()


def test_experts_do_not_depend_on_how_equal_experts_are_sorted():
    """The same tokens in another order give the same rows, bitwise."""
    x, index, weights, *rest = _experts_inputs(tokens=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(7))
    y = torch_backend.experts(x, index, weights, *rest, **LAYOUTS["qwen3"])
    assert torch.equal(torch_backend.experts(x[order], index[order], weights[order], *rest, **LAYOUTS["qwen3"]), y[order])


@pytest.mark.parametrize("chunk", [1 << 27, 4 * 33], ids=["one chunk", "four rows a chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("reduction", "bias", "ignored"), itertools.product(["mean", "sum"], [False, True], ["none", "some", "all"])
)
def test_linear_cross_entropy(reduction, bias, ignored, dtype, chunk, monkeypatch):
    """Both ways to it: torch's own where it has one (fp32, eager), and the chunked operation itself."""
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    tokens, vocabulary = 10, 33
    hidden, weight = _random(tokens, H, dtype=dtype), _random(vocabulary, H, dtype=dtype, seed=1)
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    labels[{"none": slice(0, 0), "some": slice(2, 7), "all": slice(None)}[ignored]] = -100
    floats = [t.requires_grad_() for t in (hidden, weight)]
    floats.append(_random(vocabulary, dtype=dtype, seed=3).requires_grad_() if bias else None)

    def chunks(hidden, weight, bias, labels, *, ignore_index=-100, reduction="mean"):
        return chunked._chunked(
            hidden, weight, bias, labels, ignore_index, reduction == "mean", [True, True, bias is not None]
        )[0]

    for kernel in (torch_backend.linear_cross_entropy, chunks):
        # no label that counts: the mean is 0 / 0, the gradients are zeros, as torch's
        _compare(kernel, ops.linear_cross_entropy, (*floats, labels), dict(reduction=reduction), grad_of=0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [{"scale": 0.125}, {"softcap": 3.0}, {"scale": -2.5, "softcap": 4.0}], ids=str)
def test_linear_cross_entropy_of_scaled_and_capped_logits(form, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 4 * 33)
    floats = [_random(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(((10, H), (33, H), (33,)))]
    labels = torch.arange(10).masked_fill(torch.arange(10) % 4 == 1, -100)
    _compare(torch_backend.linear_cross_entropy, ops.linear_cross_entropy, (*floats, labels), form)
    with torch.no_grad():
        found, right = (f(*floats, labels, **form) for f in (torch_backend.linear_cross_entropy, ops.linear_cross_entropy))
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


def test_linear_cross_entropy_in_fp16_with_a_loss_scale():
    """As GradScaler trains: the scale is not beyond fp16, and no small gradient is lost before it is multiplied."""
    hidden, weight = _random(256, H).half().requires_grad_(), (_random(200, H, seed=1) / 4).half().requires_grad_()
    inputs = (hidden, weight, None, torch.arange(256) % 200)
    _compare(torch_backend.linear_cross_entropy, ops.linear_cross_entropy, inputs, {}, grad_of=65536.0)


@pytest.mark.parametrize("chunk", [1 << 27, 4 * 33], ids=["one chunk", "four rows a chunk"])
@pytest.mark.parametrize("trained", [s for s in itertools.product([False, True], repeat=3) if any(s)], ids=str)
def test_linear_cross_entropy_with_frozen_inputs(trained, chunk, monkeypatch):
    """What is frozen gets no gradient, and none is computed or kept for it."""
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    shapes = (10, H), (33, H), (33,)
    inputs = [_random(*s, seed=i).bfloat16().requires_grad_(t) for i, (s, t) in enumerate(zip(shapes, trained, strict=True))]
    _compare(torch_backend.linear_cross_entropy, ops.linear_cross_entropy, (*inputs, torch.arange(10)), {})
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        torch_backend.linear_cross_entropy(*inputs, torch.arange(10))
    assert sorted(n for n in kept if n) == sorted(t.numel() for t in inputs if t.requires_grad)


def test_linear_cross_entropy_never_has_more_logits_than_a_chunk(monkeypatch):
    shapes, linear = [], F.linear
    monkeypatch.setattr(chunked, "CHUNK", 200)
    monkeypatch.setattr(chunked.F, "linear", lambda *args: shapes.append(linear(*args).shape) or linear(*args))
    hidden, weight = _random(10, H).bfloat16().requires_grad_(), _random(50, H).bfloat16()
    torch_backend.linear_cross_entropy(hidden, weight, None, torch.arange(10)).backward()
    assert shapes == [(4, 50), (4, 50), (2, 50)]


def test_linear_cross_entropy_without_gradients():
    hidden, weight, labels = _random(10, H).bfloat16(), _random(33, H, seed=1).bfloat16(), torch.arange(10)
    right = ops.linear_cross_entropy(hidden, weight, None, labels)
    torch.testing.assert_close(torch_backend.linear_cross_entropy(hidden, weight, None, labels), right)
    with torch.no_grad():
        found = torch_backend.linear_cross_entropy(hidden.requires_grad_(), weight, None, labels)
    torch.testing.assert_close(found, right)


def test_linear_cross_entropy_under_autocast():
    hidden, weight = _random(10, H).requires_grad_(), _random(33, H, seed=1).requires_grad_()

    def under_autocast(function):
        def call(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args)

        return call

    inputs = (hidden, weight, None, torch.arange(10))
    found, right = (_run(under_autocast(f), inputs, {}) for f in (torch_backend.linear_cross_entropy, ops.linear_cross_entropy))
    for a, b in zip(found, right):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().max().item())


# --- compiled --------------------------------------------------------------------------------------------------------


def _block(kernels):
    """A small model out of all the kernels: norm, attention, norm, router, experts, loss."""
    norm, attention, experts, loss = kernels

    def block(x, labels, norm_weight, up, down, router, head):
        batch, length, _ = x.shape
        heads = norm(x, norm_weight, 1e-6).view(batch, length, 2, H // 2).transpose(1, 2)
        attended = attention(heads, heads[:, :1], heads[:, :1], None, None, scale=0.3, is_causal=True, window=6)
        x = x + attended.reshape(x.shape)
        flat = norm(x, norm_weight, 1e-6).view(-1, H)
        weights, index = ops.route(flat @ router.T, None, 2, renormalize=True)
        flat = x.view(-1, H) + experts(flat, index, weights, up, None, down, None, activation="swiglu")
        return loss(flat, head, None, labels)

    return block


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_any_number_of_tokens(backend):
    """Forward and backward without a graph break; the second length runs the first one's graph."""
    torch._dynamo.reset()
    names = (ops.rms_norm, ops.attention, ops.experts, ops.linear_cross_entropy)
    reference = _block(names)
    compiled = torch.compile(
        _block([torch_backend.BACKEND.kernels[n].fn for n in names]), fullgraph=True, dynamic=True, backend=backend
    )
    shapes = (H,), (E, 2 * INNER, H), (E, H, INNER), (E, H), (33, H)
    weights = [(_random(*s, seed=10 + i) / 2).requires_grad_() for i, s in enumerate(shapes)]
    for step, (batch, length) in enumerate([(2, 9), (3, 13)]):
        x = _random(batch, length, H, seed=step).requires_grad_()
        labels = torch.randint(33, (batch * length,), generator=torch.Generator().manual_seed(step))
        with torch._dynamo.config.patch(error_on_recompile=step == 1):
            found = compiled(x, labels, *weights)
        right = reference(x, labels, *weights)
        torch.testing.assert_close(found, right)
        for a, b in zip(*(torch.autograd.grad(y, (x, *weights)) for y in (found, right))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
