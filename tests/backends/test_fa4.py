"""What is moefx's around FlashAttention 4, with a stand-in in plain torch: tests/gpu/test_attention.py runs its kernels."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

import moefx
from moefx import kernels, ops
from moefx.backends import fa4
from moefx.kernels import attention, flash_attention_4
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")


def _scores(q, k, softmax_scale, window_size_left):
    """[B, A, S, S], of q and k [B, S, A, D]."""
    length, repeats = q.shape[1], q.shape[2] // k.shape[2]
    keys = k.repeat_interleave(repeats, 2)
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = (behind >= 0) & (behind <= (length if window_size_left is None else window_size_left))
    return (torch.einsum("bsad,btad->bast", q, keys) * softmax_scale).masked_fill(~seen, float("-inf")), repeats


def _flash_attn_fwd(q, k, v, *, return_lse, softmax_scale, causal, window_size_left):
    assert causal and return_lse
    scores, repeats = _scores(q, k, softmax_scale, window_size_left)
    out = torch.einsum("bast,btad->bsad", scores.softmax(-1), v.repeat_interleave(repeats, 2))
    return out.contiguous(), scores.logsumexp(-1), None, None, None


def _flash_attn_bwd(q, k, v, out, dout, lse, *, deterministic, softmax_scale, causal, window_size_left):
    """From lse and out alone, as the kernels do it: what they are given is tested too."""
    assert causal and not deterministic
    scores, repeats = _scores(q, k, softmax_scale, window_size_left)
    p, values, keys = (scores - lse[..., None]).exp(), v.repeat_interleave(repeats, 2), k.repeat_interleave(repeats, 2)
    to_p, delta = torch.einsum("bsad,btad->bast", dout, values), (dout * out).sum(-1).transpose(1, 2)
    to_scores = p * (to_p - delta[..., None]) * softmax_scale
    to_k, to_v = torch.einsum("bast,bsad->btad", to_scores, q), torch.einsum("bast,bsad->btad", p, dout)
    to_k, to_v = (t.unflatten(2, (-1, repeats)).sum(3) for t in (to_k, to_v))
    return [t.contiguous() for t in (torch.einsum("bast,btad->bsad", to_scores, keys), to_k, to_v)]


class _Sinks:
    """``moefx.kernels.sinks``, whose kernels need a GPU, in plain torch."""

    @staticmethod
    def join_(out, lse, sinks):
        out.mul_(torch.sigmoid(lse - sinks[:, None]).transpose(1, 2)[..., None])
        lse.copy_(torch.logaddexp(lse, sinks[:, None].expand_as(lse)))

    @staticmethod
    def delta(grad, out):
        return (grad * out).sum(-1).transpose(1, 2)

    @staticmethod
    def gradient(sinks, lse, delta):
        return -((sinks[:, None] - lse).exp() * delta).sum((0, 2))


@pytest.fixture
def usable(monkeypatch):
    interface = types.SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.SimpleNamespace(interface=interface))
    monkeypatch.setitem(sys.modules, "moefx.kernels.sinks", _Sinks)
    monkeypatch.setattr(kernels, "sinks", _Sinks, raising=False)
    monkeypatch.setattr(fa4, "refuses_flash", lambda *_, **__: None)  # the device and the dtype
    monkeypatch.setattr(fa4, "SIZES", [(a, b) for a in range(99) for b in range(99)])
    monkeypatch.setattr(attention, "MANY_TOKENS", 0)
    monkeypatch.setattr(attention, "SHORT", {})  # else a window as short as a test's stays with moefx's own kernels
    monkeypatch.setattr(fa4, "BACKEND", replace(fa4.BACKEND, available=lambda: None))
    flash_attention_4._library.cache_clear()
    yield
    flash_attention_4._library.cache_clear()


@pytest.mark.parametrize(
    ("family", "compile"),  # shared heads, values of another size, window and sinks
    [("qwen3_moe", False), ("deepseek_v3", False), ("deepseek_v3", "aot_eager"), ("gpt_oss", "aot_eager")],
)
def test_a_model_trains_by_it(usable, family, compile):
    model = build(family)
    moefx.optimize(model, backends=["fa4", "torch"], compile=compile)
    assert ("attention", "fa4") in moefx.report(model).kernels()
    for shape in ((2, 9), (1, 1), (1, 30)):
        result = moefx.verify(model, batch(*shape, labels=shape[1] > 1))
        assert result.ok, result.worst
    moefx.restore(model)
    torch._dynamo.reset()


def test_few_tokens_are_left_to_others_unless_they_are_recorded():
    q = torch.empty(2, 4, attention.MANY_TOKENS // 2, 64, device="meta")
    few = q[:, :, 1:]
    assert attention._by_fa4(q, q, "fa4") and not attention._by_fa4(q, q, "torch") and not attention._by_fa4(few, few, "fa4")
    assert attention._by_fa4(few, few[..., :32], "fa4")  # no other kernel takes values of a size of their own
    with attention.recorded():
        assert attention._by_fa4(few, few, "fa4") and not attention._by_fa4(few, few, "torch")
    assert not attention._by_fa4(few, few, "fa4")


def _node(dtype=torch.bfloat16, size=64, of_values=64, keys=32, shared=2, mask=None, **options):
    """A call of attention on a CUDA device that need not be there."""
    shapes = (2, 4, 32, size), (2, shared, keys, size), (2, shared, keys, of_values)
    with FakeTensorMode():
        vals = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "qkv"]
    for node, val in zip(inputs, vals, strict=True):
        node.meta["val"] = val
    if mask:
        mask = graph.placeholder("mask")
    return graph.call_function(ops.attention, (*inputs, mask, None), {"scale": 0.1, "is_causal": True, **options})


@pytest.mark.parametrize(("options", "said"), [
    ({"dtype": torch.float32}, "q is torch.float32"), ({"size": 80, "of_values": 80}, "have 80 (80)"), ({"of_values": 72}, "have 64 (72)"),
    ({"size": 192, "of_values": 128}, "4 of 192 numbers share 2, whose values have 128"),
    ({"keys": 33}, "q has 32, k 33"), ({"mask": True}, "the mask a tensor"), ({"is_causal": False}, "is_causal is False"),
    ({"softcap": 30.0}, "has 30.0"), ({"dropout": 0.1}, "has 0.1"), ({"window": 128}, "a window of 128 keys of 64 numbers"),
])  # fmt: skip
def test_what_it_refuses(options, said):
    assert said in (fa4.BACKEND.kernels[ops.attention].refuses(_node(**options)) or "nothing")


@pytest.mark.parametrize("options", [{}, {"size": 192, "of_values": 128, "shared": 4}, {"window": 4096}])
def test_what_it_takes(options):
    assert fa4.BACKEND.kernels[ops.attention].refuses(_node(**options)) is None


@pytest.mark.parametrize(
    ("have", "said"),
    [
        ("4.0.0b30", "flash-attn-4 4.0.0b30 is installed, 4.0.0b36 or newer"),
        ("4.0.0", "is no CUDA"),
        (None, "is not installed"),
    ],
)
def test_what_keeps_it_from_use_is_said(have, said, monkeypatch):
    def version(name):
        if have is None:
            raise PackageNotFoundError(name)
        return have

    monkeypatch.setattr(fa4, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in fa4.BACKEND.available()
