"""Checks of the te backend's kernels: values and all gradients of each operation's body, in float32 or float64."""

from __future__ import annotations

import torch

from moefx import ops
from moefx.backends import te
from moefx.distributed import aux_loss
from moefx.ops import grouped_mlp as grouped
from moefx.ops.activations import ACTIVATIONS

#: A number rounded to float32 is off by up to this times its size.
ROUNDING = 2.0**-24
#: Of the largest value: bf16 has 8 bits, and intermediate results are rounded to it a few times.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def leaves(given, device, dtype):
    """Copies on ``device``; floating-point tensors in ``dtype`` ask for a gradient."""
    made = [
        t if not isinstance(t, torch.Tensor) else t.to(device, dtype if t.is_floating_point() else t.dtype, copy=True)
        for t in given
    ]
    for t in made:
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    return made


def run(fn, given, **options):
    """Outputs and gradients of all floating-point inputs, for a fixed gradient of each floating-point output."""
    out = fn(*given, **options)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    found = {f"output {i}": o.detach() for i, o in enumerate(out)}
    real = [o for o in out if o.requires_grad]
    torch.autograd.backward(real, [incoming(o) for o in real])
    return found | {f"gradient {i}": t.grad for i, t in enumerate(given) if isinstance(t, torch.Tensor) and t.requires_grad}


def incoming(output):
    """The gradient that an output gets: all different, of both signs, none larger than sin(1)."""
    return torch.linspace(-1, 1, output.numel(), dtype=torch.float64).sin().view(output.shape).to(output)


def compare(found, wanted, dtype, scale=1.0, rounding=None):
    """Within TOLERANCE of the largest value, and ``rounding``: by name what more the terms of a sum explain that cancel in it."""
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        f = found[name]
        if w is None:
            assert f is None, name
            continue
        assert f is not None and f.shape == w.shape, (name, f if f is None else f.shape, w.shape)
        if not w.numel():
            continue
        if not w.is_floating_point():
            assert torch.equal(f.cpu(), w.cpu()), name
            continue
        far, size = float((f.double().cpu() - w.double().cpu()).abs().max()), float(w.abs().max())
        allowed = scale * TOLERANCE[dtype] * max(size, 1e-6) + (rounding or {}).get(name, 0.0)
        assert far <= allowed, f"{name}: {far:.1e} of {size:.1e}, {allowed:.1e} allowed"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- norms -----------------------------------------------------------------------------------------------------------


def check_norm(shape, dtype, device, offset=0.0, residual=False):
    given = [
        normal(*shape).to(dtype),
        *([normal(*shape, seed=1).to(dtype)] if residual else []),
        1 + 0.3 * normal(shape[-1], seed=2).to(dtype),
        1e-6,
    ]
    op, fn = (ops.add_rms_norm, te.add_rms_norm) if residual else (ops.rms_norm, te.rms_norm)
    wanted = run(ops.BODIES[op], leaves(given, "cpu", torch.float32), cast_first=False, offset=offset)
    found = run(fn, leaves(given, device, dtype), cast_first=False, offset=offset)
    assert found["output 0"].dtype == dtype
    compare(found, wanted, dtype)


# --- router ----------------------------------------------------------------------------------------------------------

#: As the models write them: E, K, dtype of the logits and the options of ``moefx.route``.
ROUTERS = {
    "qwen3": (128, 8, torch.bfloat16, {"renormalize": True}),
    "mixtral": (8, 2, torch.float32, {"renormalize": True, "cast": True}),
    "olmoe": (64, 8, torch.float32, {}),
    "gpt_oss fp32": (32, 4, torch.float32, {"topk_first": True, "fp32": False}),
    "granite": (40, 8, torch.bfloat16, {"topk_first": True, "cast": True}),
    "one expert": (16, 1, torch.float32, {"score": "softmax", "routed_scaling_factor": 2.0}),
    "one sigmoid": (16, 1, torch.float32, {"score": "sigmoid", "routed_scaling_factor": 2.5}),
    "deepseek_v2": (64, 6, torch.float32, {"groups": 8, "topk_groups": 6, "group_score": "max", "zero_fill": True, "routed_scaling_factor": 16.0}),
    "deepseek_v3": (
        256, 8, torch.float32,
        {"score": "sigmoid", "bias": True, "gather": True, "groups": 8, "topk_groups": 4, "sorted": False, "renormalize": True, "eps": 1e-20, "routed_scaling_factor": 2.5},
    ),
    "glm4": (128, 8, torch.float32, {"score": "sigmoid", "bias": True, "gather": True, "sorted": False, "renormalize": True, "eps": 1e-20}),
    "many": (256, 24, torch.float32, {"sorted": False, "renormalize": True}),
}  # fmt: skip


def check_router(name, tokens, device):
    experts, top_k, dtype, options = ROUTERS[name]
    options = {"score": "softmax", **options}
    # whole sixteenths, all different within a token, so that no choice hangs on a tie that bf16 made
    order = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens)).argsort(-1)
    logits = ((order - experts / 2) / 16).to(dtype)
    bias = 0.1 * normal(experts, seed=3) if options.pop("bias", False) else None

    def comparable(router):
        """Where the router does not ask for top-k's order: the weights in the order of the experts. Every other one negative, so
        that what comes in differs within a token: of equal gradients nothing is left, the weights sum to a constant."""

        def call(*given):
            weights, index = router(*given, **options)
            if not options.get("sorted", True):
                index, at = index.sort(-1)
                weights = weights.gather(-1, at)
            return weights * (1 - 2 * (torch.arange(top_k, device=weights.device) % 2)), index

        return call

    wanted = run(comparable(ops.BODIES[ops.route]), [*_router_leaves(logits, bias, "cpu"), top_k])
    found = run(comparable(te.route), [*_router_leaves(logits, bias, device), top_k])
    assert wanted.get("gradient 1") is None  # a bias is of the choice only
    assert found["output 0"].dtype == wanted["output 0"].dtype and found["output 1"].dtype == torch.int64
    compare(
        found,
        wanted,
        wanted["output 0"].dtype if dtype != torch.bfloat16 else dtype,
        rounding=_router_rounding(wanted["output 0"]),
    )


def _router_rounding(weights):
    """What rounding to float32 makes of the gradient of the logits: ``w_i * (g_i - sum_k p_k * g_k)``, w the weights, p their
    shares of 1, g what comes in. Where all g_k are alike, or a sigmoid (whose derivative is one more factor) is nearly 1, this is
    small and its error is not: that is of the size of the terms, a rounding for each of the K and some 8 for exponentials, their
    sum and the quotient. On either side."""
    if not weights.numel():
        return None
    terms = 2 * float(weights.abs().max() * incoming(weights).abs().max())
    return {"gradient 0": 2 * (weights.shape[1] + 8) * ROUNDING * terms}


def _router_leaves(logits, bias, device):
    return [None if t is None else t.to(device, copy=True).requires_grad_() for t in (logits, bias)]


def check_aux_loss(layers, tokens, experts, top_k, device):
    logits = [normal(tokens, experts, seed=i) for i in range(layers)]
    wanted = run(lambda *x: aux_loss.load_balancing_loss(x, experts, top_k), leaves(logits, "cpu", torch.float32))
    found = run(lambda *x: te.load_balancing_loss(torch.cat(x), top_k), leaves(logits, device, torch.float32))
    compare(found, wanted, torch.float32)
    compare(
        run(lambda *x: ops.load_balancing_loss(torch.cat(x), top_k), leaves(logits, "cpu", torch.float32)),
        wanted,
        torch.float32,
    )


# --- attention -------------------------------------------------------------------------------------------------------

#: B, S, heads, key/value heads, head size, size of a value, and the options.
ATTENTIONS = {
    "qwen3": (2, 96, 8, 2, 64, 64, {}),
    "not a multiple": (1, 77, 4, 4, 128, 128, {}),
    "short": (3, 5, 4, 1, 64, 64, {}),
    "window": (2, 130, 4, 2, 64, 64, {"window": 48}),
    "window of one": (1, 40, 4, 2, 64, 64, {"window": 1}),
    "sinks": (2, 72, 8, 2, 64, 64, {"sinks": True}),
    "sinks and window": (1, 160, 8, 2, 64, 64, {"sinks": True, "window": 32}),
    "deepseek_v3": (1, 64, 4, 4, 192, 128, {}),
    "not causal": (2, 33, 4, 2, 64, 64, {"is_causal": False}),
}


def attention_arguments(name):
    batch, length, heads, groups, size, value_size, options = ATTENTIONS[name]
    options = dict(options)
    q, k, v = (
        normal(batch, heads, length, size),
        normal(batch, groups, length, size, seed=1),
        normal(batch, groups, length, value_size, seed=2),
    )
    sinks = normal(heads, seed=3) if options.pop("sinks", False) else None
    given = [t if t is None else t.bfloat16() for t in (q, k, v, None, sinks)]
    return given, {"scale": size**-0.5, "is_causal": True, **options}


def check_attention(name, device):
    given, options = attention_arguments(name)
    wanted = run(ops.BODIES[ops.attention], leaves(given, "cpu", torch.float32), **options)
    found = run(te.attention, leaves(given, device, torch.bfloat16), **options)
    assert found["output 0"].is_contiguous()
    compare(found, wanted, torch.bfloat16, rounding=_attention_rounding(given, options["scale"]))


def _attention_rounding(given, scale):
    """What rounding to float32 makes of the gradients of q and k where these are nearly or, with one key a query, wholly 0. The
    gradient of a score is ``p * (g . v - g . out)``, g what comes in: with one key out is v and two equal sums remain, each off
    by up to a rounding for each of its terms. Then it is multiplied by scale and k; or by scale and q, added over a group's heads.
    """
    q, k, v = (t.float() for t in given[:3])
    score = 2 * v.shape[-1] * ROUNDING * float(v.abs().sum(-1).max())  # no g is larger than 1
    heads = q.shape[1] // k.shape[1]
    return {"gradient 0": score * scale * float(k.abs().max()), "gradient 1": score * scale * float(q.abs().max()) * heads}


# --- experts ---------------------------------------------------------------------------------------------------------


def expert_arguments(
    tokens,
    experts=8,
    top_k=3,
    hidden=64,
    size=48,
    *,
    activation,
    biased=False,
    transposed=False,
    clamped=False,
    routing="random",
):
    """x, index, weights, up, gate_up_bias, down, down_bias: normally distributed.

    ``clamped``: for an activation with a limit. A pre-activation beside the limit that bf16 rounds to its other side gets the
    gradient 0, or one instead of 0. That is no rounding of the result, and every few thousand there is one: 2 of 10,656 made the
    largest error 8 % of the largest gradient. So bf16 must hold them exactly: x is -1, 0 or 1, up and its bias are sixteenths.
    """
    g = torch.Generator().manual_seed(tokens)
    wide = size * (2 if ACTIVATIONS[activation].gated else 1)
    x, up, down = (
        normal(tokens, hidden, seed=5),
        0.3 * normal(experts, wide, hidden, seed=1),
        0.3 * normal(experts, hidden, size, seed=2),
    )
    gate_up_bias, down_bias = normal(experts, wide, seed=3), normal(experts, hidden, seed=4)
    if clamped:
        x, up, gate_up_bias = x.round().clamp(-1, 1), (16 * up).round() / 16, (16 * gate_up_bias).round() / 16
        products = torch.einsum("th,ewh->tew", x, up)
        assert all(bool((h.abs() <= 16).all()) for h in (products, products + gate_up_bias)), "more than 8 bits"
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    if routing == "random":
        index = torch.rand(tokens, experts, generator=g).topk(top_k).indices
    else:  # all tokens on the same experts, the others get none
        index = torch.arange(experts - 1, experts - 1 - top_k, -1).expand(tokens, top_k)
    biases = (gate_up_bias, down_bias) if biased else (None, None)
    return [x, index, normal(tokens, top_k, seed=6).abs(), up, biases[0], down, biases[1]]


EXPERTS = {
    "swiglu": {"activation": "swiglu"},
    "gpt_oss": {
        "activation": "oai_swiglu",
        "alpha": 1.7,
        "limit": 0.6,
        "biased": True,
        "transposed": True,
        "interleaved": True,
    },
    "relu2": {"activation": "relu2", "biased": True},
}


def check_permutation(tokens, top_k, dtype, device):
    """Permute and unpermute around nothing: ``sum_k weights[t, k] * scale[expert] * x[t]``."""
    from moefx.kernels.te import permute

    x, weights, scale = normal(tokens, 32).to(dtype), normal(tokens, top_k, seed=1), normal(7, seed=2).to(dtype)
    index = torch.rand(tokens, 7, generator=torch.Generator().manual_seed(tokens)).topk(top_k).indices

    def kernel(x, weights, scale):
        rows, where = permute.te_permute(x, index.to(device, torch.int32))
        expert = index.reshape(-1).sort(stable=True).values.to(device)
        return permute.te_unpermute(rows * scale[expert].unsqueeze(-1), where, weights)

    def body(x, weights, scale):
        return (weights * scale[index]).sum(1, keepdim=True) * x

    def given(device, dtype):
        x_, scale_ = leaves([x, scale], device, dtype)
        return [x_, *leaves([weights], device, torch.float32), scale_]

    compare(run(kernel, given(device, dtype)), run(body, given("cpu", torch.float32)), dtype, 2.0)


def _experts(name, tokens, **more):
    """The options of the activation, and :func:`expert_arguments`."""
    options = dict(EXPERTS[name])
    made = {
        "biased": options.pop("biased", False),
        "transposed": options.get("transposed", False),
        "clamped": "limit" in options,
    }
    return options, expert_arguments(tokens, activation=options["activation"], **made, **more)


def _in(dtype, given):
    return [t if t is None or not t.is_floating_point() else t.to(dtype) for t in given]


def check_experts(name, tokens, routing, device):
    options, given = _experts(name, tokens, routing=routing)
    given = _in(torch.bfloat16, given)
    wanted = run(ops.BODIES[ops.experts], leaves(given, "cpu", torch.float32), **options)
    found = run(te.experts, leaves(given, device, torch.bfloat16), **options)
    compare(found, wanted, torch.bfloat16, 1.5)


def check_grouped_mlp(name, counts, dtype, device, grad_scale=1.0):
    options, (rows, _, _, *weights) = _experts(name, sum(counts), experts=len(counts), top_k=1)
    options["grad_scale"] = grad_scale
    given = _in(dtype, [rows, torch.tensor(counts), *weights])

    def weighted(fn):
        return lambda *given, **options: fn(*given[:-1], **options, permuted_probs=given[-1])

    for permuted_probs in (None, normal(sum(counts), seed=9)):
        wanted = run(weighted(grouped.grouped_mlp), leaves([*given, permuted_probs], "cpu", torch.float32), **options)
        found = run(
            weighted(te.grouped_mlp),
            [*leaves(given, device, dtype), *leaves([permuted_probs], device, torch.float32)],
            **options,
        )
        compare(found, wanted, dtype, 1.5)


# --- fp8 -------------------------------------------------------------------------------------------------------------


def check_fp8_linear(recipe, shape, out, biased, device):
    """Output and gradients within what 8 bits explain: 2**-4 and 2**-3 relative a factor, averaged over a product; not nearer
    than bf16 would be, so that it is known that FP8 ran."""
    given = [normal(*shape), normal(out, shape[-1], seed=1), normal(out, seed=2) if biased else None]
    given = [t if t is None else t.bfloat16() for t in given]
    wanted = run(torch.nn.functional.linear, leaves(given, "cpu", torch.float32))
    found = run(lambda *x: torch.ops.moefx.te_fp8_linear(*x, recipe), leaves(given, device, torch.bfloat16))
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        f = found[name]
        assert f.shape == w.shape and f.dtype == torch.bfloat16
        if not w.numel() or not w.any():
            assert not f.any()
            continue
        far = float((f.cpu().float() - w).norm() / w.norm())
        assert far < 0.08, (name, far)
        assert name == "gradient 2" or far > 0.01, (name, far)


def check_fp8_linear_leaves_out_what_nobody_asked_for(recipe, device):
    """Each of input, weight and bias alone needs a gradient: the others get none, and its own is the one of all three."""
    given = [t.bfloat16() for t in (normal(4, 128), normal(256, 128, seed=1), normal(256, seed=2))]

    def linear(*given):
        return torch.ops.moefx.te_fp8_linear(*given, recipe)

    wanted = run(linear, leaves(given, device, torch.bfloat16))
    for alone in range(3):
        some = leaves(given, device, torch.bfloat16)
        for i, t in enumerate(some):
            t.requires_grad_(i == alone)
        found = run(linear, some)
        assert found.keys() == {"output 0", f"gradient {alone}"}
        compare(found, {name: wanted[name].cpu() for name in found}, torch.bfloat16)


# --- all of them -----------------------------------------------------------------------------------------------------


def calls(op, device):
    """Calls of the operations that are the kernel of ``op``, for torch.library.opcheck: (name, arguments)."""

    def leaf(*shape, seed=0, dtype=torch.float32):
        return normal(*shape, seed=seed).to(device, dtype).requires_grad_()

    x, weight = leaf(6, 96), leaf(96, seed=1)
    index = torch.tensor([[0, 1], [2, 1], [0, 3], [1, 2], [2, 3], [3, 0]], dtype=torch.int32, device=device)
    half = torch.bfloat16
    return {
        ops.rms_norm: [("te_rms_norm", (x, weight, 1e-6, False))],
        (torch.ops.aten.linear.default, "fp8_current"): [
            ("te_fp8_linear", (leaf(6, 96, dtype=half), leaf(48, 96, seed=2, dtype=half), None, "current"))
        ],
        (torch.ops.aten.linear.default, "fp8_block"): [],  # the same operation, which few GPUs run by this recipe
        ops.add_rms_norm: [("te_add_rms_norm", (x, leaf(6, 96, seed=3), weight, 1e-6, True))],
        ops.route: [("te_route", (leaf(6, 32), leaf(32, seed=1), 4, "sigmoid", False, 4, 2, 2.0))],
        ops.load_balancing_loss: [("te_load_balancing_loss", (leaf(6, 32), 3))],
        ops.attention: [
            ("te_attention", (*(leaf(2, 5, 4, 64, seed=i, dtype=half) for i in range(3)), leaf(4, seed=3), 0.3, True, 3))
        ],
        ops.experts: [
            ("te_permute", (x, index)),
            ("te_unpermute", (leaf(12, 96), torch.arange(12, dtype=torch.int32, device=device), leaf(6, 2, seed=1))),
        ],
        torch.ops.moefx.grouped_mlp.default: [
            (
                "te_grouped_mlp",
                (
                    leaf(6, 96, dtype=half),
                    torch.tensor([4, 0, 2], device=device),
                    leaf(3, 32, 96, dtype=half),
                    None,
                    leaf(3, 96, 16, dtype=half),
                    None,
                    *[None] * 4,
                    leaf(6, seed=4),
                    None,
                    None,
                    None,
                    "swiglu",
                    0.0,
                    0.0,
                    False,
                    False,
                    1.0,
                ),
            )
        ],
    }[op]
