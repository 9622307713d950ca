"""The experts around QuACK's grouped GEMM against the operation's own body in float64, on a Hopper GPU with quack-kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import ops
from moefx.backends import quack as backend
from moefx.kernels import linear_cross_entropy as chunked
from moefx.ops import grouped_mlp as grouped
from tests.kernels.test_experts import compare, make, run
from tests.support import grouped_checks

problem = backend.BACKEND.available() if torch.cuda.is_available() else "no CUDA device"
pytestmark = pytest.mark.skipif(problem is not None, reason=str(problem))
EXPERTS, GROUPED_MLP, HEAD = (
    backend.BACKEND.kernels[op].fn for op in (ops.experts, grouped.grouped_mlp, ops.linear_cross_entropy)
)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "routing"), [
    (1, 5, 1, "random"), (1, 8, 8, "random"), (33, 3, 2, "skewed"), (50, 17, 4, "random"), (0, 4, 2, "random"), (700, 6, 2, "skewed"),
    (1000, 3, 2, "random"),  # many rows an expert: other tiles
])  # fmt: skip
@pytest.mark.parametrize("options", [  # a limit that none reaches: at one, a pre-activation's last bit decides a gradient
    {"activation": "swiglu"},
    {"activation": "oai_swiglu", "alpha": 1.7, "limit": 100.0, "transposed": True, "interleaved": True},
    {"activation": "relu2"},
], ids=lambda o: o["activation"])  # fmt: skip
@pytest.mark.parametrize(("hidden", "size"), [(24, 40), (2048, 256), (384, 320)])  # tiles of 128, 160, 192 columns
def test_routings(tokens, experts, top_k, routing, options, hidden, size):
    layout = {"transposed": options.get("transposed", False), "biased": "transposed" in options}
    given = make(
        tokens, experts, top_k, hidden, size, activation=options["activation"], dtype=torch.bfloat16, routing=routing, **layout
    )
    wanted = run(ops.BODIES[ops.experts], given, torch.float64, options, "cuda")
    compare(run(EXPERTS, given, torch.bfloat16, options, "cuda"), {k: t.cpu() for k, t in wanted.items()}, torch.bfloat16)


@pytest.mark.parametrize("case", grouped_checks.CASES, ids=str)
def test_a_ranks_experts_make_their_rows_again(case):
    grouped_checks.check_rows_are_made_again(GROUPED_MLP, *case, torch.bfloat16, "cuda")


def test_gradients_are_scaled_within_their_products():
    """By a power of two, so to the last bit; an expert without rows gets zeros."""
    g = torch.Generator(device="cuda").manual_seed(0)
    counts, shapes = torch.tensor([50, 0, 200], device="cuda"), ((250, 64), (3, 96, 64), (3, 64, 48))
    rows, up, down = (torch.randn(s, generator=g, device="cuda").bfloat16().requires_grad_() for s in shapes)
    found = []
    for scale in (1.0, 0.25):
        out = GROUPED_MLP(rows, counts, up, None, down, None, activation="swiglu", grad_scale=scale)
        found.append(torch.autograd.grad(out, (rows, up, down), torch.ones_like(out)))
    assert torch.equal(found[0][0], found[1][0])
    for whole, part in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(whole * 0.25, part) and not part[1].any() and part[2].any()


@pytest.mark.parametrize("form", [{}, {"reduction": "sum"}, {"scale": 0.5, "softcap": 4.0}], ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary", "hidden", "rows"), [
    (1, 8, 8, 1), (67, 1000, 64, 32), (700, 4104, 2880, 512), (300, 520, 48, 300),
])  # fmt: skip
def test_head(tokens, vocabulary, hidden, rows, form, monkeypatch):
    """Several chunks add to the weight's gradient, the last one is shorter."""
    monkeypatch.setattr(chunked, "CHUNK", rows * vocabulary)
    g = torch.Generator(device="cuda").manual_seed(tokens)
    exact = [
        torch.randn(n, hidden, generator=g, device="cuda").bfloat16().double().requires_grad_() for n in (tokens, vocabulary)
    ]
    labels = torch.randint(vocabulary, (tokens,), generator=g, device="cuda")
    labels[2::5] = -100
    given = [t.detach().bfloat16().requires_grad_() for t in exact]
    heads = HEAD, chunked.linear_cross_entropy, ops.BODIES[ops.linear_cross_entropy]
    losses = [f(*t, None, labels, **form) for f, t in zip(heads, (given, given, exact), strict=True)]
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-2, atol=1e-2)
    found, by_torch, wanted = (torch.autograd.grad(loss, t) for loss, t in zip(losses, (given, given, exact), strict=True))
    for f, t, w in zip(found, by_torch, wanted, strict=True):
        far, allowed = (float((x.double() - w).norm() / w.norm()) for x in (f, t))
        assert far <= 1.2 * allowed + 1e-3


def test_a_hidden_state_that_lies_otherwise_takes_torchs_product():
    hidden = torch.randn(64, 40, device="cuda").bfloat16()[:, 1:33]
    weight = torch.randn(80, 32, device="cuda").bfloat16()
    out = HEAD(hidden, weight.requires_grad_(), None, torch.arange(64, device="cuda"))
    torch.testing.assert_close(
        out, ops.BODIES[ops.linear_cross_entropy](hidden, weight, None, torch.arange(64, device="cuda")), rtol=1e-2, atol=1e-2
    )


def test_two_runs_are_bitwise_equal():
    given = make(200, experts=3, hidden=128, size=64, routing="skewed", dtype=torch.bfloat16)
    kernels = EXPERTS, EXPERTS, backend.BACKEND.kernel(ops.experts, "recompute").fn
    first, *others = (run(fn, given, torch.bfloat16, {"activation": "swiglu"}, "cuda") for fn in kernels)
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)
