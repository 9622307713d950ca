"""The fused experts against the operation's own body in float64: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import grouped, ops  # noqa: E402
from moefx.activations import ACTIVATIONS  # noqa: E402
from moefx.backends import triton as backend  # noqa: E402
from moefx.kernels import experts  # noqa: E402

EXPERTS, GROUPED_MLP = (backend.BACKEND.kernels[op].fn for op in (ops.experts, grouped.grouped_mlp))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of the largest value. bf16: the pre-activations, the activations and the rows are rounded once each, 8 bits apiece.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def make(tokens, experts=5, top_k=2, hidden=24, size=40, *, activation="swiglu", biased=False, transposed=False, dtype=torch.float32,
         routing="random", seed=0):  # fmt: skip
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
        far, size = float((f.double().cpu() - w.cpu()).abs().max()) if w.numel() else 0.0, float(w.abs().max()) if w.numel() else 1.0
        assert far <= TOLERANCE[dtype] * max(size, 1e-30) + 1e-12, f"{name}: {far:.1e} of {size:.1e}"


def check(given, dtype, **options):
    wanted = run(ops.BODIES[ops.experts], given, torch.float64, options, "cpu")
    compare(run(EXPERTS, given, dtype, options, DEVICE), wanted, dtype)


def test_all_activations_are_known():
    assert experts.KNOWN == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(make(7, activation=activation), torch.float32, activation=activation, alpha=1.7, limit=0.6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("biased,transposed,interleaved", [(True, True, True), (True, False, False), (False, True, False)])
def test_layouts(biased, transposed, interleaved, dtype):
    given = make(9, activation="oai_swiglu", biased=biased, transposed=transposed, dtype=dtype, seed=1)
    check(given, dtype, activation="oai_swiglu", alpha=1.7, limit=0.6, transposed=transposed, interleaved=interleaved)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_biased_without_gate_and_with(activation):
    check(make(6, activation=activation, biased=True), torch.float32, activation=activation)


@pytest.mark.parametrize("tokens,experts,top_k,routing", [
    (1, 5, 1, "random"), (1, 8, 8, "random"), (33, 3, 2, "skewed"), (50, 17, 4, "random"), (0, 4, 2, "random"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_routings(tokens, experts, top_k, routing, dtype):
    """One token, all experts, all tokens on the same ones, numbers that divide nothing, no token at all."""
    check(make(tokens, experts, top_k, routing=routing, dtype=dtype, seed=2), dtype, activation="swiglu")


def test_sizes_that_divide_no_block():
    check(make(5, hidden=67, size=131), torch.float32, activation="geglu_tanh")


def test_many_blocks_of_the_counting_sort():
    """More flat positions than one block has, more blocks than one step of the scan."""
    from moefx.kernels import permute

    index = torch.rand(700, 300, generator=torch.Generator().manual_seed(3)).topk(3).indices.to(DEVICE)
    order, inverse, bounds = (t.cpu().long() for t in permute.sort_by_expert(index, 300))
    flat = index.reshape(-1).cpu()
    wanted = torch.argsort(flat, stable=True)
    assert torch.equal(order, wanted) and torch.equal(inverse[wanted], torch.arange(len(flat)))
    assert bounds[0] == 0 and torch.equal(bounds[1:], torch.bincount(flat, minlength=300).cumsum(0))


def test_frozen_experts_get_no_gradient():
    given = [None if t is None else t.to(DEVICE, torch.float32 if t.dtype.is_floating_point else t.dtype) for t in make(6, biased=True)]
    wanted = run(EXPERTS, given, torch.float32, {"activation": "swiglu"}, DEVICE)
    given[0].requires_grad_()
    out = EXPERTS(*given, activation="swiglu")
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    (out * weight).sum().backward()
    assert torch.equal(given[0].grad, wanted["gradient 0"]) and all(t.grad is None for t in given[2:])


@pytest.mark.parametrize("biased,transposed", [(False, False), (True, True)])
def test_a_ranks_experts(biased, transposed):
    """moefx.grouped_mlp: rows that lie expert by expert, one expert without any; gradients scaled."""
    x, _, _, *weights = make(11, experts=4, biased=biased, transposed=transposed)
    counts = torch.tensor([5, 0, 4, 2])
    options = {"activation": "swiglu", "transposed": transposed, "grad_scale": 0.25}

    def ours(rows, up, up_bias, down, down_bias, **options):
        return GROUPED_MLP(rows, counts.to(rows.device), up, up_bias, down, down_bias, **options)

    def theirs(rows, up, up_bias, down, down_bias, **options):
        return grouped.grouped_mlp(rows, counts, up, up_bias, down, down_bias, **options)

    wanted = run(theirs, [x, *weights], torch.float64, options, "cpu")
    compare(run(ours, [x, *weights], torch.float32, options, DEVICE), wanted, torch.float32)


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
