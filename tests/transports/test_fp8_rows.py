"""Token rows in FP8: their rounding error, exchanges with them, and the errors for what is not supported."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import moefx
from moefx import transports
from moefx.ops import dispatch_combine
from moefx.transports import fp8_rows
from tests.support.families import build


def numbers(kind, rows, hidden, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(hidden)
    x = torch.randn(rows, hidden, generator=g)
    if kind == "outliers":
        x[:, ::50] *= 1000
    if kind == "of all sizes":
        x *= 10.0 ** torch.randint(-12, 8, x.shape, generator=g)
    if kind == "zeros":
        x *= torch.rand(rows, 1, generator=g) < 0.5
    return x.to(dtype)


def bound(x):
    """That of moefx.transports.fp8_rows, a number for each."""
    u = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-22
    x = x.double().abs()
    many, hidden = fp8_rows.blocks(x.shape[1]), x.shape[1]
    parts = torch.nn.functional.pad(x, (0, many * 128 - hidden)).view(-1, many, 128)
    largest = parts.amax(dim=2, keepdim=True).expand_as(parts).reshape(-1, many * 128)[:, :hidden]
    return (1 + u) * torch.maximum(2.0**-4 * x, 2.0**-10 * largest / 448) + u * x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [64, 128, 200, 2048])
@pytest.mark.parametrize("kind", ["normal", "outliers", "of all sizes", "zeros"])
def test_a_number_is_as_near_as_the_bound_says(kind, hidden, dtype):
    x = numbers(kind, 37, hidden, dtype)
    rows = fp8_rows.encode(x)
    assert rows.dtype == dtype and rows.shape == (37, fp8_rows.width(hidden, dtype))
    back = fp8_rows.decode(rows, hidden)
    assert back.dtype == dtype and back.shape == x.shape
    far = (back.double() - x.double()).abs()
    assert (far <= bound(x)).all()
    assert kind == "zeros" or float((far / bound(x)).max()) > 0.5  # the bound is not a loose one


def test_what_is_not_finite_stays_visible():
    x = numbers("normal", 2, 256)
    x[0, 3], x[1, 200] = float("inf"), float("nan")
    back = fp8_rows.decode(fp8_rows.encode(x), 256)
    assert not back[0, :128].isfinite().all() and not back[1, 128:].isfinite().all() and back[0, 128:].isfinite().all()


def test_the_kernels_are_the_plain_operations():
    pytest.importorskip("triton", reason="Triton is not installed")
    from moefx.kernels import fp8_rows as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = numbers("outliers", 5, 200, torch.float32).to(device)
    wanted = fp8_rows.encode(x.cpu())
    rows = torch.zeros_like(wanted).to(device)
    q, scales = transports.unpack(rows, *fp8_rows._parts(200))
    kernels.quantize(x, q, scales)
    theirs, their_scales = transports.unpack(wanted, *fp8_rows._parts(200))
    torch.testing.assert_close(scales.cpu(), their_scales)
    if device == "cuda":  # Triton's interpreter does not carry where it rounds to e4m3: it makes 1.0 of 1.99
        torch.testing.assert_close(q.float().cpu(), theirs.float(), rtol=1 / 7, atol=2**-9)  # neighbours: scales' last bits
    out = kernels.dequantize(q, scales, torch.float32)
    torch.testing.assert_close(out.cpu(), fp8_rows.dequantize(q.cpu(), scales.cpu(), torch.float32))


@pytest.mark.parametrize("capacity", [0, 20])
def test_an_exchange_rounds_tokens_and_neither_results_nor_gradients(capacity):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        where = {"num_experts": 4, "group": dist.group.WORLD.group_name}
        for hidden in (64, 66, 256):  # 66: an encoded row is as wide as a plain one, in numbers of 16 bits
            found = []
            x, index = (
                numbers("normal", 9, hidden),
                torch.rand(9, 4, generator=torch.Generator().manual_seed(1)).topk(2).indices,
            )
            for send, dtype in ((fp8_rows.decode(fp8_rows.encode(x), hidden), ""), (x, "fp8")):
                send, weights = send.clone().requires_grad_(), torch.full((9, 2), 0.75).requires_grad_()
                rows, scores, _, *route, _ = dispatch_combine.dispatch(
                    send, index, weights, **where, capacity=capacity, dispatch_dtype=dtype
                )
                y = dispatch_combine.combine((rows * scores.unsqueeze(1)).to(rows.dtype), index, *route, **where)
                found.append((rows, y, *torch.autograd.grad(y, (send, weights), numbers("outliers", 9, hidden))))
            for a, b in zip(*found):
                assert torch.equal(a, b)
        with pytest.raises(moefx.MoefxError, match="dispatch_dtype='fp4' is not one of '', 'fp8'"):
            dispatch_combine.dispatch(x, index, weights, **where, dispatch_dtype="fp4")
    finally:
        dist.destroy_process_group()


def test_it_is_asked_for_and_the_report_says_so():
    model = build("qwen3_moe")
    with pytest.raises(moefx.MoefxError, match="dispatch_dtype='int8' is not supported"):
        moefx.optimize(model, dispatch_dtype="int8")
    with pytest.raises(moefx.MoefxError, match="dispatch_dtype='fp8', but ep_size=1"):
        moefx.optimize(model, dispatch_dtype="fp8")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        moefx.optimize(model, ep_size=2, compile=False, dispatch_dtype="fp8")
        report = moefx.report(model)
        assert "NUMERICS CHANGE (dispatch_dtype='fp8')" in str(report) and report.to_dict()["dispatch_dtype"] == "fp8"
        assert all("sent in FP8: numerics change" in str(c) for c in report["expert_parallel"].made)
        sent = report.cost(B=1, S=4096).evaluate()[3]
        moefx.restore(model)
        moefx.optimize(model, ep_size=2, compile=False)
        assert "NUMERICS" not in str(moefx.report(model)) and sent < moefx.report(model).cost(B=1, S=4096).evaluate()[3]
    finally:
        dist.destroy_process_group()
