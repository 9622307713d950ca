"""Products with low-rank factors against a loop over experts in float64, and the experts with updates against merged weights."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import ops
from moefx.backends import torch as torch_backend
from moefx.kernels import low_rank
from moefx.ops import grouped_mlp as grouped
from moefx.ops.expert_weights import LowRank
from tests.kernels import test_experts
from tests.kernels.test_experts import DEVICE, EXPERTS, GROUPED_MLP, RECOMPUTE, RECOMPUTE_MLP, make, run

#: Of the largest value, as in test_experts.py. Triton's interpreter multiplies no bf16.
TOLERANCE = {"cpu": {torch.float32: 2e-5, torch.float16: 6e-3}, "cuda": {torch.float32: 2e-5, torch.bfloat16: 3e-2}}[DEVICE]
COUNTS = {"uneven": [70, 3, 0, 129], "one expert": [0, 0, 90, 0], "no rows": [0, 0, 0, 0], "one row": [0, 1, 0, 0]}


@pytest.fixture(autouse=True)
def _tolerance(monkeypatch):
    monkeypatch.setattr(test_experts, "TOLERANCE", TOLERANCE)


def tensors(counts, width, rank, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(DEVICE, dtype)

    rows, experts = sum(counts), len(counts)
    bounds = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    return normal(rows, width), normal(rows, rank), normal(experts, rank, width), bounds


def close(found, wanted, dtype):
    size = float(wanted.abs().max()) if wanted.numel() else 1.0
    assert found.shape == wanted.shape and found.dtype == dtype
    assert not wanted.numel() or float((found.cpu().double() - wanted).abs().max()) <= TOLERANCE[dtype] * size + 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("width", "rank"), [(40, 1), (67, 3), (128, 16), (200, 24), (24, 70)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products(counts, width, rank, dtype):
    """Ranks and widths that divide no block; experts without rows; factors that lie either way."""
    x, inner, factor, bounds = tensors(counts, width, rank, dtype)
    high_x, high_inner, high_factor = (t.cpu().double() for t in (x, inner, factor))
    parts = list(zip(high_x.split(counts), high_inner.split(counts), high_factor, strict=True))
    wanted = torch.cat([part @ f.T for part, _, f in parts])
    turned = factor.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (factor, turned):
        close(low_rank.into(x, given, bounds), wanted, dtype)
        out = x.clone()
        low_rank.add_(out, inner, given, bounds)
        close(out, torch.cat([part + u @ f for part, u, f in parts]), dtype)
    outer = torch.stack([u.T @ part for part, u, _ in parts])
    close(low_rank.outer(inner, x, bounds), outer, dtype)
    found = low_rank.outer(inner, x, bounds, transposed=True)
    close(found, outer.transpose(1, 2), dtype)
    assert found.is_contiguous()


def test_rows_that_are_gathered():
    x, _, factor, bounds = tensors(COUNTS["uneven"], 48, 5, torch.float32)
    index = torch.randint(7, (len(x),), generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.int32)
    tokens, gathered = x[:7].contiguous(), x[:7][index.long()]
    inner = low_rank.into(gathered, factor, bounds)
    assert torch.equal(low_rank.into(tokens, factor, bounds, index), inner)
    assert torch.equal(low_rank.outer(inner, tokens, bounds, index), low_rank.outer(inner, gathered, bounds))
    out, again = torch.zeros_like(x), torch.zeros_like(x)
    update = LowRank(factor, factor.transpose(1, 2))
    low_rank.update_(out, tokens, update, bounds, index)
    low_rank.update_(again, gathered, update, bounds)
    assert torch.equal(out, again) and out.any()


# --- experts with updates --------------------------------------------------------------------------------------------


def factors(given, transposed, ranks=(3, 5), dtype=torch.float32, seed=9):
    """a and b of gate_up and of down, in float64 numbers that ``dtype`` can hold."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for weight, rank in ((given[3], ranks[0]), (given[5], ranks[1])):
        shape = weight.transpose(1, 2).shape if transposed else weight.shape
        made.append((torch.randn(shape[0], rank, shape[2], generator=g) * 0.3).to(dtype).double())
        made.append((torch.randn(shape[0], shape[1], rank, generator=g) * 0.3).to(dtype).double())
    return made


def merged(fn, *given, transposed=False, **options):
    """``fn`` with W + B A, as PEFT makes it."""
    *others, up, up_bias, down, down_bias, up_a, up_b, down_a, down_b = given
    products = (up_b @ up_a, down_b @ down_a)
    up, down = (w + (p.transpose(1, 2) if transposed else p) for w, p in zip((up, down), products))
    return fn(*others, up, up_bias, down, down_bias, transposed=transposed, **options)


def split(fn, *given, **options):
    *given, up_a, up_b, down_a, down_b = given
    return fn(*given, gate_up_lora_a=up_a, gate_up_lora_b=up_b, down_lora_a=down_a, down_lora_b=down_b, **options)


LAYOUTS = {
    "swiglu": {"activation": "swiglu"},
    "relu2": {"activation": "relu2"},
    "gpt_oss": {"activation": "oai_swiglu", "alpha": 1.7, "limit": 7.0, "transposed": True, "interleaved": True},
}
KERNELS = {"body": ops.BODIES[ops.experts], "torch": torch_backend.experts, "triton": EXPERTS, "again": RECOMPUTE}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_with_updates(kernel, layout, dtype):
    options = LAYOUTS[layout]
    given = make(9, activation=options["activation"], biased=layout == "gpt_oss", transposed=layout == "gpt_oss", dtype=dtype)
    given += factors(given, layout == "gpt_oss", dtype=dtype)
    wanted = run(functools.partial(merged, ops.BODIES[ops.experts]), given, torch.float64, options, "cpu")
    test_experts.compare(run(functools.partial(split, KERNELS[kernel]), given, dtype, options, DEVICE), wanted, dtype)


@pytest.mark.parametrize(("tokens", "routing"), [(0, "random"), (1, "random"), (33, "skewed")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_few_tokens_and_one_expert(kernel, tokens, routing):
    given = make(tokens, routing=routing)
    given += factors(given, False)
    options = {"activation": "swiglu"}
    wanted = run(functools.partial(merged, ops.BODIES[ops.experts]), given, torch.float64, options, "cpu")
    test_experts.compare(
        run(functools.partial(split, KERNELS[kernel]), given, torch.float32, options, DEVICE), wanted, torch.float32
    )


@pytest.mark.parametrize("which", ["gate_up", "down"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_of_both_is_updated_and_frozen_weights_get_no_gradient(kernel, which):
    given = [None if t is None else t.float() if t.is_floating_point() else t for t in make(8)]
    up_a, up_b, down_a, down_b = (t.float() for t in factors(given, False))
    a, b = (up_a, up_b) if which == "gate_up" else (down_a, down_b)
    at = 3 if which == "gate_up" else 5

    def gradients(fn):
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in (given[0], a, b)]
        others = [None if t is None else t.to(DEVICE) for t in given]
        out = fn(leaves[0], *leaves[1:], others)
        return torch.autograd.grad(out.square().sum(), leaves)

    def plain(x, a, b, others):
        weights = [*others[3:at], others[at] + b @ a, *others[at + 1 :]]
        return ops.BODIES[ops.experts](x, *others[1:3], *weights, activation="swiglu")

    def ours(x, a, b, others):
        options = {f"{which}_lora_a": a, f"{which}_lora_b": b, "activation": "swiglu"}
        return KERNELS[kernel](x, *others[1:], **options)

    for found, wanted in zip(gradients(ours), gradients(plain), strict=True):
        assert float((found - wanted).abs().max()) <= TOLERANCE[torch.float32] * float(wanted.abs().max())


@pytest.mark.parametrize("kernel", [grouped.grouped_mlp, GROUPED_MLP, RECOMPUTE_MLP], ids=["body", "triton", "again"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ranks_experts_with_updates(layout, kernel):
    """The gradients of the factors are not scaled; those of the matrices and biases are."""
    biased = layout == "gpt_oss"
    x, _, _, *weights = make(11, experts=4, activation=LAYOUTS[layout]["activation"], biased=biased, transposed=biased)
    counts, weighted = torch.tensor([5, 0, 4, 2]), torch.linspace(0.1, 1.2, 11, dtype=torch.float64)
    given = [x, None, None, *weights]
    given = [x, weighted, *weights, *factors(given, biased)]

    def call(fn, rows, probs, *weights, **options):
        return fn(rows, counts.to(rows.device), *weights, permuted_probs=probs, **options)

    def updated(rows, probs, *weights, **options):
        return merged(functools.partial(call, grouped.grouped_mlp), rows, probs, *weights, **options)

    def ours(rows, probs, *weights, **options):
        return split(functools.partial(call, kernel), rows, probs, *weights, grad_scale=0.25, **options)

    wanted = run(updated, given, torch.float64, LAYOUTS[layout], "cpu")
    for i in range(2, 6):
        if f"gradient {i}" in wanted:
            wanted[f"gradient {i}"] *= 0.25
    test_experts.compare(run(ours, given, torch.float32, LAYOUTS[layout], DEVICE), wanted, torch.float32)
