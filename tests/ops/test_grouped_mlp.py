"""Grouped GEMMs and a rank's experts against a loop over experts in float64: values and every gradient."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moefx import transports
from moefx.errors import MoefxError
from moefx.ops import grouped_mlp as grouped
from moefx.ops.activations import ACTIVATIONS
from moefx.ops.grouped_mm import grouped_mm
from moefx.ops.moe import ExpertsSpec
from tests.support import grouped_checks

H, INNER = 8, 6
#: Rows per expert: uneven; some experts without any; all on one; none at all; one row.
COUNTS = {
    "uneven": [3, 1, 5, 2],
    "empty experts": [0, 4, 0, 3],
    "one expert": [0, 0, 9, 0],
    "no rows": [0, 0, 0, 0],
    "one row": [0, 1, 0, 0],
}


def _random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _offsets(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def _per_expert(counts, rows, *weights):
    """Cuts rows by counts and yields each expert's part with its slice of each weight."""
    for e, part in enumerate(rows.split(counts)):
        yield part, *(None if w is None else w[e] for w in weights)


def mlp_reference(
    rows, counts, up, gate_up_bias, down, down_bias, *, activation, alpha, limit, transposed, interleaved, permuted_probs=None
):
    """What a module per expert would do."""
    out = []
    for x, u, ub, d, db in _per_expert(counts, rows, up, gate_up_bias, down, down_bias):
        h = F.linear(x, u.T if transposed else u, ub)
        a = ACTIVATIONS[activation].forward(h, alpha, limit, interleaved)
        out.append(F.linear(a, d.T if transposed else d, db))
    return torch.cat(out) if permuted_probs is None else torch.cat(out) * permuted_probs.unsqueeze(1)


def _mlp_inputs(counts, *, bias, transposed, gated, dtype):
    wide, experts = 2 * INNER if gated else INNER, len(counts)
    rows = _random(sum(counts), H, dtype=dtype, seed=1)
    up = _random(experts, *((H, wide) if transposed else (wide, H)), dtype=dtype, seed=2) / 2
    down = _random(experts, *((INNER, H) if transposed else (H, INNER)), dtype=dtype, seed=3) / 2
    gate_up_bias = _random(experts, wide, dtype=dtype, seed=4) if bias else None
    down_bias = _random(experts, H, dtype=dtype, seed=5) if bias else None
    return [None if t is None else t.requires_grad_() for t in (rows, up, gate_up_bias, down, down_bias)]


def _gradients(y, inputs):
    """By all inputs that exist, None where nothing was computed."""
    return torch.autograd.grad(
        y, [t for t in inputs if t is not None], _random(*y.shape, dtype=y.dtype, seed=6), allow_unused=True
    )


def _check_mlp(
    counts,
    *,
    dtype=torch.float64,
    activation="swiglu",
    bias=False,
    transposed=False,
    interleaved=False,
    weighted=False,
    rtol,
    atol,
):
    options = dict(activation=activation, alpha=1.702, limit=1.0, transposed=transposed, interleaved=interleaved)
    inputs = _mlp_inputs(counts, bias=bias, transposed=transposed, gated=ACTIVATIONS[activation].gated, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs.append(_random(sum(counts), dtype=wide, seed=7).requires_grad_() if weighted else None)
    rows, *weights, permuted_probs = inputs
    y = grouped.grouped_mlp(rows, torch.tensor(counts), *weights, **options, permuted_probs=permuted_probs)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    expected = mlp_reference(exact[0], counts, *exact[1:-1], **options, permuted_probs=exact[-1])
    assert y.dtype == dtype and y.shape == rows.shape
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)
    found = _gradients(y, inputs)
    assert all(g is not None for g in found), "every parameter has a gradient, zeros where no row came"
    for g, e, t in zip(found, _gradients(expected, exact), (t for t in inputs if t is not None)):
        assert g.dtype == t.dtype and g.shape == t.shape
        torch.testing.assert_close(g.double(), torch.zeros_like(g).double() if e is None else e, rtol=rtol, atol=atol)


@pytest.mark.parametrize("stored", ["as given", "transposed view"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_mm(counts, stored):
    x, offsets = _random(sum(counts), H).requires_grad_(), _offsets(counts)
    weight = _random(4, H, INNER, seed=2) if stored == "as given" else _random(4, INNER, H, seed=2).transpose(1, 2)
    weight.requires_grad_()
    y = grouped_mm(x, weight, offsets)
    expected = torch.cat([part @ w for part, w in _per_expert(counts, x, weight)])
    torch.testing.assert_close(y, expected)
    for found, right in zip(_gradients(y, (x, weight)), _gradients(expected, (x, weight))):
        torch.testing.assert_close(found, right)


def test_grouped_mm_keeps_the_memory_order_of_the_weights_gradient():
    """A parameter stored [E, b, a] gets its gradient in that order, without a copy."""
    weight = _random(4, INNER, H).requires_grad_()
    grouped_mm(_random(4, H), weight.transpose(1, 2), _offsets([1, 1, 1, 1])).sum().backward()
    assert weight.grad.is_contiguous()


def test_grouped_mm_passes_gradcheck_and_opcheck():
    x, weight = _random(6, 3).requires_grad_(), _random(3, 3, 2, seed=1).requires_grad_()
    offsets = _offsets([2, 0, 4])
    assert torch.autograd.gradcheck(grouped_mm, (x, weight, offsets))
    torch.library.opcheck(grouped_mm, (x, weight, offsets))
    torch.library.opcheck(grouped_mm, (x, _random(3, 2, 3).transpose(1, 2).requires_grad_(), offsets))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_mlp_for_any_counts(counts, bias, weighted):
    _check_mlp(counts, bias=bias, weighted=weighted, dtype=torch.float32, rtol=1e-5, atol=1e-5)
    _check_mlp(counts, bias=bias, weighted=weighted, dtype=torch.float64, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True], ids=["", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grouped_mlp_for_any_layout_and_activation(activation, transposed, interleaved):
    _check_mlp(
        COUNTS["empty experts"],
        activation=activation,
        transposed=transposed,
        interleaved=interleaved,
        weighted=interleaved,
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize(
    ("activation", "transposed", "interleaved"),
    [("swiglu", False, False), ("oai_swiglu", True, True), ("relu2", False, False)],
)
def test_grouped_mlp_in_bf16(activation, transposed, interleaved):
    """Values of order 1 to 10 from sums of up to 12 products that are rounded (2**-9) at four places."""
    _check_mlp(
        COUNTS["uneven"],
        dtype=torch.bfloat16,
        activation=activation,
        transposed=transposed,
        interleaved=interleaved,
        bias=transposed,
        weighted=transposed or activation == "relu2",
        rtol=2**-5,
        atol=2**-3,
    )


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_weight_costs_no_rounding(bias):
    """Powers of two round nothing: weighted rows are the rows times their weights, bit by bit, and so are all gradients."""
    counts = COUNTS["uneven"]
    inputs = _mlp_inputs(counts, bias=bias, transposed=False, gated=True, dtype=torch.bfloat16)
    rows, *weights = inputs
    two = 2.0 ** torch.arange(-5, 6)
    y = grouped.grouped_mlp(rows, torch.tensor(counts), *weights, activation="swiglu")
    weighted = grouped.grouped_mlp(rows, torch.tensor(counts), *weights, activation="swiglu", permuted_probs=two)
    assert torch.equal(weighted, y * two.bfloat16().unsqueeze(1))
    grad = _random(*y.shape, dtype=y.dtype, seed=6)
    asked = [t for t in inputs if t is not None]
    found, wanted = (
        torch.autograd.grad(weighted, asked, grad),
        torch.autograd.grad(y, asked, grad * two.bfloat16().unsqueeze(1)),
    )
    assert all(torch.equal(f, w) for f, w in zip(found, wanted))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_rows_after_the_last_mean_nothing(bias):
    """A dispatch with a capacity gives more rows than counts: NaN there, in rows, weights and gradients, reaches nobody."""
    counts, more = [3, 0, 5, 2], 4
    inputs = _mlp_inputs(counts, bias=bias, transposed=False, gated=True, dtype=torch.float32)
    rows, *weights = inputs
    permuted_probs = _random(len(rows), dtype=torch.float32, seed=7).requires_grad_()
    asked = [t for t in (rows, permuted_probs, *weights) if t is not None]
    grad = _random(len(rows), H, dtype=torch.float32, seed=6)

    def results(pad):
        given = [torch.cat((t, t.new_full((pad, *t.shape[1:]), float("nan")))) for t in (rows, permuted_probs, grad)]
        y = grouped.grouped_mlp(given[0], torch.tensor(counts), *weights, activation="swiglu", permuted_probs=given[1])
        return y[: len(rows)], *torch.autograd.grad(y, asked, given[2])

    for found, wanted in zip(results(more), results(0)):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("case", grouped_checks.CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_mlp_makes_its_rows_again(case, dtype):
    grouped_checks.check_rows_are_made_again(grouped.grouped_mlp, *case, dtype, "cpu")


def test_grouped_mlp_wants_all_that_arrived():
    given = _mlp_inputs([2, 1], bias=False, transposed=False, gated=True, dtype=torch.float32)
    with pytest.raises(MoefxError, match=r"arrived has 2 tensors, not 3: pass \[tokens, row_id_map, cpu_metadata\]"):
        grouped.grouped_mlp(given[0], torch.tensor([2, 1]), *given[1:], activation="swiglu", arrived=[given[0], given[0]])


def test_grouped_mlp_passes_gradcheck_and_opcheck():
    counts = torch.tensor([2, 0, 1, 2])
    inputs = _mlp_inputs(counts.tolist(), bias=True, transposed=False, gated=True, dtype=torch.float64)
    rows, up, _up_bias, down, _down_bias = inputs

    permuted_probs = _random(5, seed=7).requires_grad_()

    def mlp(rows, up, gate_up_bias, down, down_bias, permuted_probs):
        return grouped.grouped_mlp(
            rows, counts, up, gate_up_bias, down, down_bias, activation="swiglu", permuted_probs=permuted_probs
        )

    assert torch.autograd.gradcheck(mlp, (*inputs, permuted_probs), fast_mode=True)
    for weights in (None, permuted_probs):
        for arrived in (
            [None] * 3,
            [
                rows.detach(),
                torch.arange(5, dtype=torch.int32).view(5, 1),
                transports.make_header(transports.Header("all_to_all"), 1),
            ],
        ):
            plain = (rows, counts, up, None, down, None, *[None] * 4, weights, *arrived, "swiglu", 0.0, 0.0, False, False, 1.0)
            torch.library.opcheck(torch.ops.moefx.grouped_mlp_forward.default, plain)


def test_grad_scale_multiplies_the_gradients_of_the_weights_only():
    counts = torch.tensor(COUNTS["uneven"])
    rows, *weights = inputs = _mlp_inputs(counts.tolist(), bias=True, transposed=True, gated=True, dtype=torch.float32)
    permuted_probs = _random(len(rows), dtype=torch.float32, seed=7).requires_grad_()
    inputs.insert(0, permuted_probs)
    options = dict(activation="swiglu", transposed=True, permuted_probs=permuted_probs)
    once = _gradients(grouped.grouped_mlp(rows, counts, *weights, **options), inputs)
    quarter = _gradients(grouped.grouped_mlp(rows, counts, *weights, **options, grad_scale=0.25), inputs)
    assert torch.equal(once[0], quarter[0]) and torch.equal(once[1], quarter[1])
    for full, scaled in zip(once[2:], quarter[2:]):
        assert torch.equal(full * 0.25, scaled)


def test_rows_of_another_dtype_are_cast_to_the_weights():
    counts = torch.tensor(COUNTS["uneven"])
    rows, *weights = _mlp_inputs(counts.tolist(), bias=False, transposed=False, gated=True, dtype=torch.bfloat16)
    wide = rows.detach().float().requires_grad_()
    y, narrow = (grouped.grouped_mlp(r, counts, *weights, activation="swiglu") for r in (wide, rows))
    assert y.dtype == torch.bfloat16 and torch.equal(y, narrow)
    y.sum().backward()
    assert wide.grad.dtype == torch.float32


def test_frozen_weights_and_frozen_rows():
    counts = torch.tensor(COUNTS["uneven"])
    rows, up, _, down, _ = _mlp_inputs(counts.tolist(), bias=False, transposed=False, gated=True, dtype=torch.float32)

    def mlp(rows, up, down):
        return grouped.grouped_mlp(rows, counts, up, None, down, None, activation="swiglu")

    (everything,) = _gradients(mlp(rows, up, down), (down,))
    (only_down,) = _gradients(mlp(rows.detach(), up.detach(), down), (down,))
    assert torch.equal(everything, only_down)
    assert not mlp(rows.detach(), up.detach(), down.detach()).requires_grad


def test_compiles_whole_with_changing_row_counts():
    """Two row counts, one graph: the second does not compile again."""
    torch._dynamo.reset()
    rows, *weights = _mlp_inputs([40], bias=True, transposed=False, gated=True, dtype=torch.float32)
    weights = [w.detach().expand(4, *w.shape[1:]).clone().requires_grad_() for w in weights]

    def mlp(rows, counts, *weights):
        return grouped.grouped_mlp(rows, counts, *weights, activation="swiglu", grad_scale=0.5) * 2

    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, counts in enumerate(([3, 1, 5, 2], [0, 9, 0, 4])):
        x, n = rows[: sum(counts)].detach().requires_grad_(), torch.tensor(counts)
        with torch._dynamo.config.patch(error_on_recompile=step == 1):
            y = compiled(x, n, *weights)
        eager = mlp(x, n, *weights)
        assert torch.equal(y, eager)
        for found, right in zip(_gradients(y, (x, *weights)), _gradients(eager, (x, *weights))):
            assert torch.equal(found, right)


def test_the_spec_of_experts_keeps_every_option():
    other = {bool: True, float: 2.5, str: "relu2"}
    given = {
        f.name: other[type(f.default) if f.default is not dataclasses.MISSING else str] for f in dataclasses.fields(ExpertsSpec)
    }
    made = grouped.GroupedMLPSpec.of(ExpertsSpec(**given))
    assert dataclasses.asdict(made) == {**given, "grad_scale": 1.0}
