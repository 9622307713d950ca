"""The fused experts against the operation's own body in float64: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

pytest.importorskip("triton", reason="Triton is not installed")

import moefx
from moefx import ops
from moefx.backends import Backend, Kernel
from moefx.backends import torch as torch_backend
from moefx.backends import triton as backend
from moefx.errors import MoefxError
from moefx.kernels import experts
from moefx.ops import grouped_mlp as grouped
from moefx.ops import grouped_mm
from moefx.ops.activations import ACTIVATIONS
from moefx.passes import RecomputeExperts, default
from tests.support import grouped_checks
from tests.support.families import batch, build

EXPERTS, GROUPED_MLP = (backend.BACKEND.kernel(op).fn for op in (ops.experts, grouped.grouped_mlp))
RECOMPUTE, RECOMPUTE_MLP = (backend.BACKEND.kernel(op, "recompute").fn for op in (ops.experts, grouped.grouped_mlp))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of the largest value. bf16: the pre-activations, the activations and the rows are rounded once each, 8 bits apiece.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def make(
    tokens,
    experts=5,
    top_k=2,
    hidden=24,
    size=40,
    *,
    activation="swiglu",
    biased=False,
    transposed=False,
    dtype=torch.float32,
    routing="random",
    seed=0,
):
    """Arguments of ``moefx.experts``, in float64 numbers that ``dtype`` can hold."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=g) * 0.5).to(dtype).double()

    wide = size * (2 if ACTIVATIONS[activation].gated else 1)
    up, down = normal(experts, wide, hidden), normal(experts, hidden, size)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    if routing == "random":
        index = torch.rand(tokens, experts, generator=g).topk(top_k).indices
    elif routing == "skewed":  # all tokens on the same experts, the others get none
        index = torch.arange(experts - 1, experts - 1 - top_k, -1).expand(tokens, top_k)
    biases = (normal(experts, wide), normal(experts, hidden)) if biased else (None, None)
    return [normal(tokens, hidden), index, normal(tokens, top_k).abs(), up, biases[0], down, biases[1]]


def run(fn, given, dtype, options, device):
    leaves = [None if t is None else t.to(device, dtype if t.dtype.is_floating_point else t.dtype, copy=True) for t in given]
    for t in leaves:
        if t is not None and t.dtype.is_floating_point:
            t.requires_grad_()
    out = fn(*leaves, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    (out * weight).sum().backward()
    return {"out": out.detach()} | {f"gradient {i}": t.grad for i, t in enumerate(leaves) if t is not None and t.requires_grad}


def compare(found, wanted, dtype):
    for name, w in wanted.items():
        f = found[name]
        assert f is not None and f.shape == w.shape and f.dtype == dtype, name
        far, size = (
            float((f.double().cpu() - w.cpu()).abs().max()) if w.numel() else 0.0,
            float(w.abs().max()) if w.numel() else 1.0,
        )
        assert far <= TOLERANCE[dtype] * max(size, 1e-30) + 1e-12, f"{name}: {far:.1e} of {size:.1e}"


def check(given, dtype, **options):
    wanted = run(ops.BODIES[ops.experts], given, torch.float64, options, "cpu")
    compare(run(EXPERTS, given, dtype, options, DEVICE), wanted, dtype)


def test_all_activations_are_known():
    assert set(ACTIVATIONS) == experts.KNOWN


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(make(7, activation=activation), torch.float32, activation=activation, alpha=1.7, limit=0.6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("biased", "transposed", "interleaved"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_layouts(biased, transposed, interleaved, dtype):
    given = make(9, activation="oai_swiglu", biased=biased, transposed=transposed, dtype=dtype, seed=1)
    check(given, dtype, activation="oai_swiglu", alpha=1.7, limit=0.6, transposed=transposed, interleaved=interleaved)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_biased_without_gate_and_with(activation):
    check(make(6, activation=activation, biased=True), torch.float32, activation=activation)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "routing"), [
    (1, 5, 1, "random"), (1, 8, 8, "random"), (33, 3, 2, "skewed"), (50, 17, 4, "random"), (0, 4, 2, "random"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_routings(tokens, experts, top_k, routing, dtype):
    """One token, all experts, all tokens on the same ones, numbers that divide nothing, no token at all."""
    check(make(tokens, experts, top_k, routing=routing, dtype=dtype, seed=2), dtype, activation="swiglu")


def looped(x, index, weights, up, _, down, __, activation, transposed=False):
    """Expert by expert, as LongCat-Flash does it; what is not in ``down`` adds nothing."""
    up, down = (w if transposed else w.transpose(1, 2) for w in (up, down))
    y = x * 0
    for e in range(len(down)):
        token, k = torch.where(index == e)
        a = ACTIVATIONS[activation].forward(x[token] @ up[e], 0.0, 0.0, False)
        y = y.index_add(0, token, (a @ down[e]) * weights[token, k, None])
    return y


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "fn", [ops.BODIES[ops.experts], torch_backend.experts, EXPERTS, RECOMPUTE],
    ids=["body", "torch", "triton", "again"],
)  # fmt: skip
@pytest.mark.parametrize(("tokens", "computing", "transposed"), [(1, 3, False), (40, 3, True), (33, 5, False), (9, 1, False)])
def test_zero_computation_experts_add_nothing(fn, tokens, computing, transposed, dtype, monkeypatch):
    """Some of eight experts compute nothing: of 40 tokens about three in five choices, with one expert seven in eight. What
    products leave in rows of zero-computation experts, undefined on a device, is NaN here."""
    plain = grouped_mm.grouped_gemm

    def poisoned(x, weight, offsets):
        out = plain(x, weight, offsets)
        return torch.where((torch.arange(len(out), device=out.device) < offsets[-1]).unsqueeze(1), out, torch.nan)

    for module in (grouped_mm, experts.grouped_gemm):
        monkeypatch.setattr(module, "grouped_gemm", poisoned)
    given = make(tokens, 8, 3, dtype=dtype, transposed=transposed, seed=computing)
    given[5] = given[5][:computing].contiguous()
    options = {"activation": "swiglu", "transposed": transposed}
    wanted = run(looped, given, torch.float64, options, "cpu")
    found = run(fn, given, dtype, options, DEVICE)
    compare(found, wanted, dtype)
    uncomputed = given[1] >= computing
    assert uncomputed.any() and not found["gradient 2"].cpu()[uncomputed].any()
    assert not found["gradient 3"][computing:].any()  # up's matrices of experts that compute nothing


def test_sizes_that_divide_no_block():
    check(make(5, hidden=67, size=131), torch.float32, activation="geglu_tanh")


def test_many_blocks_of_the_counting_sort():
    """More flat positions than one block has, more blocks than one step of the scan."""
    from moefx.kernels import counting_sort

    index = torch.rand(700, 300, generator=torch.Generator().manual_seed(3)).topk(3).indices.to(DEVICE)
    order, inverse, bounds = (t.cpu().long() for t in counting_sort.sort_by_expert(index, 300))
    flat = index.reshape(-1).cpu()
    wanted = torch.argsort(flat, stable=True)
    assert torch.equal(order, wanted) and torch.equal(inverse[wanted], torch.arange(len(flat)))
    assert bounds[0] == 0 and torch.equal(bounds[1:], torch.bincount(flat, minlength=300).cumsum(0))


@pytest.mark.parametrize("counts", [[1500, 0, 37, 7], [0, 0, 0, 2000]], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_sums_of_experts_with_many_rows(weighted, counts):
    """In several parts; in the rows' order, whatever the weights' is."""
    from moefx.kernels.expert_activation import segment_sum

    g = torch.Generator().manual_seed(4)
    rows = sum(counts)
    x, weights, order = (
        torch.randn(rows, 70, generator=g),
        torch.randn(rows // 4, 4, generator=g),
        torch.randperm(rows, generator=g),
    )
    offsets = torch.tensor(counts).cumsum(0)
    scaled = x.double() * (weights.flatten()[order].double().unsqueeze(1) if weighted else 1)
    wanted = torch.stack([part.sum(0) for part in scaled.split(counts)])
    given = (weights.to(DEVICE), order.int().to(DEVICE)) if weighted else ()
    found, again = (segment_sum(x.to(DEVICE), offsets.int().to(DEVICE), torch.float32, *given) for _ in range(2))
    assert torch.equal(found, again) and found.shape == wanted.shape
    assert float((found.cpu() - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def test_frozen_experts_get_no_gradient():
    given = [
        None if t is None else t.to(DEVICE, torch.float32 if t.dtype.is_floating_point else t.dtype)
        for t in make(6, biased=True)
    ]
    wanted = run(EXPERTS, given, torch.float32, {"activation": "swiglu"}, DEVICE)
    given[0].requires_grad_()
    out = EXPERTS(*given, activation="swiglu")
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    (out * weight).sum().backward()
    assert torch.equal(given[0].grad, wanted["gradient 0"]) and all(t.grad is None for t in given[2:])


@pytest.mark.parametrize(("biased", "transposed"), [(False, False), (True, True)])
def test_a_ranks_experts(biased, transposed):
    """moefx.grouped_mlp: rows that lie expert by expert, one expert without any; gradients scaled."""
    x, _, _, *weights = make(11, experts=4, biased=biased, transposed=transposed)
    counts = torch.tensor([5, 0, 4, 2])
    options = {"activation": "swiglu", "transposed": transposed, "grad_scale": 0.25}

    def ours(rows, up, gate_up_bias, down, down_bias, **options):
        return GROUPED_MLP(rows, counts.to(rows.device), up, gate_up_bias, down, down_bias, **options)

    def theirs(rows, up, gate_up_bias, down, down_bias, **options):
        return grouped.grouped_mlp(rows, counts, up, gate_up_bias, down, down_bias, **options)

    wanted = run(theirs, [x, *weights], torch.float64, options, "cpu")
    compare(run(ours, [x, *weights], torch.float32, options, DEVICE), wanted, torch.float32)


def weighted_rows(fn, given, counts, dtype, device, **options):
    """Outputs and gradients of a rank's experts [rows, permuted_probs, *weights]; the weights of rows stay in float32 (float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [
        None if t is None else t.to(device, wide if i == 1 else dtype, copy=True).requires_grad_() for i, t in enumerate(given)
    ]
    rows, permuted_probs, *weights = leaves
    out = fn(rows, counts.to(device), *weights, **options, permuted_probs=permuted_probs)
    asked = [t for t in leaves if t is not None]
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return out.detach(), *torch.autograd.grad(out, asked, grad)


@pytest.mark.parametrize("counts", [[5, 0, 4, 2], [0, 0, 0, 0], [0, 0, 1, 0], [11, 0, 0, 0]], ids=str)
@pytest.mark.parametrize(
    ("activation", "biased", "transposed"), [("swiglu", False, False), ("oai_swiglu", True, True), ("relu2", True, False)]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_ranks_experts_weight_their_rows(dtype, activation, biased, transposed, counts):
    """Against a plain formula in float64 that autograd differentiates, the gradient of the rows' weights included."""
    x, _, _, *weights = make(sum(counts), experts=4, activation=activation, biased=biased, transposed=transposed, dtype=dtype)
    counts = torch.tensor(counts)
    permuted_probs = torch.randn(len(x), generator=torch.Generator().manual_seed(5)).double()

    def formula(rows, counts, up, gate_up_bias, down, down_bias, *, permuted_probs, activation, transposed, **_):
        expert = torch.arange(4).repeat_interleave(counts)
        up, down = (w if transposed else w.transpose(1, 2) for w in (up, down))
        h = torch.einsum("rh,rhi->ri", rows, up[expert]) + (0 if gate_up_bias is None else gate_up_bias[expert])
        a = ACTIVATIONS[activation].forward(h, 1.7, 0.6, False)
        out = torch.einsum("ri,rih->rh", a, down[expert]) + (0 if down_bias is None else down_bias[expert])
        return out * permuted_probs.unsqueeze(1)

    options = {"activation": activation, "transposed": transposed, "alpha": 1.7, "limit": 0.6}
    given = [x, permuted_probs, *weights]
    wanted = weighted_rows(formula, given, counts, torch.float64, "cpu", **options)
    found = weighted_rows(GROUPED_MLP, given, counts, dtype, DEVICE, **options)
    for f, w in zip(found, wanted):
        assert f.shape == w.shape
        far, size = (float(t.abs().max()) if t.numel() else 0.0 for t in (f.double().cpu() - w, w))
        assert far <= TOLERANCE[dtype] * size + 1e-12, f"{far:.1e} of {size:.1e}"
    assert found[0].dtype == dtype and found[2].dtype == torch.float32


@pytest.mark.parametrize("biased", [False, True])
def test_rows_after_the_last_experts_mean_nothing(biased):
    """A dispatch with a capacity gives more rows than counts: NaN there, in rows, weights and gradients, reaches nobody."""
    x, _, _, *weights = make(11, experts=4, biased=biased)
    counts, permuted_probs = (
        torch.tensor([5, 0, 4, 2], device=DEVICE),
        torch.randn(11, generator=torch.Generator().manual_seed(5)),
    )
    leaves = [t if t is None else t.to(DEVICE, torch.float32).requires_grad_() for t in (x, permuted_probs, *weights)]
    grad = torch.linspace(-1, 1, x.numel(), device=DEVICE).view(x.shape)

    def results(pad):
        rows, scores, to_out = (torch.cat((t, t.new_full((pad, *t.shape[1:]), float("nan")))) for t in (*leaves[:2], grad))
        out = GROUPED_MLP(rows, counts, *leaves[2:], activation="swiglu", permuted_probs=scores)
        return out[:11], *torch.autograd.grad(out, [t for t in leaves if t is not None], to_out)

    for found, wanted in zip(results(70), results(0)):
        assert torch.equal(found, wanted)


def rank_inputs(asked="all"):
    """rows, permuted_probs, up, gate_up_bias, down, down_bias of a rank's experts in float32, its counts, and those that ask for a gradient."""
    x, _, _, *weights = make(11, experts=4, biased=True)
    given = [x, torch.randn(11, generator=torch.Generator().manual_seed(5)), *weights]
    given = [t.to(DEVICE, torch.float32, copy=True).requires_grad_(asked in ("all", i)) for i, t in enumerate(given)]
    return given, torch.tensor([5, 0, 4, 2], device=DEVICE), [t for t in given if t.requires_grad]


def rank_experts(rows, permuted_probs, up, gate_up_bias, down, down_bias, counts):
    return GROUPED_MLP(
        rows, counts, up, gate_up_bias, down, down_bias, activation="swiglu", grad_scale=0.5, permuted_probs=permuted_probs
    )


@pytest.mark.parametrize("alone", range(6))
def test_a_gradient_that_is_asked_for_alone(alone):
    given, counts, leaves = rank_inputs()
    out = rank_experts(*given, counts)
    grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    wanted = torch.autograd.grad(out, leaves, grad)[alone]
    given, counts, leaves = rank_inputs(alone)
    rank_experts(*given, counts).backward(grad)
    assert torch.equal(given[alone].grad, wanted) and all(t.grad is None for i, t in enumerate(given) if i != alone)


@pytest.mark.parametrize("which", ["compiled", "checkpointed", "autocast"])
def test_a_ranks_experts_within(which):
    """The operations are opaque: whatever runs them gets the bits that plain calls get, forward and backward."""

    def twice(*given):
        return rank_experts(rank_experts(*given), *given[1:]).sin()

    given, counts, leaves = rank_inputs()
    wanted = twice(*given, counts)
    if which == "compiled":
        found = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")(*given, counts)
    elif which == "checkpointed":
        found = torch.utils.checkpoint.checkpoint(twice, *given, counts, use_reentrant=False)
    else:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = twice(*given, counts)
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (found, wanted))))


def test_a_ranks_experts_are_differentiated_once():
    given, counts, leaves = rank_inputs()
    with pytest.raises(MoefxError, match=r"moefx::fused_grouped_mlp is to be differentiated \(create_graph=True\)"):
        torch.autograd.grad(rank_experts(*given, counts).square().sum(), leaves, create_graph=True)


@pytest.mark.parametrize("case", grouped_checks.CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_ranks_experts_make_their_rows_again(case, dtype):
    grouped_checks.check_rows_are_made_again(GROUPED_MLP, *case, dtype, DEVICE)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["fused_experts", "fused_grouped_mlp"])
def test_fakes_are_the_operations_shapes_and_dtypes(name, keep):
    """torch's own check of schema, fake and dynamic shapes; how the gradient is registered is not custom_op's way."""
    x, index, scores, up, _, down, _ = (
        t if t is None else t.to(DEVICE, torch.float32 if t.is_floating_point() else t.dtype) for t in make(6)
    )
    rows, counts = x[:5], torch.tensor([2, 0, 1, 0, 2], device=DEVICE)
    options = "swiglu", 0.0, 0.0, False, False
    given = {
        "fused_experts": (x, index, scores, up, None, down, None, *[None] * 4, *options, "torch", keep),
        "fused_grouped_mlp": (
            rows,
            counts,
            up,
            None,
            down,
            None,
            *[None] * 4,
            scores[:5, 0].contiguous(),
            None,
            None,
            None,
            *options,
            1.0,
            "torch",
            keep,
        ),
    }[name]
    given = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(getattr(torch.ops.moefx, name).default, given, test_utils=checks)


def kept_for(fn):
    """What ``fn()`` gives, and how many numbers were kept for its backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = fn()
    return found, sum(t.numel() for t in kept)


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("options", [
    {"activation": "swiglu"}, {"activation": "relu2"},
    {"activation": "oai_swiglu", "alpha": 1.7, "limit": 0.6, "transposed": True, "interleaved": True},
], ids=lambda o: o["activation"])  # fmt: skip
def test_pre_activations_made_again_are_the_same(tokens, options):
    layout = {"transposed": "transposed" in options, "biased": "transposed" in options}
    given, found = make(tokens, activation=options["activation"], **layout), []
    for fn in (EXPERTS, RECOMPUTE):
        found.append(run(fn, given, torch.float32, options, DEVICE))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.parametrize("case", grouped_checks.CASES, ids=str)
def test_a_ranks_experts_make_pre_activations_again_of_what_arrived(case):
    grouped_checks.check_rows_are_made_again(RECOMPUTE_MLP, *case, torch.float32, DEVICE, GROUPED_MLP)


def test_the_pass_leaves_out_pre_activations_and_nothing_else():
    of_experts = ops.experts, grouped.grouped_mlp, (ops.experts, "recompute"), (grouped.grouped_mlp, "recompute")
    kernels = {key: Kernel(backend.BACKEND.kernels[key].fn) for key in of_experts}
    given, found = {k: v.to(DEVICE) for k, v in batch(2, 9).items()}, []
    for pipeline in (default(), default().after("lower", RecomputeExperts())):
        model = build("qwen3_moe").to(DEVICE)
        moefx.optimize(model, pipeline=pipeline, compile=False, backends=[Backend("fused", kernels), "torch"])
        loss, kept = kept_for(lambda model=model: model(**given, use_cache=False).loss)
        loss.backward()
        found.append([kept, loss.detach(), *(p.grad for p in model.parameters())])
    report, config = moefx.report(model)["recompute_experts"], model.config
    assert report.made_count == config.num_hidden_layers and not report.missed
    numbers = 2 * 9 * config.num_experts_per_tok * 2 * config.moe_intermediate_size
    assert found[0][0] - found[1][0] == config.num_hidden_layers * numbers
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_other_kernels_keep_what_they_keep():
    model = moefx.optimize(
        build("qwen3_moe"), pipeline=default().after("lower", RecomputeExperts()), compile=False, backends=["torch"]
    )
    missed = {c.what for c in moefx.report(model)["recompute_experts"].missed}
    assert missed == {"moefx.experts by torch has no variant 'recompute': quack, triton have one"}


def test_two_runs_are_bitwise_equal():
    given = make(40, experts=3, routing="skewed")
    first, second = (run(EXPERTS, given, torch.float32, {"activation": "swiglu"}, DEVICE) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_compiled_without_a_graph_break():
    given = [t.float().to(DEVICE) if t is not None and t.dtype.is_floating_point else t for t in make(6)]
    given[1] = given[1].to(DEVICE)
    for i in (0, 2, 3, 5):
        given[i].requires_grad_()
    wanted = EXPERTS(*given, activation="swiglu")
    found = torch.compile(EXPERTS, fullgraph=True, backend="aot_eager")(*given, activation="swiglu")
    assert torch.equal(found, wanted)
    grads = [torch.autograd.grad(o.sum(), [given[i] for i in (0, 2, 3, 5)]) for o in (wanted, found)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
