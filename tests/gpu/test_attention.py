"""Flash attention with a sliding window, sinks and packed sequences against the operation's own body in float32."""

import pytest
import torch

from moefx import ops
from moefx.backends import fa4
from moefx.backends import torch as backend
from moefx.kernels import attention

#: By name, since one of them may be missing.
KERNELS = {"torch": backend.attention, "fa4": fa4.attention}


def inputs(batch, heads, shared, length, size, sinks, of_values=None):
    g = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda").bfloat16().requires_grad_()

    q, k, v = (
        normal(batch, heads, length, size),
        normal(batch, shared, length, size),
        normal(batch, shared, length, of_values or size),
    )
    return [q, k, v, normal(heads) if sinks else None]


@pytest.fixture(autouse=True)
def _however_few_tokens(monkeypatch):
    monkeypatch.setattr(attention, "MANY_TOKENS", 0)


@pytest.fixture(params=KERNELS)
def kernel(request):
    problem = fa4.BACKEND.available() if request.param == "fa4" else None
    if problem:
        pytest.skip(problem)
    return KERNELS[request.param]


def run(fn, given, mask=None, **options):
    q, k, v, sinks = given
    out = fn(q, k, v, mask, sinks, is_causal=True, **options)
    weight = torch.linspace(-1, 1, out.shape[-1], device="cuda").to(out.dtype)
    leaves = [t for t in given if t is not None]
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("window", [None, 16, 1, 1000])
@pytest.mark.parametrize(("batch", "heads", "shared", "length", "size"), [
    (2, 8, 2, 67, 64), (1, 4, 4, 200, 128), (1, 8, 1, 1, 64), (2, 16, 2, 1024, 64),
])  # fmt: skip
def test_window_and_sinks(kernel, batch, heads, shared, length, size, window, sinks):
    compare(kernel, inputs(batch, heads, shared, length, size, sinks), {"scale": size**-0.5, "window": window})


@pytest.mark.parametrize(("heads", "shared", "sinks", "window"), [(16, 1, True, None), (6, 2, False, 700), (4, 4, False, None)])
@pytest.mark.parametrize(("size", "of_values"), fa4.SIZES)
def test_sizes_of_flash_attention_4(size, of_values, heads, shared, sinks, window):
    if problem := fa4.BACKEND.available():
        pytest.skip(problem)
    shared = shared if size == of_values else heads
    # a lone key beside a sink: what q gets is a difference of two numbers that were rounded, and may be all rounding
    for length in (300, 1025) if sinks else (1, 300, 1025):
        compare(
            fa4.attention, inputs(2, heads, shared, length, size, sinks, of_values), {"scale": size**-0.5, "window": window}
        )


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "shared", "size", "of_values"), [(8, 2, 64, None), (4, 4, 192, 128), (4, 2, 256, None)])
def test_packed_sequences(heads, shared, size, of_values, window, sinks):
    """Their kernels take no mask of all pairs, and values may be shorter than keys (multi-head latent attention)."""
    rows = [[1, 300, 99], [64, 64, 272]]
    starts = torch.tensor(
        [[start for n, start in zip(row, (0, *torch.tensor(row).cumsum(0).tolist())) for _ in range(n)] for row in rows]
    )
    compare(
        backend.attention,
        inputs(2, heads, shared, 400, size, sinks, of_values),
        {"scale": size**-0.5, "window": window},
        starts.int().cuda(),
    )


def compare(fn, given, options, mask=None):
    found = run(fn, given, mask, **options)
    exact = [None if t is None else t.detach().float().requires_grad_() for t in given]
    wanted = run(ops.BODIES[ops.attention], exact, mask, **options)
    rounded = run(ops.BODIES[ops.attention], given, mask, **options)
    for name, f, w, r in zip(("out", "q", "k", "v", "sinks"), found, wanted, rounded, strict=False):
        size_of = max(float(w.abs().max()), 0.1)  # a window of one key: query and key have no gradient
        far, allowed = (float((t.float() - w).abs().max()) / size_of for t in (f, r))
        assert far <= max(2 * allowed, 2e-2), f"{name}: {far:.1e} from float32, the operation in bf16 {allowed:.1e}"


def test_deterministic_algorithms(kernel):
    """cuDNN's backward adds in no fixed order: the same bits twice, close to what it gives."""
    given = inputs(2, 8, 2, 300, 64, sinks=True)
    options = {"scale": 0.125, "window": None}
    plain = run(kernel, given, **options)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(kernel, given, **options) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for f, s, p in zip(first, second, plain, strict=True):
        assert torch.equal(f, s) and float((f - p).abs().max()) <= 2e-2 * float(p.abs().max())
